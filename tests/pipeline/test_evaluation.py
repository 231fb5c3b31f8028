"""Evaluations of a tiny random model on Ray, killed in every way, to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch

from sse_rl.data.tokenizer import byte_tokenizer
from sse_rl.errors import UserError
from sse_rl.evaluation import Checkpoint
from sse_rl.export import export_model
from sse_rl.model import SSEConfig, SSEForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROBLEMS, SAMPLES = 6, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = SSEConfig(
        hidden_size=32,
        head_dim=8,
        num_heads=2,
        num_hidden_layers=2,
        num_writer=1,
        num_reader=1,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        attn={"layers": [1], "num_heads": 2},
        eos_token_id=tokenizer.eos_token_id,
    )
    out = tmp_path_factory.mktemp("model") / "tiny"
    export_model(SSEForCausalLM(config), tokenizer, out)
    return out


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    rows = [
        {"id": str(i), "problem": f"What is {i} + {i}?" + " Hm." * i, "answer": str(2 * i)}
        for i in range(PROBLEMS)
    ]
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def start(model: Path, benchmark: Path, out: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "sse_rl", "eval", model, "--benchmark", benchmark]
    command += ["--samples", SAMPLES, "--max-tokens", 96, "--address", "local", "--out", out]
    command += ["--max-num-seqs", 4, *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def rows(out: Path) -> int:
    path = out / "sums" / "results.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for_rows(out: Path, count: int, process: subprocess.Popen) -> None:
    while rows(out) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(model, benchmark, tmp_path_factory) -> bytes:
    """The results of an evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(model, benchmark, out))
    assert rows(out) == PROBLEMS * SAMPLES
    return (out / "sums" / "results.jsonl").read_bytes()


def test_killed_three_times_with_9_it_resumes_to_the_same_bytes(model, benchmark, whole, tmp_path):
    chance = random.Random(1)
    for _ in range(3):
        process = start(model, benchmark, tmp_path)
        wait_for_rows(tmp_path, rows(tmp_path) + chance.randint(1, 12), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rows(tmp_path) < PROBLEMS * SAMPLES
    finish(start(model, benchmark, tmp_path))
    assert (tmp_path / "sums" / "results.jsonl").read_bytes() == whole


def test_sigterm_keeps_the_answers_and_the_same_command_goes_on(model, benchmark, whole, tmp_path):
    process = start(model, benchmark, tmp_path)
    wait_for_rows(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert f"the same command goes on ({tmp_path})" in output
    assert 3 <= rows(tmp_path) < PROBLEMS * SAMPLES
    finish(start(model, benchmark, tmp_path))
    assert (tmp_path / "sums" / "results.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/a", "a"),
        ("runs/a/export", "a-export"),
        ("runs/a/best/model", "a-best"),
        ("runs/a/checkpoints/step-4", "a-step-4"),
        ("runs/a/checkpoints/step-4/model", "a-step-4"),
        ("other/model", "other-model"),
        ("other", "other"),
    ],
)
def test_models_of_two_runs_have_folders_of_their_own(model, name, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "recipe.yaml").touch()
    assert Checkpoint(str(tmp_path / model)).name == name


def test_a_cluster_that_others_use_is_waited_for_with_a_limit(model):
    @ray.remote(num_cpus=1)
    class Other:
        def ready(self) -> None:
            pass

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        other = Other.remote()
        ray.get(other.ready.remote())
        busy = Checkpoint(str(model), placement_timeout_s=0.5)
        message = "--workers 1 asks for 1 CPUs but 0 were free on the cluster for 0.5 s"
        with pytest.raises(UserError, match=message), busy.open(64):
            pass
    finally:
        ray.shutdown()


@pytest.mark.long
def test_a_killed_worker_of_two_is_replaced_and_changes_nothing(model, benchmark, whole, tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    process = start(model, benchmark, tmp_path, "--workers", 2)
    wait_for_rows(tmp_path, 5, process)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RolloutWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    finish(process)
    assert (tmp_path / "sums" / "results.jsonl").read_bytes() == whole
