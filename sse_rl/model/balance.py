"""The auxiliary loss that keeps every partition in use."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(
    probs: Tensor, ids: Tensor, *, share: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """(N/K) * sum_n P_n F_n of one SSE layer (sse_spec section 6); 1 when routing is balanced.

    P_n is the mean router probability of partition n and carries the gradient, F_n the share of
    tokens that chose n.

    Args:
        probs: [T, N] softmax of the router's logits.
        ids: [T, K] chosen partitions.
        share: [N] F_n counted over a larger batch than these tokens; counted from `ids` if None.
        tokens: the size of that batch, which P_n is divided by. With both given the result is a
            plain sum over tokens: the losses of its micro-batches add up to the batch's.
    """
    partitions, chosen = probs.shape[-1], ids.shape[-1]
    if share is None:
        share = partition_share(ids, partitions)
    mean = probs.sum(0) / (probs.shape[0] if tokens is None else tokens)
    return partitions / chosen * (mean * share).sum()


def partition_share(ids: Tensor, partitions: int) -> Tensor:
    """[N] fp32, the share of the tokens of `ids` [T, K] that chose each partition."""
    counts = torch.bincount(ids.flatten().long(), minlength=partitions)
    return counts.float() / ids.shape[0]
