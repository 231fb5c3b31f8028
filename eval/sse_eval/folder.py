"""An evaluation's folder: what is written, when it is safe, and what a resume may rely on.

It knows rows (JSON objects with `id` and `sample`), not what is in them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SYNC_S = 1.0


class EvaluationError(Exception):
    """An evaluation that cannot start or go on; the message says what to do."""


@contextmanager
def open_folder(path: Path, config: Mapping[str, Any]) -> Iterator[Folder]:
    """Create or resume the folder of an evaluation, held alone for as long as it is open.

    Raises EvaluationError if another process has it open, if it holds results of another
    configuration (showing the difference), or if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise EvaluationError(f"cannot use {path} as an evaluation's folder: {error}") from error
    try:
        _lock(lock, path)
        _settle_config(path, config)
        folder = Folder(path)
        try:
            yield folder
        finally:
            folder.close()
    finally:
        os.close(lock)


def check_config(folder: Path, config: Mapping[str, Any], *, unknown: Collection[str] = ()) -> bool:
    """Whether config.json of `folder` says `config` already; writes nothing.

    unknown: dotted keys that `config` cannot tell yet, of which any value is right.

    Raises EvaluationError if there are results of another configuration (showing the difference),
    or files that cannot be read.
    """
    path = folder / "config.json"
    try:
        there = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (folder / "results.jsonl").exists():
            raise EvaluationError(f"{folder} has results.jsonl but no config.json") from error
        return False
    except OSError as error:
        raise EvaluationError(f"cannot use {folder} as an evaluation's folder: {error}") from error
    except ValueError as error:
        raise EvaluationError(f"{path} is no JSON: {error}") from error
    found = differences(there, json.loads(json.dumps(config)))
    changes = [change for change in found if change.partition(":")[0] not in unknown]
    if changes and read_rows(folder / "results.jsonl"):
        raise EvaluationError(
            f"{folder} holds results of another configuration (there -> now):\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nGive the old values to go on with it, or another folder to start anew."
        )
    return not changes


class Folder:
    """Rows already there, and a way to add more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, end = _read_log(path / "results.jsonl")
        self._results = _Log(path / "results.jsonl", end)
        self._timings = _Log(path / "timings.jsonl", _read_log(path / "timings.jsonl")[1])

    def add(self, row: Row, timing: Row) -> None:
        """Append a row; no kill of this process loses it, and no power cut one older than `SYNC_S`
        seconds when the next is added.

        Raises EvaluationError if the disk refuses; rows added before stay whole.
        """
        self._timings.append(timing)
        self._results.append(row)
        self.rows.append(row)

    def note(self, timing: Row) -> None:
        """Append a line to timings.jsonl alone."""
        self._timings.append(timing)

    def finish(self) -> None:
        """Rewrite results.jsonl sorted by (id, sample): the same bytes in any order of arrival."""
        self.rows = sorted(self.rows, key=lambda row: (row["id"], row["sample"]))
        self._results.close()
        write_rows(self.path / "results.jsonl", self.rows)

    def close(self) -> None:
        self._results.close()
        self._timings.close()


class _Log:
    """A JSON lines file that only grows, by whole lines."""

    def __init__(self, path: Path, end: int) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if os.fstat(self._fd).st_size > end:  # a last line that a kill cut short
                os.ftruncate(self._fd, end)
        except OSError as error:
            raise EvaluationError(f"cannot write {path}: {error}") from error
        self._end = end
        self._synced = -math.inf

    def append(self, row: Row) -> None:
        line = encode(row)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except OSError as error:
            self._cut_back()
            raise EvaluationError(
                f"cannot write {self.path}: {error}. All samples before this one are safe; "
                "make room and run the same command again to go on."
            ) from error
        self._end += len(line)

    def _cut_back(self) -> None:
        with suppress(OSError):  # the next start cuts the partial line
            os.ftruncate(self._fd, self._end)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an evaluation's folder; EvaluationError if it is none."""
    try:
        return json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} is no evaluation's folder: {error}") from error


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a JSON lines file; [] if there is none.

    Raises EvaluationError for a line that is no row, except the last, which a kill may have cut.
    """
    return _read_log(path)[0]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace a JSON lines file in one step: readers see the old one or the new one."""
    replace(path, b"".join(encode(row) for row in rows))


def replace(path: Path, content: bytes) -> None:
    """Write a file beside `path`, flush it to disk and rename it over `path`."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise EvaluationError(f"cannot write {path}: {error}. Nothing was lost.") from error


def encode(row: Row) -> bytes:
    """One line; ASCII, so that a lone surrogate in an answer survives the trip."""
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _read_log(path: Path) -> tuple[list[Row], int]:
    """Rows, and the bytes they take."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    rows: list[Row] = []
    end = 0
    *lines, partial = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) and not partial:
                break
            raise EvaluationError(f"{path}, line {number}: not a row ({error})") from error
        rows.append(row)
        end += len(line) + 1
    return rows, end


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EvaluationError(f"another process is evaluating into {path}") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise  # some network file systems have no locks: two writers are then the user's care


def _settle_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the configuration of a folder without results, or hold a resumed one to its own."""
    if not check_config(folder, config):
        replace(folder / "config.json", json.dumps(config, indent=1).encode() + b"\n")


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """What differs between two configurations, a line for each dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            yield from differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
