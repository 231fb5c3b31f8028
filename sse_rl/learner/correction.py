"""Weights that correct for the gap between the policy that sampled and the policy that learns."""

from __future__ import annotations

import torch
from torch import Tensor

from sse_rl.learner.segments import segment_sum
from sse_rl.recipe import Correction


def correction_weights(
    learner: Tensor, rollout: Tensor, *, lengths: Tensor, correction: Correction
) -> tuple[Tensor, Tensor]:
    """The weight of each token's loss, and the ratio it was made from; both [M], without gradient.

    ratio = exp(learner - rollout) of the log-probs [M] of the sampled tokens: of the token itself
    (level `token`), of the sum (`sequence`) or the mean (`geometric`) over its sequence, whose
    `lengths` [B] sum to M. Mode `truncate` clamps the ratio into [clip_min, clip_max], `mask`
    zeroes what lies outside it. Level `none` weighs every token 1; its ratio is the token's.
    Sources: truncated and masked importance sampling as in TRL's vllm_importance_sampling_mode.
    """
    log_ratio = (learner - rollout).detach()
    if correction.level in ("sequence", "geometric"):
        total = segment_sum(log_ratio, lengths)
        if correction.level == "geometric":
            total = total / lengths
        log_ratio = total.repeat_interleave(lengths, output_size=len(log_ratio))
    ratio = log_ratio.exp()
    if correction.level == "none":
        return torch.ones_like(ratio), ratio
    low = 0.0 if correction.clip_min is None else correction.clip_min
    high = torch.inf if correction.clip_max is None else correction.clip_max
    if correction.mode == "truncate":
        return ratio.clamp(low, high), ratio
    # a ratio that is not a number stays one, and shows in the loss
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0), ratio
