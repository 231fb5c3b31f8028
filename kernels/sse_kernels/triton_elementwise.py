"""`silu_mul` and `add_rms_norm` in Triton, one launch each, also `silu_mul`'s backward pass.

With s = sigmoid(a), y = silu(a) b: da = dy b s (1 + a (1 - s)), db = dy silu(a).
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def triton_silu_mul(x: Tensor) -> Tensor:
    """See `silu_mul`."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(tokens, width)
    if out.numel():
        grid = (tokens, triton.cdiv(width, _BLOCK))
        silu_mul_kernel[grid](x.contiguous(), out, W=width, BLOCK=_BLOCK)
    return out


@torch.library.custom_op("sse_kernels::silu_mul", mutates_args=())
def differentiable_silu_mul(x: Tensor) -> Tensor:
    """`triton_silu_mul` with a gradient."""
    return triton_silu_mul(x)


@differentiable_silu_mul.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("sse_kernels::silu_mul_backward", mutates_args=())
def _silu_mul_backward(x: Tensor, dy: Tensor) -> Tensor:
    x, dx = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, width = dy.shape
    if dy.numel():
        grid = (tokens, triton.cdiv(width, _BLOCK))
        silu_mul_bwd_kernel[grid](x, dy.contiguous(), dx, W=width, BLOCK=_BLOCK)
    return dx


@_silu_mul_backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    return _silu_mul_backward(*ctx.saved_tensors, dy)


differentiable_silu_mul.register_autograd(_backward, setup_context=_setup_context)


def triton_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`."""
    x = x.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        width = x.shape[1]
        add_rms_norm_kernel[(len(x),)](
            x, y.contiguous(), weight, total, normed, eps,
            D=width, DP=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip
    return total, normed


@triton.jit
def silu_mul_kernel(x, out, W: tl.constexpr, BLOCK: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    i_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i_w < W
    a = tl.load(x + i_t * 2 * W + i_w, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + i_t * 2 * W + W + i_w, mask=mask, other=0.0)
    a = (a / (1.0 + tl.exp(-a))).to(b.dtype)
    tl.store(out + i_t * W + i_w, a * b, mask=mask)


@triton.jit
def silu_mul_bwd_kernel(x, dy, dx, W: tl.constexpr, BLOCK: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    i_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i_w < W
    row = i_t * 2 * W + i_w
    a = tl.load(x + row, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + row + W, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(dy + i_t * W + i_w, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-a))
    out = dx.dtype.element_ty
    tl.store(dx + row, (slope * b * s * (1.0 + a * (1.0 - s))).to(out), mask=mask)
    tl.store(dx + row + W, (slope * (a * s).to(out).to(tl.float32)).to(out), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x, y, weight, total, normed, eps, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_d = tl.arange(0, DP)
    mask = i_d < D
    b_x = tl.load(x + i_t * D + i_d, mask=mask, other=0.0)
    b_y = tl.load(y + i_t * D + i_d, mask=mask, other=0.0)
    b_sum = (b_x.to(tl.float32) + b_y.to(tl.float32)).to(b_x.dtype)
    tl.store(total + i_t * D + i_d, b_sum, mask=mask)
    b_sum = b_sum.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_sum * b_sum, axis=0) / D + eps)
    b_w = tl.load(weight + i_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + i_t * D + i_d, (b_sum * scale * b_w).to(normed.dtype.element_ty), mask=mask)
