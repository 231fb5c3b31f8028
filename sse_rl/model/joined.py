"""Weights that multiply the same input: one product serves them all.

Decoding reads every weight once a step, so all that multiply x should be one matrix. The parameters
stay what they are, each a slice of that matrix, and weights copied into them in place need no
further step. Training puts them together anew each time, which is next to nothing beside a row of
tokens: x is read once, and its gradient is one product instead of a sum of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def products(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """layer(x) of each layer, x [T, d] -> [T, width] each, views of one product where there is
    one."""
    whole = product(x, layers)
    if whole is None:
        return tuple(layer(x) for layer in layers)
    return whole.split([layer.out_features for layer in layers], -1)  # pyright: ignore


def product(x: Tensor, layers: Sequence[nn.Module]) -> Tensor | None:
    """x [T, d] times the layers' weights, one behind the other -> [T, sum of widths].

    None where the layers are to be called: if one is no plain linear layer (an adapter's or a
    quantised one has a forward of its own), has a bias, or has weights of another dtype, and on a
    CPU unless the weights are joined and autograd is off.
    """
    weights: list[Tensor] = []
    for layer in layers:
        if type(layer) is not nn.Linear or layer.bias is not None:
            return None
        weights.append(layer.weight)
    whole = None if torch.is_grad_enabled() else joined(weights)
    if whole is None and x.is_cuda and len({weight.dtype for weight in weights}) == 1:
        whole = torch.cat(weights)
    return None if whole is None else F.linear(x, whole)


@torch.no_grad()
def join(weights: Sequence[Tensor]) -> None:
    """Move weights [*, d] of one dtype next to each other; their values and shapes stay."""
    if len({weight.dtype for weight in weights}) == 1 and joined(weights) is None:
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = rows


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The one matrix that two or more weights [*, d] are consecutive slices of, if they are."""
    first = weights[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        apart = weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage
        if apart or weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(len(weight) for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
