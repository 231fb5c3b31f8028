"""The router's choice: which K of the N state partitions each token reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import expect, expect_count, expect_float, expect_ids

MAX_PARTITIONS = 256
"""Recorded ids travel as uint8."""


class Routing(NamedTuple):
    """Partitions of every token, in the order in which their reads are summed."""

    ids: Tensor
    """[T, K] int64, or uint8 from a layer's step on CUDA; ascending in each row."""
    weights: Tensor
    """[T, K] fp32, `probs` at `ids`, not renormalised; differentiable."""
    probs: Tensor
    """[T, N] fp32, softmax over all partitions; differentiable."""


def route(logits: Tensor, k: int, *, ids: Tensor | None = None) -> Routing:
    """Softmax over N partitions, then the K largest, ties to the lowest index.

    logits: [T, N] of any float dtype; computed in fp32 (fp64 if given). The order is that of the
    logits themselves, so that rounding inside the softmax cannot make a tie.
    ids: [T, K] integers (uint8 records) replay an earlier choice: only the weights are live.

    Raises ValueError or TypeError naming the argument.
    """
    expect_float("route", "logits", logits)
    expect(logits.dim() == 2, "route", "logits", "shape [T, N]", list(logits.shape))
    tokens, partitions = logits.shape
    expect(1 <= partitions <= MAX_PARTITIONS, "route", "N", f"1 to {MAX_PARTITIONS}", partitions)
    expect_count("route", "k", k, partitions, "N")
    if logits.dtype != torch.float64:
        logits = logits.float()
    probs = logits.softmax(-1)
    if ids is None:
        ids = _largest(logits.detach(), k)
    else:
        expect_ids("route", ids, (tokens, k), partitions, logits.device)
        ids = ids.long().sort(dim=-1).values if k > 1 else ids.long()
    return Routing(ids, probs.gather(-1, ids), probs)


def _largest(logits: Tensor, k: int) -> Tensor:
    """[T, K] partitions of the K largest logits, ascending; ties to the lowest index."""
    if logits.is_cuda and logits.dtype == torch.float32:
        try:
            from .triton_route import top_partitions
        except ImportError:
            pass
        else:
            return top_partitions(logits, k)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=-1).values
