"""Log-probabilities and entropies of sampled tokens, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 24
"""Logits alive at once: 64 MB in float32, and a few times that in the backward pass."""


def token_logprobs(
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at `targets`, and the entropy; [M] each.

    `logits` maps hidden states [m, d] to [m, V] in float32, as in the rollout. Where the [M, V]
    logits would exceed `max_logits`, they are made in chunks, and again in the backward pass. The
    entropy carries no gradient.
    """
    rows = max(1, max_logits // vocab_size)
    if len(hidden) <= rows:
        return _chunk(logits, hidden, targets, temperature)
    chunks = []
    for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            chunk = checkpoint(
                _chunk, logits, states, ids, temperature,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            chunk = _chunk(logits, states, ids, temperature)
        chunks.append(chunk)
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits(hidden) / temperature, dim=-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(1)
    return chosen, entropy
