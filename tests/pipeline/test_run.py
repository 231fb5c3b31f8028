"""Whole runs through Ray: to the end, through deaths of every kind, and from where they stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def start(runs: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sse_rl", "run", str(HERE / "tiny.yaml")]
    command += ["--runs-dir", str(runs), "--address", "local", *options]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def steps_done(runs: Path) -> int:
    path = runs / "tiny" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def metrics(runs: Path) -> list[dict]:
    rows = [json.loads(line) for line in (runs / "tiny" / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run to compare with."""
    runs = tmp_path_factory.mktemp("whole")
    finish(start(runs))
    return runs


def test_a_run_writes_what_it_promises(whole):
    run = whole / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 8
    assert summary["eval"]["heldout"].keys() >= {"base", "tuned", "gain"}
    assert summary["stage_s"]["eval"] > 0
    assert not any("taught nothing" in text for text in summary["warnings"])
    assert sum(summary["stage_s"].values()) < summary["wall_s"]
    assert [row["step"] for row in metrics(whole)] == list(range(1, 9))
    assert metrics(whole)[-1]["rewards/sse_test_rewards:closeness"] > 0
    for path in (
        "recipe.yaml",
        "samples.jsonl",
        "tensorboard",
        "report.html",
        "checkpoints/step-8",
    ):
        assert (run / path).exists(), path
    assert (run / "eval" / "heldout-0" / "results.jsonl").exists()


def test_engine_and_learner_agree_at_every_step(whole):
    for row in metrics(whole):
        assert row["rollout_logprob_diff_max"] < 1e-5
        assert row["flip_rate"] < 0.01


def test_a_finished_run_is_not_run_again(whole):
    before = (whole / "tiny" / "metrics.jsonl").stat().st_mtime_ns
    finish(start(whole))
    assert (whole / "tiny" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_killed_driver_resumes_to_the_same_digits(whole, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert killed["status"] == "running"
    output = finish(start(tmp_path, "--resume", "auto", "--set", "checkpoint.keep=3"))
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["wall_s"] > killed["wall_s"] > 0
    assert summary["stage_s"]["eval"] > killed["stage_s"]["eval"] > 0
    assert "resumed with checkpoint.keep = 3 (was 2)" in output
    assert metrics(tmp_path) == metrics(whole)
    same = (whole / "tiny" / "samples.jsonl").read_text()
    assert (tmp_path / "tiny" / "samples.jsonl").read_text() == same


def test_a_silent_run_says_so_and_a_resume_from_before_its_best_falls_back_to_the_base(tmp_path):
    settings = {
        "rewards.components": "[{name: accuracy}]",  # what a fresh model never has
        "grpo.max_steps": 10,
        "checkpoint": "{every: 4, best: true, keep: 9}",
        "eval.every": 5,
        "model.dtype": "bfloat16",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    output = finish(start(tmp_path, *options))
    assert "warning: rewards taught nothing in steps 1 to 10" in output
    run = tmp_path / "tiny"
    assert len(json.loads((run / "summary.json").read_text())["warnings"]) == 2
    weights = load_file(run / "best/model/model.safetensors")
    shutil.rmtree(run / "best")  # as if it had been of a later step
    finish(start(tmp_path, *options, "--resume", "4"))
    assert json.loads((run / "best/score.json").read_text())["step"] == 0
    again = load_file(run / "best/model/model.safetensors")
    assert again.keys() == weights.keys()
    assert all(again[k].dtype == w.dtype and again[k].equal(w) for k, w in weights.items())


@pytest.mark.long
def test_a_stopped_run_saves_and_resumes_to_the_same_digits(whole, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    finish(start(tmp_path))
    assert metrics(tmp_path) == metrics(whole)
    both = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert both["stage_s"]["eval"] > summary["stage_s"]["eval"] > 0
    assert summary["resumed_after"] == [] and both["resumed_after"] == [summary["steps"]]


def test_a_killed_rollout_worker_changes_nothing_but_the_time(whole, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 2, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RolloutWorker" in " ".join(child.cmdline()):
            child.kill()
    finish(process)
    assert metrics(tmp_path) == metrics(whole)
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").open()]
    assert rows[-1]["perf/worker_restarts"] == 1


def test_another_recipe_does_not_touch_the_folder(whole):
    process = start(whole, "--set", "grpo.learning_rate=0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "grpo.learning_rate" in output and "Traceback" not in output


@pytest.mark.long
def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    import shutil

    shutil.copytree(whole / "tiny", tmp_path / "tiny")
    summary = tmp_path / "tiny" / "summary.json"
    summary.write_text(summary.read_text().replace("finished", "interrupted"))
    trainer = tmp_path / "tiny" / "checkpoints" / "step-8" / "trainer.pt"
    trainer.write_bytes(trainer.read_bytes()[:-10])
    process = start(tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "trainer.pt" in output and "Traceback" not in output


def test_a_learner_that_dies_ends_the_run_with_one_message(tmp_path):
    process = start(tmp_path, "--set", "grpo.max_steps=100")
    wait_for(lambda: steps_done(tmp_path) >= 1, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "LearnerWorker" in " ".join(child.cmdline()):
            child.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the learner (in a step) died" in output and "Traceback" not in output
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["status"] == "failed" and "the learner" in summary["error"]


def test_a_reward_that_raises_ends_the_run_with_its_name(tmp_path):
    process = start(tmp_path, "--set", "rewards.components.0.name=sse_test_rewards:explodes")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "sse_test_rewards:explodes raised ZeroDivisionError" in output
    assert "Traceback" not in output


def test_a_run_that_collapses_stops_and_exports_its_best(tmp_path):
    options = (
        "grpo.difficulty={num_samples: 2, min_pass_rate: 0, max_pass_rate: 1, limit: 12}",
        "grpo.early_stop={window: 2, min_entropy: 100}",
        "checkpoint.best=true",
        "export.enabled=true",
    )
    output = finish(start(tmp_path, *(word for text in options for word in ("--set", text))))
    run = tmp_path / "tiny"
    assert "stopped after step 2" in output and "difficulty of 12 prompts" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 2
    assert "grpo.early_stop.min_entropy" in summary["stopped_early"]
    assert summary["difficulty"]["prompts"] == 12
    assert summary["eval"]["heldout"].keys() >= {"base", "tuned", "gain"}
    best = json.loads((run / "best" / "score.json").read_text())
    assert best["metric"] == "eval/heldout" and best["step"] in (0, 2)
    assert summary["best"] == best
    same = (run / "best" / "model" / "model.safetensors").read_bytes()
    assert (run / "export" / "model.safetensors").read_bytes() == same
