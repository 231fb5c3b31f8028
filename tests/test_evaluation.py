"""`sse-rl eval --endpoint`, `regrade` and `compare`, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from sse_eval import SampleOutput, SampleRequest, evaluate
from sse_eval.types import Message

from sse_rl.cli import main
from sse_rl.data.tokenizer import byte_tokenizer
from sse_rl.evaluation import (
    Checkpoint,
    Evaluation,
    Protocol,
    evaluation_folders,
    evaluations_in,
)
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.pipeline.evaluate import Prompter


class Answers(BaseHTTPRequestHandler):
    """Serves a model `tiny` of 4,096 tokens that answers 2 to everything."""

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "tiny", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"message": {"content": r"\boxed{2}"}, "finish_reason": "stop"}
        self.reply({"choices": [choice], "usage": {"completion_tokens": 5}})

    def reply(self, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class FakeAnswers:
    """A model on no cluster, by its template alone, that answers 2."""

    render: Callable[[Sequence[Message]], str]
    max_context: int | None = None

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[SampleOutput]:
        for request in requests:
            prompt = self.render(request.messages)
            yield SampleOutput(request.id, request.sample, r"\boxed{2}", 5, "stop", prompt)


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"id": str(i), "problem": f"{i} + {i}", "answer": str(2 * i)} for i in (1, 2)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sse-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err  # type: ignore[return-value]

    return run


def test_a_served_model_is_measured_logged_regraded_and_compared(call, url, sums, tmp_path):
    asked = ("--endpoint", url, "--benchmark", sums, "--samples", 2, "--max-tokens", 64)
    out = tmp_path / "evals"
    code, shown, err = call("eval", *asked, "--out", out, "--logs", "lm-eval,lighteval")
    assert code == 0, err
    score, *warnings, report = shown.splitlines()[-2:]
    assert score.startswith("sums: avg@2 50.0 % (asked again ") and not warnings
    assert report == f"  {out / 'sums' / 'report.md'}"
    names = {path.name for path in (out / "sums").iterdir()}
    assert names >= {"report.html", "samples_sums.jsonl", "details_sums.parquet"}
    assert call("eval", *asked, "--out", out, "--fail-under", "0.6")[0] == 1

    results = out / "sums" / "results.jsonl"
    before = results.read_bytes()
    results.write_bytes(before.replace(b'"reward": 1.0', b'"reward": 0.0'))
    code, shown, _ = call("regrade", out, "--fail-under", "0.5")
    assert code == 0 and shown.splitlines() == [score, report]
    assert results.read_bytes() == before

    code, shown, _ = call("compare", out, out / "sums", "--max-drop", "0")
    assert code == 0 and "+0.0 points" in shown


def test_a_regraded_run_has_its_new_scores_in_its_summary(call, url, sums, tmp_path):
    run = tmp_path / "mine"
    asked = ("--endpoint", url, "--benchmark", sums, "--samples", 2, "--max-tokens", 64)
    assert call("eval", *asked, "--out", tmp_path / "evals")[0] == 0
    recipe = (Path(__file__).parents[1] / "recipes/quickstart.yaml").read_text()
    steps = yaml.safe_load(recipe)["grpo"]["max_steps"]
    for step in (0, steps):
        shutil.copytree(tmp_path / "evals" / "sums", run / "eval" / f"sums-{step}")
    (run / "recipe.yaml").write_text(recipe)
    (run / "metrics.jsonl").write_text(f'{{"step": {steps}}}\n')
    (run / "summary.json").write_text('{"status": "finished", "eval": {"sums": {"base": 0.1}}}')
    assert call("regrade", run)[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["eval"]["sums"]["base"] == summary["eval"]["sums"]["tuned"] == 0.5
    assert "50.0 %" in (run / "report.html").read_text()

    (run / "recipe.yaml").write_text(recipe + "gone: 1\n")  # of another version
    code, shown, err = call("regrade", run, "--fail-under", "0.6")
    assert code == 1 and "avg@2 50.0 %" in shown and "gone" in err


def test_another_prompt_than_that_of_training_is_remarked(sums, tmp_path):
    run = tmp_path / "mine"
    for folder in (run / "export", tmp_path / "other"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "sse"}')
    shutil.copy(Path(__file__).parents[1] / "recipes/quickstart.yaml", run / "recipe.yaml")

    def remarks(model: Path, prompt: str) -> list[str]:
        protocol = Protocol((str(sums),), 1, 1.0, 1.0, 8, prompt=prompt)
        return Evaluation(Checkpoint(str(model)), protocol).remarks()

    (remark,) = remarks(run / "export", "default")
    assert remark.startswith("mine-export was trained with the prompt '{problem}' and is asked")
    assert remark.endswith("--prompt '{problem}' asks as in training")
    assert remarks(run / "export", "{problem}") == remarks(tmp_path / "other", "default") == []


def test_sigterm_while_a_server_answers_is_exit_143_and_told(
    call, url, sums, tmp_path, monkeypatch
):
    def told_to_stop(self: Answers) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Answers, "do_POST", told_to_stop)
    former = signal.getsignal(signal.SIGTERM)
    asked = ("--benchmark", sums, "--samples", 1, "--max-tokens", 64, "--out", tmp_path / "evals")
    try:
        code, shown, _ = call("eval", "--endpoint", url, *asked, "--workers", 1)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert code == 143 and f"the same command goes on ({tmp_path / 'evals'})" in shown


def test_the_prompt_is_chosen_and_recorded(call, url, sums, tmp_path):
    aime = sums.rename(tmp_path / "aime24.jsonl")
    asked = ("eval", "--endpoint", url, "--benchmark", aime, "--max-tokens", 64, "--dry-run")
    for prompt, text in {
        "default": "1 + 1\nPlease reason step by step, and put",
        "matharena": "between 0 and 999 inclusive.\n\n1 + 1",
        "Solve {problem}.": "Solve 1 + 1.",
    }.items():
        code, shown, _ = call(*asked, "--prompt", prompt)
        (plan,) = json.loads(shown)
        assert code == 0 and text in json.loads(plan["prompt"])[0]["content"]
        assert plan["samples"] == 64 and not Path(plan["out"]).exists()
    assert "{problem}" in call(*asked, "--prompt", "Solve it.")[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random one with a context of 256 tokens."""
    tokenizer = byte_tokenizer()
    config = SSEConfig(
        hidden_size=16,
        head_dim=8,
        num_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        attn=None,
    )
    torch.manual_seed(0)
    SSEForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_context_shorter_than_the_answers_is_refused_before_anything_starts(
    call, url, model, sums, tmp_path
):
    out = tmp_path / "evals"
    options = ("--benchmark", sums, "--max-tokens", 250, "--out", out)
    code, _, err = call("eval", model, *options)
    assert code == 2 and "context" in err and "256 tokens" in err and "at most" in err
    code, _, err = call("eval", "--endpoint", url, *options[:2], "--max-tokens", 5000)
    assert code == 2 and "4096 tokens" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--endpoint URL"),
        (["model", "--endpoint", "http://x"], "--endpoint URL"),
        (["model", "--model", "tiny"], "--model tiny"),
        (["none", "--logs", "csv"], "log format 'csv'"),
        (["--endpoint", "http://x", "--dtype", "float32"], "--dtype float32: the server"),
        (["model", "--dtype", "bf16"], "--dtype bf16: one of auto, float32"),
        (["--endpoint", "localhost"], "http://"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_message(call, sums, arguments, message):
    code, out, err = call("eval", *arguments, "--benchmark", sums)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("benchmark", [(), ("--benchmark", ""), ("--benchmark", " , ")])
def test_no_benchmark_is_one_message_that_lists_some(call, url, benchmark):
    code, out, err = call("eval", "--endpoint", url, *benchmark, "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--benchmark: give one or more of aime24, " in err and "FILE.jsonl" in err


def test_a_wrong_model_is_told_before_benchmarks_are_fetched(call, monkeypatch):
    monkeypatch.setattr("sse_rl.evaluation.load_benchmark", None)
    code, _, err = call("eval", "nowhere", "--benchmark", "aime24")
    assert code == 2 and err.startswith("sse-rl: nowhere: no model there")


def test_the_folder_of_another_evaluation_is_found_before_anything_starts(
    call, url, model, sums, tmp_path
):
    other = tmp_path / "other.jsonl"
    other.write_bytes(sums.read_bytes())
    out = tmp_path / "evals"
    asked = ("--endpoint", url, "--samples", 1, "--out", out, "--benchmark")
    assert call("eval", *asked, other, "--max-tokens", 64)[0] == 0
    both = f"{sums},{other}"
    for dry in ((), ("--dry-run",)):
        code, _, err = call("eval", *asked, both, "--max-tokens", 65, *dry)
        assert code == 2 and f"{out / 'other'} holds results of another configuration" in err
        assert "sampling.max_tokens: 64 -> 65" in err
    changed = ("--samples", 1, "--max-tokens", 64, "--out", out, "--no-chat-template")
    code, _, err = call("eval", model, "--benchmark", both, *changed)
    assert code == 2 and "model.endpoint" in err and "weights_crc32" not in err
    assert not (out / "sums").exists()
    assert call("eval", *asked, both, "--max-tokens", 64)[0] == 0


def test_weights_that_are_not_loaded_yet_do_not_make_a_folder_anothers(call, model, sums, tmp_path):
    answers = FakeAnswers(Prompter(byte_tokenizer()).render)
    weights = {"name": "tiny", "weights_crc32": "0"}
    evaluate(sums, answers, tmp_path / "evals" / "sums", max_tokens=64, model=weights)
    asked = ("eval", model, "--benchmark", sums, "--max-tokens", 64, "--out", tmp_path / "evals")
    assert call(*asked, "--dry-run")[0] == 0
    assert call(*asked, "--dry-run", "--seed", 1)[0] == 2


def test_a_softmax_model_is_told_how_it_is_converted(call, sums, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = call("eval", tmp_path, "--benchmark", sums)
    assert code == 2 and f"sse-rl convert {tmp_path} FOLDER --attention-layers all" in err


def test_the_last_evaluations_of_a_run_stand_for_it(tmp_path: Path):
    for name in ("heldout-0", "heldout-20", "heldout_greedy-20", "sums-4", "weights-20"):
        folder = tmp_path / "run" / "eval" / name
        folder.mkdir(parents=True)
        if name != "weights-20":
            (folder / "config.json").write_text("{}")
            (folder / "results.jsonl").write_text("")
    found = evaluations_in(tmp_path / "run")
    assert {name: path.name for name, path in found.items()} == {
        "heldout": "heldout-20",
        "heldout_greedy": "heldout_greedy-20",
        "sums": "sums-4",
    }
    every = [path.name for path in evaluation_folders(tmp_path / "run")]
    assert every == ["heldout-0", "heldout-20", "heldout_greedy-20", "sums-4"]
