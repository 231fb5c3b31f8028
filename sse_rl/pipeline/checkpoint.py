"""Folders that are either whole or not there: written beside, fsynced, renamed, checked on reading.

A folder counts only with its `manifest.json`, which holds the sha256 of every other file. What a
killed process leaves behind ends in `.partial` and is removed when the folder is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sse_rl.errors import UserError

MANIFEST = "manifest.json"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; a clean exit makes it `target`, in place of a former one."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(partial)): _sha256(path) for path in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in [*files, partial / MANIFEST, *folders, partial]:
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _fsync(target.parent)


def is_complete(folder: Path) -> bool:
    """Whether `folder` was written to its end; says nothing of damage since."""
    return (folder / MANIFEST).is_file()


def verify(folder: Path) -> None:
    """Raises UserError naming the first file that is missing or not the one that was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}, so this checkpoint was never finished") from None
    except ValueError:
        raise UserError(
            f"{folder / MANIFEST}: damaged, not JSON. Resume from an earlier checkpoint with "
            "--resume STEP"
        ) from None
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: listed in {MANIFEST} but missing; the checkpoint is damaged")
        if _sha256(path) != digest:
            raise UserError(
                f"{path}: its checksum is not the one in {MANIFEST}; the checkpoint is damaged. "
                "Resume from an earlier one with --resume STEP"
            )


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; half-written ones are skipped."""
    found = (run_dir / "checkpoints").glob("step-*")
    named = ((path, re.fullmatch(r"step-(\d+)", path.name)) for path in found)
    return sorted(int(match[1]) for path, match in named if match and is_complete(path))


def prune(run_dir: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for step in saved_steps(run_dir)[:-keep]:
        shutil.rmtree(step_folder(run_dir, step))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
