"""The best weights of a run are kept, whatever comes after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sse_rl.errors import UserError
from sse_rl.pipeline.best import BEST, SCORE, Best, kept, offer, restore
from sse_rl.pipeline.folder import cut_back


def save(name: str):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(name)

    return write


def test_only_a_higher_score_replaces_what_is_kept(tmp_path: Path):
    assert kept(tmp_path) is None
    assert offer(tmp_path, 0, {"eval/a": 0.3, "eval/b": 0.9}, save("base"))
    assert not offer(tmp_path, 5, {"eval/a": 0.3, "eval/b": 1.0}, save("tie"))
    assert not offer(tmp_path, 6, {}, save("not evaluated"))
    assert offer(tmp_path, 10, {"eval/a": 0.5}, save("better"))
    assert not offer(tmp_path, 15, {"eval/a": 0.4}, save("worse"))
    assert kept(tmp_path) == Best(10, "eval/a", 0.5)
    assert (tmp_path / BEST / "model" / "weights").read_text() == "better"


def test_a_resume_from_before_the_best_forgets_it(tmp_path: Path):
    offer(tmp_path, 10, {"eval/a": 0.5}, save("better"))
    cut_back(tmp_path, 10, max_steps=20)
    assert kept(tmp_path) is not None
    cut_back(tmp_path, 9, max_steps=20)
    assert kept(tmp_path) is None


def test_a_resume_from_before_the_best_chooses_among_what_is_left(tmp_path: Path):
    savers = {step: save(f"of step {step}") for step in (0, 6, 9)}
    scored = {1: 0.3, 4: 0.8, 7: 0.4}  # those of step 3 were not kept, step 9 was not evaluated
    rows = [{"step": n, "reward": 1.0} for n in range(1, 10)]
    for n, score in scored.items():
        rows[n - 1]["eval/a"] = score
    restore(tmp_path, rows, savers)
    assert kept(tmp_path) == Best(6, "eval/a", 0.4)
    assert (tmp_path / BEST / "model" / "weights").read_text() == "of step 6"


def test_a_damaged_score_is_named(tmp_path: Path):
    offer(tmp_path, 10, {"eval/a": 0.5}, save("better"))
    (tmp_path / BEST / SCORE).write_text("{")
    with pytest.raises(UserError, match=r"score\.json: damaged"):
        kept(tmp_path)
