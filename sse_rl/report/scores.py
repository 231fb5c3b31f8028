"""What the evaluations in a run's folder came to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sse_rl.errors import UserError


class Scored(NamedTuple):
    protocol: str
    """The benchmark, and `_greedy` at temperature 0."""
    step: int
    """Of the weights that were asked."""
    summary: dict[str, Any]


def scored(run_dir: Path) -> Iterator[Scored]:
    """The evaluations of a run that are whole, `eval/<protocol>-<step>`, in no order of steps.

    Raises UserError naming a summary that is damaged.
    """
    for path in sorted(run_dir.glob("eval/*-*/summary.json")):
        protocol, _, step = path.parent.name.rpartition("-")
        try:
            summary = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged, not JSON ({error})") from None
        if step.isdigit() and summary.get("avg") is not None and not summary.get("missing"):
            yield Scored(protocol, int(step), summary)
