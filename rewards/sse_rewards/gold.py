"""Golds are checked when a dataset is loaded, not when a reward is due."""

from __future__ import annotations

from .grader import read_gold
from .pool import RewardPool, default_pool


def validate_gold(
    answer: object, kind: str = "auto", *, pool: RewardPool | None = None
) -> str | None:
    r"""What is wrong with a gold answer, or None if it verifies against itself in a box."""
    if not isinstance(answer, str):
        return f"not a string: {answer!r}"
    gold = read_gold(answer, kind)
    if gold.problem:
        return gold.problem
    result = (pool or default_pool()).score(f"\\boxed{{{gold.text}}}", answer, kind)  # pyright: ignore[reportArgumentType]
    return None if result.correct else f"does not verify against itself: {result.reason}"
