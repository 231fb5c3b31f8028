"""The dtypes in which an operator reads, computes and keeps its state."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays fp64, so that gradients can be checked; everything else computes in fp32."""
    return total_dtype(x.dtype)


def total_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_dtype(*tensors: Tensor) -> torch.dtype:
    """In which the Triton kernels read these: one that holds all of them, but no fp64."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return torch.float32 if dtype == torch.float64 else dtype
