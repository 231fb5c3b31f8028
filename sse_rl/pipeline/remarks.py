"""What a user should hear of a run that goes on, but not as meant: from its metrics alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sse_rl.pipeline.collapse import Row, mean
from sse_rl.recipe import Grpo

WINDOW = 10
"""Steps that are judged together: a single batch without signal is no rarity."""
MANY = 0.5
"""Share of answers that may be cut off without a remark."""


def remarks(rows: Sequence[Row], grpo: Grpo) -> dict[str, str]:
    """Kind of remark -> text, of `rows`, the metrics of consecutive steps; {} if all is well, or if
    there are less than `WINDOW`.

    "signal": in no step had a prompt's answers different rewards, so that these taught nothing.
    "truncated": most answers were cut off, and what is cut off is rarely right.
    """
    if len(rows) < WINDOW:
        return {}
    steps, reward = f"steps {rows[0]['step']} to {rows[-1]['step']}", mean(rows, "reward")
    found = {}
    if all(row.get("frac_reward_zero_std") == 1 for row in rows):
        found["signal"] = (
            f"rewards taught nothing in {steps}: all answers to a prompt had the same, "
            f"{'none' if math.isnan(reward) else f'{reward:.3g} in the mean'}{_statuses(rows)}; "
            "samples.jsonl shows answers"
        )
    cut_off = mean(rows, "truncated")
    if cut_off > MANY:
        found["truncated"] = (
            f"{100 * cut_off:.0f} % of the answers in {steps} were cut off at "
            f"grpo.max_completion_length = {grpo.max_completion_length}"
        )
    return found


def _statuses(rows: Sequence[Row]) -> str:
    """The graders' verdicts, the most frequent first."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("status/"))
    shares = {
        key.removeprefix("status/"): sum(row.get(key, 0.0) for row in rows) / len(rows)
        for key in keys
    }
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return "".join(f", {name} {100 * share:.0f} %" for name, share in ranked)
