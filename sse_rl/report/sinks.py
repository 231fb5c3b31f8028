"""Where metrics go: one JSON line a step, TensorBoard, and a few rollouts to read.

All of them can be cut back to a step, so that a resumed run leaves no trace of what it repeats.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from sse_rl.errors import UserError
from sse_rl.types import Group

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"


class Sinks:
    """Writes a run's metrics.jsonl, samples.jsonl and tensorboard/.

    `keep` is the step resumed from: later lines are dropped, and TensorBoard is written anew from
    what stays.
    """

    def __init__(self, run_dir: Path, *, keep: int, samples_per_step: int = 2) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        self._samples_per_step = samples_per_step
        rows = cut(run_dir / METRICS, keep)
        cut(run_dir / SAMPLES, keep)
        shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        self._board = SummaryWriter(str(run_dir / TENSORBOARD))
        for row in rows:
            self._draw(row)
        self._board.flush()

    def log(self, metrics: dict[str, Any], groups: list[Group]) -> None:
        """Append one step; `metrics["step"]` says which. Not-a-number is written as null."""
        row = _plain(metrics)
        _append(self._run_dir / METRICS, [row])
        _append(self._run_dir / SAMPLES, sample_rows(row["step"], groups[: self._samples_per_step]))
        self._draw(row)
        self._board.flush()

    def close(self) -> None:
        self._board.close()

    def _draw(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without a last line that a killed process left unfinished.

    Raises UserError naming the line that is no JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: damaged, not JSON ({error})") from None
        if isinstance(row, dict):
            rows.append(row)
        elif line:
            raise UserError(f"{path}, line {number}: damaged, not a JSON object")
    return rows


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after `step` and return those that stay."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists():
        beside = path.with_name(path.name + ".partial")
        beside.write_bytes(b"".join(map(_line, rows)))
        os.replace(beside, path)
    return rows


def sample_rows(step: int, groups: list[Group]) -> list[dict[str, Any]]:
    """The first answer of each group, as a row to read."""
    return [
        {
            "step": step,
            "group": group.id,
            "problem": group.prompt.id,
            "prompt": group.prompt.text,
            "answer": group.prompt.answer,
            "completion": trajectory.text,
            "reward": trajectory.reward,
            "rewards": trajectory.rewards,
            "statuses": trajectory.statuses,
            "finish_reason": trajectory.finish_reason,
            "tokens": len(trajectory.token_ids),
        }
        for group in groups
        for trajectory in group.trajectories[:1]
    ]


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("ab") as file:
        file.writelines(map(_line, rows))


def _line(row: dict[str, Any]) -> bytes:
    """UTF-8 to be read by people; in ASCII where a lone surrogate has no UTF-8."""
    row = _plain(row)
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
