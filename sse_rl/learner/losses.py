"""The policy losses, as a plain sum over sampled tokens: splitting a batch never changes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sse_rl.learner.segments import segment_mean
from sse_rl.recipe import Grpo


@dataclass(slots=True)
class Tokens:
    """What the loss needs of the M sampled tokens of a micro-batch, in the order of its row."""

    lengths: Tensor
    """[B] int64, tokens of each sequence; they sum to M."""
    advantages: Tensor
    """[M]."""
    scales: Tensor
    """[M], from `token_scales`."""
    old_logprobs: Tensor
    """[M], of the learner before the first update on this batch."""
    weights: Tensor
    """[M], from `correction_weights`."""
    reference_logprobs: Tensor | None = None
    """[M], of the frozen model that `beta` ties the policy to."""


@dataclass(slots=True)
class PolicyLoss:
    loss: Tensor
    """Scalar: this micro-batch's share of the loss of the optimisation batch."""
    kl: Tensor | None
    """Sum over tokens of the k3 estimate of KL(policy || reference)."""
    clipped_low: Tensor
    """Tokens with a negative advantage whose ratio is below the band."""
    clipped_high: Tensor
    """Tokens with a positive advantage whose ratio is above it."""


def policy_loss(logprobs: Tensor, tokens: Tokens, grpo: Grpo) -> PolicyLoss:
    """Sum over tokens of scale * (weight * l + beta * kl); r = pi / pi_old, A is the advantage.

    l = -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) (PPO, arXiv 1707.06347; dual
    clip, arXiv 1912.09729), and for cispo l = -stop_gradient(min(r, epsilon_high)) A log pi (arXiv
    2506.13585). With importance_sampling_level = sequence, r is exp of the mean log-ratio of the
    token's sequence (GSPO, arXiv 2507.18071). kl = exp(d) - d - 1, d = log reference - log pi.
    """
    log_ratio = logprobs - tokens.old_logprobs
    if grpo.importance_sampling_level == "sequence":
        log_ratio = segment_mean(log_ratio, tokens.lengths)
    ratio = log_ratio.exp()
    advantages = tokens.advantages
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    if grpo.loss_type == "cispo":
        per_token = -ratio.clamp(max=high).detach() * advantages * logprobs
        low_bound, high_bound = 0.0, high
    else:
        low_bound, high_bound = 1 - grpo.epsilon, 1 + high
        clipped = ratio.clamp(low_bound, high_bound)
        bounded = ratio if grpo.delta is None else ratio.clamp(max=grpo.delta)
        per_token = -torch.min(bounded * advantages, clipped * advantages)
    per_token = per_token * tokens.weights

    kl = None
    if tokens.reference_logprobs is not None:
        gap = tokens.reference_logprobs - logprobs
        kl = gap.exp() - gap - 1
        if grpo.beta > 0:
            per_token = per_token + grpo.beta * kl
    return PolicyLoss(
        loss=(per_token * tokens.scales).sum(),
        kl=None if kl is None else kl.detach().sum(),
        clipped_low=((ratio < low_bound) & (advantages < 0)).sum(),
        clipped_high=((ratio > high_bound) & (advantages > 0)).sum(),
    )


def token_scales(lengths: np.ndarray, *, num_sequences: int, grpo: Grpo) -> np.ndarray:
    """What one token of each sequence counts for, from the sampled `lengths` [n] of a whole batch.

    grpo: the mean over sequences of the mean over tokens. dapo, bnpo, cispo: the mean over all
    tokens. dr_grpo: the sum over num_sequences * max_completion_length. `num_sequences` counts the
    masked trajectories too, whose `lengths` are not given, as TRL does.
    """
    if grpo.loss_type == "grpo":
        return 1.0 / (num_sequences * lengths)
    if grpo.loss_type == "dr_grpo":
        return np.full(len(lengths), 1.0 / (num_sequences * grpo.max_completion_length))
    return np.full(len(lengths), 1.0 / max(int(lengths.sum()), 1))
