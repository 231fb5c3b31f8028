"""Evaluations beside the training: the same scores, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
BESIDE = ("eval.num_workers=1", "rollout.num_cpus_per_worker=0.5")
STEPS = (0, 2, 4, 6, 8)


def start(runs: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sse_rl", "run", str(HERE / "tiny.yaml")]
    command += ["--runs-dir", str(runs), "--address", "local"]
    for option in ("eval.every=2", "eval.max_tokens=48", "data.test_limit=30", *options):
        command += ["--set", option]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def metrics(runs: Path) -> list[dict]:
    path = runs / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def learned(runs: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("perf/", "eval/"))}
        for row in metrics(runs)
    ]


def answers(runs: Path) -> dict[int, bytes]:
    folder = runs / "tiny" / "eval"
    return {step: (folder / f"heldout-{step}" / "results.jsonl").read_bytes() for step in STEPS}


@pytest.fixture(scope="module")
def between(tmp_path_factory) -> Path:
    """A run that evaluates between its steps, to compare with."""
    runs = tmp_path_factory.mktemp("between")
    finish(start(runs))
    return runs


def test_beside_the_training_the_same_evaluations_are_made(between, tmp_path):
    finish(start(tmp_path, *BESIDE))
    assert answers(tmp_path) == answers(between)
    assert learned(tmp_path) == learned(between)
    scores = {
        row["step"] - 1: row["eval/heldout"] for row in metrics(between) if "eval/heldout" in row
    }
    for row in metrics(tmp_path):
        if "eval/step" in row:
            assert row["eval/heldout"] == scores[row["eval/step"]]
            assert row["eval/step"] < row["step"]
    assert not list((tmp_path / "tiny" / "eval").glob("weights-*"))


def test_a_run_killed_in_mid_evaluation_resumes_to_the_same_answers(between, tmp_path):
    first = tmp_path / "tiny" / "eval" / "heldout-0" / "results.jsonl"
    process = start(tmp_path, *BESIDE)
    while not (first.exists() and metrics(tmp_path)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(start(tmp_path, *BESIDE))
    assert answers(tmp_path) == answers(between)
    assert learned(tmp_path) == learned(between)


def test_a_killed_evaluation_worker_changes_nothing_but_the_time(between, tmp_path):
    process = start(tmp_path, *BESIDE)
    while not metrics(tmp_path):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RolloutWorker" in " ".join(child.cmdline()):
            child.kill()  # those of the training and of the evaluation alike
    finish(process)
    assert answers(tmp_path) == answers(between)
    assert learned(tmp_path) == learned(between)
