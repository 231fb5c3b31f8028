"""What a step reports: sums gathered over its micro-batches, and facts about its trajectories."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sse_rl.learner.advantages import deviation
from sse_rl.learner.samples import group_rewards
from sse_rl.types import Group


class Tally:
    """Means and maxima of scalars, kept on the device until they are read, all at once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._maxima: dict[str, Tensor] = {}

    def mean(self, totals: dict[str, Tensor], *, count: float) -> None:
        """Each total is the sum over `count` things of what the metric is the mean of."""
        for name, total in totals.items():
            total = total.detach().double()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def max(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            seen = self._maxima.get(name)
            self._maxima[name] = value if seen is None else torch.maximum(seen, value)

    def read(self) -> dict[str, float]:
        means = {n: total / max(self._counts[n], 1e-9) for n, total in self._sums.items()}
        named = means | self._maxima
        if not named:
            return {}
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))


def trajectory_metrics(groups: list[Group]) -> dict[str, float]:
    """Rewards and lengths of a batch, `ended` of answers that were not cut off; NaN where too few
    have what a statistic is of."""
    rewards = [group_rewards(group) for group in groups]
    values = np.concatenate(rewards)
    known = values[~np.isnan(values)]
    spreads = np.array([deviation(group) for group in rewards])
    trajectories = [t for group in groups for t in group.trajectories]
    lengths = np.array([len(t.token_ids) for t in trajectories])
    ended = np.array([t.finish_reason == "stop" for t in trajectories])
    return {
        "reward": float(known.mean()) if len(known) else float("nan"),
        "reward_std": deviation(values),
        "frac_reward_zero_std": float(np.isclose(np.nan_to_num(spreads), 0.0).mean()),
        "completion_length/mean": float(lengths.mean()),
        "completion_length/min": float(lengths.min()),
        "completion_length/max": float(lengths.max()),
        "completion_length/p95": float(np.quantile(lengths, 0.95)),
        "completion_length/ended": float(lengths[ended].mean()) if ended.any() else float("nan"),
        "truncated": float(1 - ended.mean()),
    }
