"""What stands between a block's products: one launch, where torch's composition takes several.

Each equals the composition it replaces, rounded where that rounds. `add_rms_norm` is for decoding:
where gradients are wanted the composition itself runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import expect, expect_float, expect_tensor


def silu_mul(x: Tensor) -> Tensor:
    """silu(a) * b of x = [a, b] [T, 2W] -> [T, W]; keeps x alone for the backward pass."""
    op = "silu_mul"
    expect_float(op, "x", x)
    expect(x.dim() == 2 and x.shape[1] % 2 == 0, op, "x", "shape [T, 2W]", list(x.shape))
    if has_kernels(x):
        try:
            from .triton_elementwise import differentiable_silu_mul, triton_silu_mul

            return triton_silu_mul(x) if can_launch(x) else differentiable_silu_mul(x)
        except ImportError:
            pass
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm, [T, d] both, of x, y [T, d] and weight [d] of one dtype."""
    op = "add_rms_norm"
    expect_float(op, "x", x)
    expect(x.dim() == 2, op, "x", "shape [T, d]", list(x.shape))
    expect_tensor(op, "y", y, "[T, d]", tuple(x.shape), x.device)
    expect_tensor(op, "weight", weight, "[d]", (x.shape[1],), x.device)
    for name, tensor in (("y", y), ("weight", weight)):
        expect(tensor.dtype == x.dtype, op, name, f"{x.dtype} as x", tensor.dtype)
    if can_launch(x, y, weight):
        try:
            from .triton_elementwise import triton_add_rms_norm

            return triton_add_rms_norm(x, y, weight, eps)
        except ImportError:
            pass
    total = x + y
    return total, F.rms_norm(total, weight.shape, weight, eps)


def can_launch(*inputs: Tensor) -> bool:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    return has_kernels(*inputs)


def has_kernels(*inputs: Tensor) -> bool:
    return all(x.is_cuda and x.dtype != torch.float64 for x in inputs)
