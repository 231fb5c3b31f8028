"""Whether a policy has collapsed: a plain function of the metrics of the steps so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sse_rl.recipe import EarlyStop

Row = Mapping[str, Any]


def collapse(rows: Sequence[Row], limits: EarlyStop | None) -> str | None:
    """Why training should end after the last of `rows`, the metrics of its steps; None to go on.

    Everything is judged by the mean over the last `limits.window` steps, so that no single batch
    ends a run; before there are as many, nothing is.
    """
    if limits is None or len(rows) < limits.window:
        return None
    now = rows[-limits.window :]
    bounds = (
        ("entropy", "min_entropy", limits.min_entropy, False),
        ("entropy", "max_entropy", limits.max_entropy, True),
        ("completion_length/mean", "min_length", limits.min_length, False),
        ("truncated", "max_truncated", limits.max_truncated, True),
        ("reward", "min_reward_share", _reward_bound(rows, limits), False),
    )
    for metric, key, bound, above in bounds:
        value = mean(now, metric)
        if bound is not None and (value > bound if above else value < bound):
            return (
                f"{metric} was {value:.4g} over the last {limits.window} steps, "
                f"{'above' if above else 'below'} the {bound:.4g} of grpo.early_stop.{key}"
            )
    return None


def _reward_bound(rows: Sequence[Row], limits: EarlyStop) -> float | None:
    """`min_reward_share` of the best window; None while rewards are not positive."""
    if limits.min_reward_share is None:
        return None
    windows = range(limits.window, len(rows) + 1)
    means = (mean(rows[end - limits.window : end], "reward") for end in windows)
    best = max((value for value in means if not math.isnan(value)), default=0.0)
    return limits.min_reward_share * best if best > 0 else None


def mean(rows: Sequence[Row], metric: str) -> float:
    """Over the rows that have the metric; NaN, which no bound refuses, if none has.

    A row that has it as NaN counts as one without, as it is written: a resumed run judges the same.
    """
    found = (row.get(metric) for row in rows)
    values = [value for value in found if value is not None and not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan
