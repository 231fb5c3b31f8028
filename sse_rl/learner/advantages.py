"""Advantages: how much better an answer is than the other answers to its prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np

EPSILON = 1e-4
"""Added to the deviation, as TRL does."""


def group_advantages(
    rewards: list[np.ndarray], *, scale_rewards: Literal["group", "batch", "none"]
) -> list[np.ndarray]:
    """(reward - mean of its group) / (deviation + 1e-4), group by group.

    `rewards` holds one float array a group, NaN where an answer has no reward: it counts in no mean
    and its advantage is 0. The deviation is the unbiased one, of the group, of the whole batch, or
    left out; where fewer than two rewards make it undefined, the advantage is 0.
    GRPO: arXiv 2402.03300, section 4.1; without scaling: Dr. GRPO, arXiv 2503.20783.
    """
    centred = [group - _mean(group) for group in rewards]
    if scale_rewards == "group":
        centred = [c / (deviation(r) + EPSILON) for c, r in zip(centred, rewards, strict=True)]
    elif scale_rewards == "batch" and rewards:
        spread = deviation(np.concatenate(rewards)) + EPSILON
        centred = [c / spread for c in centred]
    return [np.nan_to_num(c, nan=0.0) for c in centred]


def deviation(rewards: np.ndarray) -> float:
    """Unbiased standard deviation of the rewards that are not NaN; NaN for fewer than two."""
    known = rewards[~np.isnan(rewards)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def _mean(rewards: np.ndarray) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if len(known) else float("nan")
