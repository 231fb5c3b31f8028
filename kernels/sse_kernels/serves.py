"""Where the Triton forms of whole sequences and of layers serve."""

from __future__ import annotations

import torch
from torch import Tensor


def triton_serves(q: Tensor, v: Tensor) -> bool:
    """Whether they run q [T, H, Dk] and v [T, Hv, Dv]: on a GPU, if triton is there and they have
    kernels for these widths."""
    if not v.is_cuda:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return (
        q.shape[2] in (16, 32, 64, 128, 256)
        and 16 <= v.shape[2] <= 256
        and v.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
