"""A run's folder: nothing in it is overwritten that another run, or the same one, still needs."""

import re
from pathlib import Path

import pytest

from sse_rl.errors import UserError
from sse_rl.pipeline.checkpoint import atomic_folder, saved_steps, step_folder
from sse_rl.pipeline.folder import (
    RECIPE,
    SUMMARY,
    changed,
    check_folder,
    claim,
    cut_back,
    start_step,
)
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import load_recipe


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(Path(__file__).parent / "tiny.yaml")


def checkpoint(run_dir: Path, step: int) -> Path:
    with atomic_folder(step_folder(run_dir, step)) as folder:
        (folder / "trainer.pt").write_bytes(b"x" * 100)
    return step_folder(run_dir, step)


def test_a_folder_that_is_no_run_is_refused(tmp_path, recipe):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no run's folder"):
        check_folder(tmp_path, recipe, "auto")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "notes.txt", recipe, "auto")


def test_another_recipe_is_named_by_its_first_difference(tmp_path, recipe):
    with claim(tmp_path / "run", recipe):
        pass
    other = load_recipe(Path(__file__).parent / "tiny.yaml", ["grpo.learning_rate=0.5"])
    with pytest.raises(UserError, match=r"grpo\.learning_rate"):
        check_folder(tmp_path / "run", other, "auto")
    with pytest.raises(UserError, match="exists already"):
        check_folder(tmp_path / "run", recipe, "never")
    assert check_folder(tmp_path / "run", recipe, "auto") is None


def test_a_resume_may_change_how_the_work_is_done_but_not_what(tmp_path, recipe):
    def other(*overrides: str) -> Recipe:
        return load_recipe(Path(__file__).parent / "tiny.yaml", overrides)

    run = tmp_path / "run"
    with claim(run, recipe):
        pass
    overrides = (
        "cluster.learner_timeout_s=100",
        "checkpoint.keep=5",
        "checkpoint.every=1",
        "rollout.timeout_s=5",
        "rollout.max_restarts=0",
        "rewards.num_workers=2",
        "grpo.max_tokens_per_micro_batch=512",
    )
    assert check_folder(run, other(*overrides), "auto") is None
    told = changed(run, other(*overrides))
    assert len(told) == len(overrides) and changed(run, recipe) == changed(tmp_path, recipe) == []
    assert "cluster.learner_timeout_s = 100.0 (was 1800.0)" in told
    assert "grpo.max_tokens_per_micro_batch = 512 (was 16384)" in told
    refused = [
        "rollout.num_workers=2",
        "checkpoint.best=true",
        "rewards.time_limit_s=9",
        "eval.num_workers=1",
        "export.enabled=true",
        "sft={max_steps: 1}",
    ]
    for override in refused:
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=rf"first difference: {re.escape(key)} = .* \(was"):
            check_folder(run, other("cluster.learner_timeout_s=100", override), "auto")
    with claim(run, other("eval.num_workers=1")):
        pass
    assert check_folder(run, other("eval.num_workers=2"), "auto") is None


def test_a_damaged_summary_is_named(tmp_path, recipe):
    with claim(tmp_path, recipe):
        (tmp_path / SUMMARY).write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        check_folder(tmp_path, recipe, "auto")


def test_two_processes_cannot_run_in_one_folder(tmp_path, recipe):
    with (
        claim(tmp_path, recipe),
        pytest.raises(UserError, match="another process"),
        claim(tmp_path, recipe),
    ):
        pass
    with claim(tmp_path, recipe):
        assert (tmp_path / RECIPE).exists()


def test_a_wrong_or_damaged_checkpoint_is_refused_before_anything_starts(tmp_path):
    folder = checkpoint(tmp_path, 3)
    assert start_step(tmp_path, "auto") == start_step(tmp_path, "3") == 3
    assert start_step(tmp_path, "0") == 0
    with pytest.raises(UserError, match=r"--resume 7: no such checkpoint.*steps 3"):
        start_step(tmp_path, "7")
    (folder / "trainer.pt").write_bytes(b"y" * 100)
    with pytest.raises(UserError, match=r"trainer\.pt: its checksum"):
        start_step(tmp_path, "auto")


def test_going_on_from_an_earlier_step_removes_what_later_ones_left(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step)
        (tmp_path / "eval" / f"heldout-{step}").mkdir(parents=True)
    (tmp_path / "export").mkdir()
    cut_back(tmp_path, 2, max_steps=4)
    assert saved_steps(tmp_path) == [2]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["heldout-2"]
    assert not (tmp_path / "export").exists()
    (tmp_path / "export").mkdir()
    cut_back(tmp_path, 4, max_steps=4)
    assert (tmp_path / "export").exists()
