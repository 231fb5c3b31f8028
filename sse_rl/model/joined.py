"""Weights that multiply the same input, next to each other in memory: one product serves them all.

Decoding reads every weight once a step, so all that multiply x should be one matrix. The parameters
stay what they are, each a slice of that matrix, and weights copied into them in place need no
further step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product(x: Tensor, layers: Sequence[nn.Module]) -> Tensor | None:
    """x [T, d] times the layers' joint weight -> [T, sum of widths]; None unless autograd is off
    and they are plain linear layers without bias, joined."""
    if torch.is_grad_enabled():
        return None
    weights = []
    for layer in layers:
        if type(layer) is not nn.Linear or layer.bias is not None:
            return None
        weights.append(layer.weight)
    whole = joined(weights)
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
