"""Grades rows of `{completion, answer, kind?}`: what `sse-rl grade FILE.jsonl` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from .adapters import completion_text
from .pool import RewardPool, default_pool

BATCH = 512


def grade_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    kind: str | None = None,
    lenient: bool = False,
    completion_key: str = "completion",
    answer_key: str = "answer",
    pool: RewardPool | None = None,
) -> Iterator[dict[str, Any]]:
    """Each row, in order, with `reward`, `correct`, `extracted`, `status`, `reason` and `stage`.

    Args:
        rows: mappings with a completion (text or messages), an answer and perhaps a `kind`.
        kind: for rows without one of their own; `auto` by default.

    Raises:
        ValueError: a row lacks a key, or holds something else than text; names row and key.
    """
    pool = pool or default_pool()
    numbered = enumerate(rows, 1)
    while batch := list(islice(numbered, BATCH)):
        items = []
        for number, row in batch:
            for key in (completion_key, answer_key):
                if key not in row:
                    have = ", ".join(map(str, row))
                    raise ValueError(f"row {number} has no {key!r}; its keys are: {have}")
            completion, answer = row[completion_key], row[answer_key]
            if not isinstance(completion, str | list):
                raise ValueError(f"row {number}: {completion_key!r} is no text: {completion!r}")
            items.append(
                (completion_text(completion), str(answer), row.get("kind", kind or "auto"))
            )
        for (_, row), result in zip(batch, pool.score_batch(items, lenient=lenient), strict=True):
            yield {
                **row,
                "reward": result.reward,
                "correct": result.correct,
                "extracted": result.extracted,
                "status": result.status,
                "reason": result.reason,
                "stage": result.stage,
            }


def summarize(graded: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`total`, `graded` (all but bad golds), `correct`, `accuracy` of the graded, `status` counts
    and the 1-based numbers of `bad_gold_rows`."""
    status: dict[str, int] = {}
    bad_rows: list[int] = []
    total = 0
    for number, row in enumerate(graded, 1):
        total = number
        status[row["status"]] = status.get(row["status"], 0) + 1
        if row["status"] == "bad_gold":
            bad_rows.append(number)
    usable = total - len(bad_rows)
    correct = status.get("correct", 0)
    return {
        "total": total,
        "graded": usable,
        "correct": correct,
        "accuracy": correct / usable if usable else None,
        "status": dict(sorted(status.items())),
        "bad_gold_rows": bad_rows,
    }
