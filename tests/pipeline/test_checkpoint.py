from pathlib import Path

import pytest

from sse_rl.errors import UserError
from sse_rl.pipeline.checkpoint import (
    atomic_folder,
    is_complete,
    prune,
    saved_steps,
    step_folder,
    verify,
)


def write(run_dir: Path, step: int) -> Path:
    target = step_folder(run_dir, step)
    with atomic_folder(target) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(bytes(range(200)))
        (folder / "cursor").write_text("17")
    return target


def test_a_folder_appears_whole(tmp_path):
    folder = write(tmp_path, 10)
    verify(folder)
    assert saved_steps(tmp_path) == [10]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_half_written_folder_is_skipped_and_written_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(step_folder(tmp_path, 20)) as folder:
        (folder / "cursor").write_text("half")
        raise KeyboardInterrupt
    assert saved_steps(tmp_path) == []
    verify(write(tmp_path, 20))


def test_a_folder_without_manifest_does_not_count(tmp_path):
    folder = write(tmp_path, 5)
    (folder / "manifest.json").unlink()
    assert not is_complete(folder)
    assert saved_steps(tmp_path) == []


def test_a_damaged_file_is_refused_by_name(tmp_path):
    folder = write(tmp_path, 5)
    path = folder / "model" / "weights"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="model/weights: its checksum"):
        verify(folder)


def test_a_missing_file_is_refused_by_name(tmp_path):
    folder = write(tmp_path, 5)
    (folder / "cursor").unlink()
    with pytest.raises(UserError, match="cursor: listed in"):
        verify(folder)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (2, 10, 4):
        write(tmp_path, step)
    prune(tmp_path, keep=2)
    assert saved_steps(tmp_path) == [4, 10]
