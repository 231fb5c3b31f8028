"""The weights of a run that scored best, kept apart from the checkpoints that come and go."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sse_rl.errors import UserError
from sse_rl.pipeline.checkpoint import atomic_folder, is_complete

BEST, SCORE = "best", "score.json"


class Best(NamedTuple):
    step: int
    metric: str
    score: float


def offer(
    run_dir: Path, step: int, scores: Mapping[str, float], save: Callable[[Path], Any]
) -> bool:
    """Keep the weights of `step`, written by `save` into the folder that it is given, if the first
    of their `scores` beats what is kept; a tie goes to the earlier step. Whether it did."""
    if not scores:
        return False
    metric, score = next(iter(scores.items()))
    former = kept(run_dir)
    if former is not None and score <= former.score:
        return False
    with atomic_folder(run_dir / BEST) as folder:
        save(folder / "model")
        (folder / SCORE).write_text(json.dumps(Best(step, metric, score)._asdict()))
    return True


def restore(
    run_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    savers: Mapping[int, Callable[[Path], Any]],
) -> None:
    """Offer the weights of steps, as `savers` write them, with their scores in `rows`, the metrics.

    After a resume from before the best these are the weights that are left to choose from.
    """
    scores = {row["step"] - 1: row for row in rows}  # logged with the step after
    for step in sorted(savers):
        found = {k: v for k, v in scores.get(step, {}).items() if k.startswith("eval/")}
        offer(run_dir, step, found, savers[step])


def kept(run_dir: Path) -> Best | None:
    """What is kept, if anything. Raises UserError if its file is damaged."""
    path = run_dir / BEST / SCORE
    if not is_complete(path.parent):
        return None
    try:
        return Best(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove {path.parent}") from None
