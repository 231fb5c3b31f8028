"""A run's folder: whose it is, who writes into it, and what a resume may keep of it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sse_rl.errors import UserError
from sse_rl.pipeline.best import BEST, kept
from sse_rl.pipeline.checkpoint import saved_steps, step_folder, verify
from sse_rl.pipeline.overlap import discard_after
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import Difference, differences, load_recipe, resolve
from sse_rl.yaml12 import write

RECIPE, SUMMARY, EVAL, EXPORT = "recipe.yaml", "summary.json", "eval", "export"
RESUMABLE = (
    "cluster.",
    "checkpoint.every",
    "checkpoint.keep",
    "rollout.timeout_s",
    "rollout.max_restarts",
    "rewards.num_workers",
    "grpo.max_tokens_per_micro_batch",
)
"""Keys, and beginnings of keys, that say how the work is done and not what is computed."""


def check_folder(run_dir: Path, recipe: Recipe, resume: str) -> dict[str, Any] | None:
    """The summary of a finished run of the same recipe, None if there is something to do.

    Raises UserError rather than touch a folder that holds another run: one whose recipe differs in
    more than what a resume may change (`changed`).
    """
    if resume not in ("auto", "never") and not resume.isdecimal():
        raise UserError(f"--resume {resume}: expected auto, never or the step of a checkpoint")
    if not (run_dir / RECIPE).exists():
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"{run_dir}: is a file, not a run's folder; choose another name")
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UserError(f"{run_dir}: exists and is no run's folder; choose another name")
        if resume not in ("auto", "never"):
            raise UserError(f"--resume {resume}: there is no run in {run_dir}")
        return None
    if resume == "never":
        raise UserError(f"{run_dir}: this run exists already; change `name` or resume it")
    before = load_recipe(run_dir / RECIPE)
    for difference in differences(before, recipe):
        if not _may_change(difference):
            raise UserError(
                f"{run_dir}: holds a run of another recipe; first difference: {_shown(difference)}."
                " Change `name`, or remove the folder"
            )
    summary = read_summary(run_dir)
    return summary if resume == "auto" and summary.get("status") == "finished" else None


def changed(run_dir: Path, recipe: Recipe) -> list[str]:
    """What `recipe` changes of the run that the folder holds, as `key = value (was value)`."""
    if not (run_dir / RECIPE).exists():
        return []
    return [_shown(difference) for difference in differences(load_recipe(run_dir / RECIPE), recipe)]


def _may_change(difference: Difference) -> bool:
    if difference.key == "eval.num_workers":  # 0 evaluates elsewhere, and leaves what has begun
        return bool(difference.a and difference.b)
    return difference.key.startswith(RESUMABLE)


def _shown(difference: Difference) -> str:
    texts = (write(value, one_line=True) for value in (difference.b, difference.a))
    value, before = (text if len(text) <= 60 else text[:57] + "..." for text in texts)
    return f"{difference.key} = {value} (was {before})"


def start_step(run_dir: Path, resume: str) -> int:
    """The step to go on from: 0 without a checkpoint.

    Raises UserError if there is no such checkpoint, or if it is damaged.
    """
    steps = saved_steps(run_dir)
    step = (steps[-1] if steps else 0) if resume in ("auto", "never") else int(resume)
    if step and step not in steps:
        has = f"has checkpoints of steps {', '.join(map(str, steps))}" if steps else "has none"
        raise UserError(f"--resume {resume}: no such checkpoint, {run_dir} {has}")
    if step:
        verify(step_folder(run_dir, step))
    return step


@contextmanager
def claim(run_dir: Path, recipe: Recipe) -> Iterator[None]:
    """Create the folder and hold it alone.

    Raises UserError if it cannot be written, or if another process runs there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be used as a run's folder: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process runs there") from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            write_whole(run_dir / RECIPE, resolve(recipe))
        except OSError as error:
            raise UserError(f"{run_dir}: cannot be written: {error.strerror}") from None
        yield
    finally:
        os.close(descriptor)


def cut_back(run_dir: Path, step: int, *, max_steps: int) -> None:
    """Remove what later steps left: their checkpoints and evaluations, the best weights if they are
    among them, and the export of the last.

    They will be made again, of other weights where the hardware does not repeat itself.
    """
    discard_after(run_dir, step)
    for later in saved_steps(run_dir):
        if later > step:
            shutil.rmtree(step_folder(run_dir, later))
    best = kept(run_dir)
    if best is not None and best.step > step:
        shutil.rmtree(run_dir / BEST)
    if step < max_steps:
        shutil.rmtree(run_dir / EXPORT, ignore_errors=True)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, {} without one. Raises UserError if it is damaged."""
    path = run_dir / SUMMARY
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it over: readers see the old one or the new one."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
