"""Sums over the sequences of a packed row."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """[M] summed over consecutive pieces of `lengths` [B], which sum to M -> [B]; in a fixed order.

    Differentiable in `values`. An empty piece sums to 0.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0.0)


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each piece, repeated for each of its members: [M] -> [M]."""
    means = segment_sum(values, lengths) / lengths
    return means.repeat_interleave(lengths, output_size=len(values))
