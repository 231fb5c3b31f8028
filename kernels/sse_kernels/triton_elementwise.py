"""`silu_mul` and `add_rms_norm` in Triton, one launch each."""

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
