"""Every command once, tiny, and the exit code of every kind of failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sse_rl.cli import main
from sse_rl.recipe_io import parse_recipe

RECIPE = """
name: tiny
model:
  config:
    hidden_size: 16
    head_dim: 8
    num_heads: 2
    num_hidden_layers: 2
    num_writer: 1
    num_reader: 1
    intermediate_size: 32
    max_position_embeddings: 512
    attn: {layers: [1], num_heads: 2}
data:
  prompt_template: "{problem}"
  max_prompt_length: 64
  train: {task: chain_sum, size: 200, problem: expression}
  test_limit: 2
sft: {max_steps: 1, max_length: 64, per_device_train_batch_size: 2, gradient_checkpointing: false}
grpo: {max_steps: 1, prompts_per_step: 2, num_generations: 2, max_completion_length: 8}
eval: {num_samples: 2, greedy: false, max_tokens: 8}
rollout: {num_threads: 1}
cluster: {learner_threads: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `sse-rl ...` in this process; (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sse-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        code = exit.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `sse-rl ...` in a process of its own, for what starts a Ray cluster."""
    return subprocess.run(
        [sys.executable, "-m", "sse_rl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['sse-rl', '--help']\n"
        "from sse_rl.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    for name in ("run", "eval", "grade", "compare", "export", "report", "recipe", "doctor"):
        assert f"\n  {name} " in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_dry_run_checks_everything_and_writes_nothing(call, recipe: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    code, out, _ = call("run", recipe, "--runs-dir", runs, "--dry-run", "--set", "grpo.max_steps=7")
    assert code == 0
    assert json.loads(out)["steps"] == 7
    assert not runs.exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_run_then_report_export_eval_and_compare(call, recipe: Path, tmp_path: Path):
    runs, run = tmp_path / "runs", tmp_path / "runs" / "tiny"
    done = command("run", recipe, "--runs-dir", runs, "--address", "local")
    assert done.returncode == 0, done.stderr
    assert '"status": "finished"' in done.stdout
    assert json.loads((run / "summary.json").read_text())["steps"] == 1

    (run / "report.html").unlink()
    assert call("report", run)[:2] == (0, f"{run / 'report.html'}\n")
    assert (run / "report.html").exists()

    exported = tmp_path / "exported"
    assert call("export", run, exported)[:2] == (0, f"{exported}\n")
    assert (exported / "config.json").exists()
    code, _, err = call("export", run, exported)
    assert code == 2 and "exists already" in err

    problems = tmp_path / "two.jsonl"
    rows = [
        {"id": "a", "problem": "1 + 1", "answer": "2"},
        {"id": "b", "problem": "2", "answer": "2"},
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "evals"
    options = ("--samples", 2, "--max-tokens", 4, "--address", "local", "--out", out)
    done = command("eval", exported, "--benchmark", problems, *options, "--fail-under", "0.5")
    assert done.returncode == 1, done.stderr
    assert "two: avg@2 0.0 % (asked again 0.0 to " in done.stdout
    assert "100.0 % of the answers were cut off at 4 tokens" in done.stdout
    assert "None of 4 answers is right." in done.stdout
    assert {path.name for path in (out / "two").iterdir()} >= {
        "results.jsonl",
        "summary.json",
        "report.html",
        "report.md",
    }

    code, shown, _ = call("compare", out / "two", out / "two", "--max-drop", "0")
    assert code == 0 and "two" in shown


def test_grade_counts_each_status_and_writes_the_grades(call, tmp_path: Path):
    file, out = tmp_path / "answers.jsonl", tmp_path / "graded.jsonl"
    rows = [
        {"completion": "\\boxed{2}", "answer": "2"},
        {"completion": "\\boxed{3}", "answer": "2"},
        {"completion": "2", "answer": "2"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown, _ = call("grade", file, "--out", out)
    assert code == 0
    assert shown.splitlines()[0] == "3 answers: 33.3 %"
    assert {line.split()[0] for line in shown.splitlines()[1:]} == {"correct", "wrong", "no_box"}
    assert [json.loads(line)["reward"] for line in out.read_text().splitlines()] == [1.0, 0.0, 0.0]
    assert call("grade", file, "--fail-under", "0.5")[0] == 1


def test_grade_reads_what_others_write(call, tmp_path: Path):
    file, out = tmp_path / "answers.jsonl", tmp_path / "graded.jsonl"
    rows = [
        {"completion": "so\u2028\\boxed{5}", "answer": "5"},
        {"completion": "\\boxed{18}", "answer": 18},
        {"completion": "\\boxed{1}", "answer": ""},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(text, encoding="utf-8-sig")
    code, shown, _ = call("grade", file, "--out", out)
    assert code == 0
    assert shown.splitlines()[0] == "3 answers: 100.0 % of 2, 1 have no good gold"
    assert call("grade", out)[1] == shown
    file.write_text("\n")
    code, _, err = call("grade", file)
    assert code == 2 and "answers.jsonl: no rows" in err


def test_grade_refuses_a_row_without_an_answer(call, tmp_path: Path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"completion": "x", "answer": "1"}\n{"completion": "x"}\n')
    assert call("grade", file) == (
        2,
        "",
        f"sse-rl: {file}, row 2: no text in column 'answer'\n",
    )


def test_recipe_check_show_and_schema(call, recipe: Path):
    assert call("recipe", "check", recipe) == (0, f"{recipe}: ok\n", "")
    code, out, _ = call("recipe", "show", recipe, "--set", "seed=5")
    assert code == 0
    assert parse_recipe(out).seed == 5
    code, out, _ = call("recipe", "schema")
    assert code == 0 and "grpo.learning_rate: float = 1.0e-06\n" in out
    code, out, _ = call("recipe", "schema", "--json")
    assert code == 0 and "grpo" in json.loads(out)["properties"]


def test_doctor_names_versions_and_devices(call):
    code, out, _ = call("doctor")
    assert code in (0, 1)
    for name in ("python", "torch", "ray", "cpu", "gpu", "kernels"):
        assert f"\n{name}" in "\n" + out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "none.yaml: no such recipe"),
        (["recipe", "check", "{recipe}", "--set", "grpo.lerning_rate=1"], "did you mean grpo.l"),
        (
            ["recipe", "check", "{recipe}", "--set", "data.train={path: x.jsonl}"],
            "x.jsonl: no such",
        ),
        (["run", "{recipe}", "--resume", "sometimes"], "--resume sometimes"),
        (["run", "{recipe}", "--dry-run", "--set", "data.max_prompt_length=600"], "context"),
        (["run", "{recipe}", "--dry-run", "--set", "data.tokenizer=./none"], "data.tokenizer"),
        (["report", "none"], "none"),
        (["export", "none", "out"], "none"),
        (["eval", "none", "--benchmark", "x.jsonl"], "none: no model there"),
        (["eval", "org/x", "--benchmark", "x.jsonl"], "sse-rl convert org/x FOLDER"),
        (
            ["recipe", "check", "{recipe}", "--set", "rewards.components=[{name: no/mine.py:f}]"],
            "rewards.components.0.name = no/mine.py: no such file",
        ),
        (["eval", "x.gguf", "--benchmark", "x.jsonl"], "sse-rl convert x.gguf FOLDER"),
        (["compare", "none", "none"], "none"),
        (["grade", "none.jsonl"], "none.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_exit_2(
    call, recipe: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*(argument.replace("{recipe}", str(recipe)) for argument in arguments))
    assert code == 2
    assert err.startswith("sse-rl: ") and message in err and err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["run"], ["run", "x", "--colour", "red"]])
def test_bad_usage_is_exit_2(call, arguments: list[str]):
    assert call(*arguments)[0] == 2


def test_sigterm_is_exit_143():
    script = (
        "import os, signal, sse_rl.cli as cli\n"
        "cli.app.command('wait')(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "import sys; sys.argv = ['sse-rl', 'wait']; cli.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 143
