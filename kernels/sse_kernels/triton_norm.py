"""The end of an SSE layer in one kernel: streams summed, normed and gated; and its backward.

    o = sum of slots     n = r o,  r = (mean(o^2) + eps)^-1/2     y = n f,  f = weight silu(gate)

The backward pass needs r and y alone, and y is kept by the product that takes it anyway: n = y / f
has the rounding of y, relative to itself. For that, an f of nearly 0 is 1e-30. With a = f dy,

    do = r (a - n mean(a n))     dgate = dy n weight silu'(gate)     dweight = sum dy n silu(gate)
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gla.triton_activate import sigmoid

_TILE = 2048
"""Values a program holds."""
_TILES = 16
"""Tiles a program of the backward pass takes, which is one part of the gradient of `weight`."""
MAX_WIDTH = 1024


def triton_gated_rms_norm(
    o: Tensor, weight: Tensor, gate: Tensor | None = None, *, eps: float
) -> Tensor:
    """See `gated_rms_norm`; on a GPU, Dv at most MAX_WIDTH, no fp64. Keeps its output, not o."""
    gate = None if gate is None else gate.contiguous()
    return _norm(o.contiguous(), weight.contiguous(), gate, eps)[0].to(o.dtype)


def norm_forward(
    slots: Tensor, weight: Tensor, gate: Tensor | None, eps: float, *, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """slots [S, *rows, Dv], base [*rows, Dv] fp32 -> y [*rows, Dv] like slots, and r [*rows] fp32.

    Everything contiguous. fp16 could not hold y / f: its y is fp32.
    """
    y, scales = empty_normed(slots[0])
    width = y.shape[-1]
    rows, block = scales.numel(), _block(width)
    if rows:
        norm_fwd_kernel[(triton.cdiv(rows, block),)](
            base, slots, weight, gate, y, scales, rows, eps,
            S=len(slots), D=width, DP=triton.next_power_of_2(width), BLOCK=block,
        )  # fmt: skip
    return y, scales


def norm_backward(
    y: Tensor,
    scales: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    dy: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of o, in `dtype`, and of weight and gate, in theirs; everything contiguous.

    y and scales: what `norm_forward` returned.
    """
    width = y.shape[-1]
    do = torch.empty_like(y, dtype=dtype)
    dgate = None if gate is None else torch.empty_like(gate)
    rows, block = scales.numel(), _block(width)
    parts = triton.cdiv(rows, block * _TILES)
    dweight = weight.new_empty(width, parts, dtype=torch.float32)
    if rows:
        norm_bwd_kernel[(parts,)](
            y, scales, weight, gate, dy, do, dweight, dgate, rows,
            D=width, DP=triton.next_power_of_2(width), BLOCK=block, TILES=_TILES,
        )  # fmt: skip
    return do, dweight.sum(1).to(weight.dtype), dgate


def empty_normed(o: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the y and r of o [*rows, Dv]."""
    dtype = torch.float32 if o.dtype == torch.float16 else o.dtype
    return torch.empty_like(o, dtype=dtype), o.new_empty(o.shape[:-1], dtype=torch.float32)


def _block(width: int) -> int:
    return max(_TILE // triton.next_power_of_2(width), 1)


@torch.library.custom_op("sse_kernels::gated_rms_norm", mutates_args=())
def _norm(o: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return norm_forward(o[None], weight, gate, eps)


@_norm.register_fake
def _(o: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return empty_normed(o)


@torch.library.custom_op("sse_kernels::gated_rms_norm_backward", mutates_args=())
def _norm_backward(
    y: Tensor,
    scales: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    dy: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    gradients = norm_backward(y, scales, weight, gate, dy.contiguous(), dtype)
    return [x for x in gradients if x is not None]


@_norm_backward.register_fake
def _(y, scales, weight, gate, dy, dtype):
    do = torch.empty_like(y, dtype=dtype)
    return [do, *(torch.empty_like(x) for x in (weight, gate) if x is not None)]


def _setup_context(ctx, inputs, output) -> None:
    o, weight, gate, _ = inputs
    ctx.dtype = o.dtype
    ctx.save_for_backward(*output, weight, gate)


def _backward(ctx, dy: Tensor, dscales: Tensor):
    do, dweight, *dgate = _norm_backward(*ctx.saved_tensors, dy, ctx.dtype)
    return do, dweight, dgate[0] if dgate else None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel(
    base, slots, weight, gate, y, scales, rows, eps,
    S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, DP)
    tile = i_r[:, None] * D + i_d[None, :]
    mask = (i_r < rows)[:, None] & (i_d < D)[None, :]
    x = tl.zeros([BLOCK, DP], tl.float32)
    if base is not None:
        x += tl.load(base + tile, mask=mask, other=0.0)
    for s in tl.static_range(S):
        slot = slots + tl.full([], s * D, tl.int64) * rows
        x += tl.load(slot + tile, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(scales + i_r, scale, mask=i_r < rows)
    factor = tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        z = tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32)
        factor *= z * sigmoid(z)
    x *= scale[:, None] * _shown(factor)
    tl.store(y + tile, x.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_bwd_kernel(
    y, scales, weight, gate, dy, do, dweight, dgate, rows,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dweight [D, programs]: the share of each program."""
    i_d = tl.arange(0, DP)
    w = tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([DP], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    for i in range(TILES):
        i_r = first + i * BLOCK + tl.arange(0, BLOCK)
        tile = i_r[:, None] * D + i_d[None, :]
        mask = (i_r < rows)[:, None] & (i_d < D)[None, :]
        x = tl.load(y + tile, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(dy + tile, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales + i_r, mask=i_r < rows, other=0.0)[:, None]
        if gate is not None:
            z = tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(z)
            x /= _shown(w * (z * s))
            dz = a * x * w * s * (1.0 + z * (1.0 - s))
            tl.store(dgate + tile, dz.to(dgate.dtype.element_ty), mask=mask)
            a *= z * s
        else:
            x /= _shown(w)
        dw += tl.sum(a * x, axis=0)
        a *= w
        dx = scale * (a - x * (tl.sum(a * x, axis=1) / D)[:, None])
        tl.store(do + tile, dx.to(do.dtype.element_ty), mask=mask)
    tl.store(dweight + i_d * tl.num_programs(0) + tl.program_id(0), dw, mask=i_d < D)


@triton.jit
def _shown(factor):
    """The factor, or what stands for one so near 0 that a product would not show the other."""
    return tl.where(tl.abs(factor) < 1e-30, 1e-30, factor)
