"""A converted model's run, stopped in every stage, ends in the weights of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def start(runs: Path, source: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sse_rl", "run", str(HERE / "converted.yaml")]
    command += ["--runs-dir", str(runs), "--address", "local"]
    command += ["--set", f"model.convert.source={source}", "--set", f"data.tokenizer={source}"]
    return subprocess.Popen(
        command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output


def stop(process: subprocess.Popen[str], log: Path, rows: int, number: signal.Signals) -> None:
    """Sends the signal once `log` has so many rows, a new one among them, and waits for the end."""
    rows = max(rows, 1 + written(log))
    while written(log) < rows:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == (143 if number is signal.SIGTERM else -number), output


def written(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def learned(run: Path) -> dict[str, str]:
    """A digest of the weights that each stage left."""
    stages = ("init", "distill", "sft", "export")
    return {
        stage: hashlib.sha256((run / stage / "model.safetensors").read_bytes()).hexdigest()
        for stage in stages
    }


def steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_a_run_stopped_in_every_stage_ends_in_the_same_weights(source: str, tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start(whole, source))
    run = stopped / "converted"
    stop(start(stopped, source), run / "distill.jsonl", 5, signal.SIGTERM)
    stop(start(stopped, source), run / "distill.jsonl", 17, signal.SIGKILL)
    stop(start(stopped, source), run / "sft.jsonl", 9, signal.SIGTERM)
    stop(start(stopped, source), run / "sft.jsonl", 15, signal.SIGKILL)
    stop(start(stopped, source), run / "metrics.jsonl", 2, signal.SIGTERM)
    finish(start(stopped, source))
    assert learned(run) == learned(whole / "converted")
    for log in ("distill.jsonl", "sft.jsonl", "metrics.jsonl"):
        assert steps(run / log) == steps(whole / "converted" / log), log
