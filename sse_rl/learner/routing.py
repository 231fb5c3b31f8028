"""The router over an optimisation batch: how the rollout used it, how often it would now differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def partition_shares(
    routing: list[np.ndarray], readers: list[np.ndarray | None], *, num_partitions: int
) -> np.ndarray:
    """F [L_sse, N] float32: share of a batch's tokens whose recorded choice holds each partition.

    `routing` holds one [T, L_sse, K] array of ids a micro-batch, `readers` how often each token
    counts, [T], or None for once. Raises ValueError for an id >= N.
    """
    layers = routing[0].shape[1] if routing else 0
    offsets = np.arange(layers, dtype=np.int64)[:, None] * num_partitions
    counts = np.zeros(layers * num_partitions, np.int64)
    tokens = 0
    for ids, times in zip(routing, readers, strict=True):
        if ids.size and ids.max() >= num_partitions:
            raise ValueError(f"recorded partition {ids.max()} of a router over {num_partitions}")
        often = None if times is None else np.repeat(times, ids[0].size)
        found = np.bincount((ids + offsets).ravel(), often, minlength=len(counts))
        counts += found.astype(np.int64)
        tokens += len(ids) if times is None else int(times.sum())
    return (counts.reshape(layers, num_partitions) / max(tokens, 1)).astype(np.float32)


def balance_loss(
    router_probs: list[Tensor],
    recorded: Tensor,
    readers: Tensor | None = None,
    *,
    shares: Tensor,
    num_tokens: int,
) -> Tensor:
    """A micro-batch's part of the load-balance loss of its optimisation batch, summed over layers.

    `router_probs` are the live [T, N] of each layer, `readers` [T] how often each token counts;
    `shares` [L_sse, N] and `num_tokens` are those of the whole batch, so that the parts add up to
    its loss (sse_spec, section 6).
    """
    if not router_probs:
        return shares.new_zeros(())
    sums = [p.sum(0) if readers is None else readers.to(p.dtype) @ p for p in router_probs]
    partitions, chosen = shares.shape[1], recorded.shape[2]
    return partitions / chosen * (torch.stack(sums) / num_tokens * shares).sum()


@torch.no_grad()
def flips(router_probs: list[Tensor], recorded: Tensor, readers: Tensor | None = None) -> Tensor:
    """How many (token, layer) would not choose the `recorded` [T, L_sse, K] partitions; scalar.

    One flips where a partition left out has a higher live probability than one chosen. A token
    counts as often as `readers` [T] says, else once.
    """
    if not router_probs:
        return recorded.new_zeros((), dtype=torch.int64)
    probs = torch.stack(router_probs, 1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(2, recorded.long(), True)
    least = probs.masked_fill(~chosen, torch.inf).amin(2)
    most = probs.masked_fill(chosen, -torch.inf).amax(2)
    flipped = most > least
    return (flipped if readers is None else flipped * readers[:, None]).sum()
