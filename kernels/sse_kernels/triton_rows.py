"""Taking rows with a gradient of one launch: sums of copies that lie anywhere, in one order."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024


def triton_take_rows(x: Tensor, index: Tensor, copies: Tensor, bounds: Tensor) -> Tensor:
    """See `take_rows`; no fp64."""
    return _Take.apply(x, index, copies, bounds)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, copies: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(copies, bounds)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return triton_sum_rows(grad, *ctx.saved_tensors), None, None, None


def triton_sum_rows(x: Tensor, copies: Tensor, bounds: Tensor) -> Tensor:
    """x [n, *D] -> [m, *D], row i the sum of x[copies[bounds[i]:bounds[i+1]]], added in fp32."""
    x = x.contiguous()
    out = x.new_empty(len(bounds) - 1, *x.shape[1:])
    if out.numel():
        width = out[0].numel()
        block = min(_BLOCK, triton.next_power_of_2(width))
        sum_rows_kernel[(len(out), triton.cdiv(width, block))](
            x, copies, bounds, out, width, BLOCK=block
        )
    return out


@triton.jit
def sum_rows_kernel(x, copies, bounds, out, width, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i_d < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(bounds + i_row), tl.load(bounds + i_row + 1)):
        row = tl.load(copies + i) * width
        total += tl.load(x + row + i_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i_row * width + i_d, total.to(out.dtype.element_ty), mask=mask)
