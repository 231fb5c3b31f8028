"""Moving rows to distinct places and back: each is the other's backward.

torch's own backward of `index_select` must reckon with repeated places, and is slow on CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
