"""Rows from one place to another.

torch's own gradient of taking rows must reckon with repeated ones: it is slow on CPU, and on CUDA
sorts the places anew in every layer. `scatter_rows` and `gather_rows` are for distinct places, each
the other's backward; `take_rows` knows beforehand where a row went.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import expect


class Selection(NamedTuple):
    """Rows to take out of m, and where each of the m goes."""

    index: Tensor
    """[n] int64; a row may be taken more than once, or never."""
    copies: Tensor
    """[n] int64, places of `index`, sorted by the row that stands there."""
    bounds: Tensor
    """[m+1] int64: row i stands at copies[bounds[i]:bounds[i+1]]."""


def select_rows(index: Tensor, rows: int) -> Selection:
    """The selection of `index` [n] out of so many rows."""
    found, copies = index.sort(stable=True)
    bounds = torch.searchsorted(found, torch.arange(rows + 1, device=index.device))
    return Selection(index, copies, bounds)


def take_rows(x: Tensor, selection: Selection) -> Tensor:
    """x [m, *D] -> x[index] [n, *D]; a row's gradient is the sum of its copies', in their order."""
    rows = len(selection.bounds) - 1
    expect(len(x) == rows, "take_rows", "x", f"of {rows} rows, as the selection", len(x))
    if not x.is_cuda:
        return x.index_select(0, selection.index)
    if x.dtype != torch.float64:
        try:
            from .triton_rows import triton_take_rows
        except ImportError:
            pass
        else:
            return triton_take_rows(x, *selection)
    return x[selection.index]


def scatter_rows(x: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows x [*P, D] at the distinct `places` [*P] of zeros of `shape` [*Q, D]."""
    return _Scatter.apply(x, places, shape)


def gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """The rows of x [*Q, D] at the distinct `places` [*P], counted through all of Q: [*P, D]."""
    return _Gather.apply(x, places)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(places)
        rows = x.new_zeros(shape).view(-1, shape[-1])
        return rows.index_copy_(0, places.flatten(), x.reshape(-1, shape[-1])).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _Gather.apply(grad, places), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        rows = x.reshape(-1, x.shape[-1]).index_select(0, places.flatten())
        return rows.view(*places.shape, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _Scatter.apply(grad, places, ctx.shape), None
