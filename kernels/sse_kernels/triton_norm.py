"""The end of an SSE layer in one kernel: streams summed, normed and gated; and its backward.

    o = sum of slots     n = o / sqrt(mean(o^2) + eps)     y = n weight silu(gate)

With a = dy weight silu(gate), do = (a - n mean(a n)) / sqrt(mean(o^2) + eps).
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Values a program holds."""
_TILES = 16
"""Tiles a program of the backward pass takes, which is one part of the gradient of `weight`."""
MAX_WIDTH = 1024


def triton_gated_rms_norm(
    o: Tensor, weight: Tensor, gate: Tensor | None = None, *, eps: float
) -> Tensor:
    """See `gated_rms_norm`; on a GPU, Dv at most MAX_WIDTH, no fp64. Keeps its inputs."""
    return _norm(
        o.contiguous(), weight.contiguous(), None if gate is None else gate.contiguous(), eps
    )


def norm_forward(
    slots: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """slots [S, *rows, Dv] -> y and, if kept, o [*rows, Dv], like slots.

    Everything contiguous. An o that is not kept is empty.
    """
    shape, width = slots.shape[1:], slots.shape[-1]
    y = slots.new_empty(shape)
    o = slots.new_empty(shape if keep else 0)
    rows, block = y.numel() // width, _block(width)
    if rows:
        norm_fwd_kernel[(triton.cdiv(rows, block),)](
            slots, weight, gate, y, o if keep else None, rows, eps,
            S=len(slots), D=width, DP=triton.next_power_of_2(width), BLOCK=block,
        )  # fmt: skip
    return y, o


def norm_backward(
    o: Tensor, weight: Tensor, gate: Tensor | None, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of o, weight and gate, in their dtypes; everything contiguous."""
    width = o.shape[-1]
    do, dgate = torch.empty_like(o), None if gate is None else torch.empty_like(gate)
    rows, block = o.numel() // width, _block(width)
    parts = triton.cdiv(rows, block * _TILES)
    dweight = weight.new_empty(parts, width, dtype=torch.float32)
    if rows:
        norm_bwd_kernel[(parts,)](
            o, weight, gate, dy, do, dweight, dgate, rows, eps,
            D=width, DP=triton.next_power_of_2(width), BLOCK=block, TILES=_TILES,
        )  # fmt: skip
    return do, dweight.sum(0).to(weight.dtype), dgate


def _block(width: int) -> int:
    return max(_TILE // triton.next_power_of_2(width), 1)


@torch.library.custom_op("sse_kernels::gated_rms_norm", mutates_args=())
def _norm(o: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return norm_forward(o[None], weight, gate, eps)[0]


@_norm.register_fake
def _(o: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(o)


@torch.library.custom_op("sse_kernels::gated_rms_norm_backward", mutates_args=())
def _norm_backward(
    o: Tensor, weight: Tensor, gate: Tensor | None, dy: Tensor, eps: float
) -> list[Tensor]:
    gradients = norm_backward(o, weight, gate, dy.contiguous(), eps)
    return [x for x in gradients if x is not None]


@_norm_backward.register_fake
def _(o: Tensor, weight: Tensor, gate: Tensor | None, dy: Tensor, eps: float) -> list[Tensor]:
    return [torch.empty_like(x) for x in (o, weight, gate) if x is not None]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    do, dweight, *dgate = _norm_backward(*ctx.saved_tensors, dy, ctx.eps)
    return do, dweight, dgate[0] if dgate else None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel(
    slots, weight, gate, y, o, rows, eps,
    S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, DP)
    tile = i_r[:, None] * D + i_d[None, :]
    mask = (i_r < rows)[:, None] & (i_d < D)[None, :]
    x = tl.zeros([BLOCK, DP], tl.float32)
    for s in tl.static_range(S):
        slot = slots + tl.full([], s * D, tl.int64) * rows
        x += tl.load(slot + tile, mask=mask, other=0.0).to(tl.float32)
    if o is not None:
        tl.store(o + tile, x.to(o.dtype.element_ty), mask=mask)
    x *= (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps))[:, None]
    x *= tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        z = tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32)
        x *= z / (1.0 + tl.exp(-z))
    tl.store(y + tile, x.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_bwd_kernel(
    o, weight, gate, dy, do, dweight, dgate, rows, eps,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dweight [parts, D]: the share of each program."""
    i_d = tl.arange(0, DP)
    w = tl.load(weight + i_d, mask=i_d < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([DP], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    for i in range(TILES):
        i_r = first + i * BLOCK + tl.arange(0, BLOCK)
        tile = i_r[:, None] * D + i_d[None, :]
        mask = (i_r < rows)[:, None] & (i_d < D)[None, :]
        x = tl.load(o + tile, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(dy + tile, mask=mask, other=0.0).to(tl.float32)
        scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps))[:, None]
        x *= scale
        if gate is not None:
            z = tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-z))
            dz = a * x * w * s * (1.0 + z * (1.0 - s))
            tl.store(dgate + tile, dz.to(dgate.dtype.element_ty), mask=mask)
            a *= z * s
        dw += tl.sum(a * x, axis=0)
        a *= w
        dx = scale * (a - x * (tl.sum(a * x, axis=1) / D)[:, None])
        tl.store(do + tile, dx.to(do.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + i_d, dw, mask=i_d < D)
