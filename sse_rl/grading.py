"""Grading a file of answers with the rewards' grader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sse_rewards import Item, score_batch

from sse_rl.errors import UserError


@dataclass(frozen=True, slots=True)
class Grades:
    rows: list[dict[str, Any]]
    """The file's rows with reward, status, extracted and reason beside their own columns."""
    statuses: dict[str, int]
    """Status -> how many, most frequent first."""

    @property
    def scored(self) -> int:
        """Rows whose gold is good."""
        return sum(row["reward"] is not None for row in self.rows)

    @property
    def score(self) -> float | None:
        """Their mean reward; None if there is none."""
        return sum(row["reward"] or 0 for row in self.rows) / self.scored if self.scored else None


def grade_file(path: Path, kind: str = "auto") -> Grades:
    """Grade the rows of a JSONL file: {completion, answer, kind (optional)}.

    Raises:
        UserError: the file cannot be read, has no rows, or a row has no text in one of the two
            columns; a number as answer will do.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path}: no rows")
    items = [Item(row["completion"], row["answer"], row.get("kind", kind)) for row in rows]
    results = score_batch(items)
    graded = [
        {**row, **{key: asdict(result)[key] for key in ("reward", "status", "extracted", "reason")}}
        for row, result in zip(rows, results, strict=True)
    ]
    counts = Counter(result.status for result in results)
    return Grades(graded, dict(counts.most_common()))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number}: not JSON: {error}") from None
        if isinstance(row, dict) and type(row.get("answer")) in (int, float):
            row["answer"] = str(row["answer"])
        for column in ("completion", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise UserError(f"{path}, row {number}: no text in column {column!r}")
        yield row
