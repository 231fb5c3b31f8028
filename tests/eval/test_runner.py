import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sse_eval import (
    Benchmark,
    EvaluationError,
    SampleOutput,
    evaluate,
    load_benchmark,
    regrade,
    sample_seed,
    summarize,
)
from sse_eval.folder import read_rows, write_rows
from sse_rewards import RewardPool

SETTINGS = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 3}


@pytest.fixture
def finished(tmp_path, problems, golds, fake_model, pool) -> Path:
    evaluate(problems, fake_model(golds), tmp_path / "whole", pool=pool, **SETTINGS)
    return tmp_path / "whole"


def test_an_evaluation_leaves_the_folder_of_the_contract(finished: Path, problems: Benchmark):
    names = {"results.jsonl", "summary.json", "report.html", "report.md", "timings.jsonl"}
    assert names <= {file.name for file in finished.iterdir()}
    rows = read_rows(finished / "results.jsonl")
    assert [(r["id"], r["sample"]) for r in rows] == sorted(
        (problem.id, sample) for problem in problems.problems for sample in range(4)
    )
    keys = {"id", "sample", "seed", "completion", "extracted", "reward", "status", "tokens"}
    assert keys <= rows[0].keys()
    assert rows[0]["prompt"].startswith("<|user|>Find $x_")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["avg"] == sum(r["reward"] for r in rows) / len(rows)
    assert summary["missing"] == 0 and summary["pass_at"].keys() == {"1", "2", "4"}
    assert summary["exams"].keys() == {"I", "II"}


def test_a_run_that_dies_again_and_again_ends_with_the_same_bytes(
    tmp_path, finished, problems, golds, fake_model, pool
):
    chance, folder, deaths = random.Random(8), tmp_path / "torn", 0
    while True:
        try:
            model = fake_model(golds, order=deaths, dies_after=chance.randint(0, 5))
            evaluate(problems, model, folder, pool=pool, **SETTINGS)
            break
        except ConnectionError:
            deaths += 1
            results = folder / "results.jsonl"
            content = results.read_bytes()
            if content:  # a kill in the middle of a write
                results.write_bytes(content[: -chance.randint(0, 60)] or content)
    assert deaths > 4
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


def test_a_process_killed_with_9_resumes_to_the_same_bytes(
    tmp_path, finished, benchmark_file, problems, golds, fake_model, pool
):
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import FakeModel
        from sse_eval import evaluate, load_benchmark
        bench = load_benchmark({str(benchmark_file)!r})
        model = FakeModel({{p.id: p.answer for p in bench.problems}}, order=5)
        kill = lambda done, *_: os.kill(os.getpid(), signal.SIGKILL) if done == 9 else None
        evaluate(bench, model, {str(tmp_path / "killed")!r}, progress=kill, **{SETTINGS!r})
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert len(read_rows(tmp_path / "killed" / "results.jsonl")) == 9
    model = fake_model(golds)
    evaluate(problems, model, tmp_path / "killed", pool=pool, **SETTINGS)
    assert len(model.asked) == 24 - 9
    killed = (tmp_path / "killed" / "results.jsonl").read_bytes()
    assert killed == (finished / "results.jsonl").read_bytes()


def test_a_finished_evaluation_asks_for_nothing(finished, problems, golds, fake_model, pool):
    before = (finished / "results.jsonl").read_bytes()
    model = fake_model(golds)
    again = evaluate(problems, model, finished, pool=pool, **SETTINGS)
    assert model.asked == [] and again["missing"] == 0
    assert (finished / "results.jsonl").read_bytes() == before


def test_a_changed_configuration_is_refused_with_the_difference(
    finished, problems, golds, fake_model, pool
):
    with pytest.raises(EvaluationError, match=r"sampling.temperature: 1.0 -> 0.6") as refusal:
        evaluate(
            problems, fake_model(golds), finished, pool=pool, **SETTINGS | {"temperature": 0.6}
        )
    assert "seed" not in str(refusal.value)
    with pytest.raises(EvaluationError, match=r'model.name: null -> "other"'):
        evaluate(
            problems, fake_model(golds), finished, pool=pool, model={"name": "other"}, **SETTINGS
        )


def test_another_chat_template_is_another_configuration(finished, problems, golds, fake_model):
    model = fake_model(golds)
    model.render = lambda messages: messages[0]["content"]
    with pytest.raises(EvaluationError, match="prompts_sha256"):
        evaluate(problems, model, finished, **SETTINGS)


def test_missing_samples_are_missing_and_not_wrong(tmp_path, problems, golds, fake_model, pool):
    class Aborting(fake_model):
        def answer(self, request):
            output = super().answer(request)
            output.finish_reason = "abort" if request.sample == 3 else "stop"
            return output

    summary = evaluate(problems, Aborting(golds), tmp_path / "part", pool=pool, **SETTINGS)
    assert (summary["missing"], summary["finished"]) == (6, 18)
    rows = read_rows(tmp_path / "part" / "results.jsonl")
    assert summary["avg"] == pytest.approx(sum(r["reward"] for r in rows) / 18)
    assert max(map(int, summary["pass_at"])) == 3
    assert "6 of 24 samples are missing" in (tmp_path / "part" / "report.md").read_text()


def test_no_sample_at_all_is_no_score(tmp_path, problems, golds, fake_model, pool):
    class Silent(fake_model):
        def generate(self, requests):
            return iter(())

    summary = evaluate(problems, Silent(golds), tmp_path / "none", pool=pool, **SETTINGS)
    assert summary["avg"] is None and summary["missing"] == 24
    assert (tmp_path / "none" / "report.html").exists()


def test_seeds_know_neither_path_nor_number_of_samples(problems, fake_model, golds, pool, tmp_path):
    seed = sample_seed(3, "aime31", "2031-I-0", 2)
    assert seed == 1380234319  # pinned: a changed hash would orphan every published sample
    model = fake_model(golds)
    evaluate(problems, model, tmp_path / "a", pool=pool, **SETTINGS | {"samples": 3})
    assert seed in {request.seed for request in model.asked}


def test_long_problems_are_asked_first_then_those_with_long_answers(
    tmp_path, problems, golds, fake_model, pool
):
    first = fake_model(golds, dies_after=6)
    with pytest.raises(ConnectionError):
        evaluate(problems, first, tmp_path / "a", pool=pool, **SETTINGS)
    assert first.asked[0].id == "2031-II-5" and first.asked[-1].id == "2031-I-0"
    second = fake_model(golds)
    rows = read_rows(tmp_path / "a" / "results.jsonl")
    evaluate(problems, second, tmp_path / "a", pool=pool, **SETTINGS)
    lengths = {
        id: sum(tokens) / len(tokens)
        for id in golds
        if (tokens := [row["tokens"] for row in rows if row["id"] == id])
    }
    known = [request.id for request in second.asked if request.id in lengths]
    assert [lengths[id] for id in known] == sorted((lengths[id] for id in known), reverse=True)


def test_regrading_keeps_the_texts_and_renews_the_verdicts(finished: Path, pool: RewardPool):
    honest = (finished / "results.jsonl").read_bytes()
    rows = read_rows(finished / "results.jsonl")
    write_rows(finished / "results.jsonl", [row | {"reward": 0.0, "status": "?"} for row in rows])
    assert summarize(finished)["avg"] == 0
    assert regrade(finished, pool=pool)["avg"] > 0
    assert (finished / "results.jsonl").read_bytes() == honest


def test_regrading_a_folder_without_an_evaluation_says_so(tmp_path: Path):
    with pytest.raises(EvaluationError, match="no evaluation's folder"):
        regrade(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, finished, problems, golds, fake_model, pool):
    folder, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, *_: object) -> None:
        if done == 7:
            size = (folder / "results.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(EvaluationError, match=r"cannot write .*results.jsonl.* are safe"):
            evaluate(problems, fake_model(golds), folder, pool=pool, progress=fill, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(read_rows(folder / "results.jsonl")) == 7
    evaluate(problems, fake_model(golds), folder, pool=pool, **SETTINGS)
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, problems, golds, fake_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot use"):
        evaluate(problems, fake_model(golds), tmp_path / "file" / "x", **SETTINGS)


def test_two_processes_cannot_write_one_folder(tmp_path, problems, golds, fake_model, pool):
    class Nosy(fake_model):
        def generate(self, requests):
            with pytest.raises(EvaluationError, match="another process"):
                evaluate(problems, fake_model(golds), tmp_path / "one", pool=pool, **SETTINGS)
            return super().generate(requests)

    evaluate(problems, Nosy(golds), tmp_path / "one", pool=pool, **SETTINGS)


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(
    finished, problems, golds, fake_model
):
    lines = (finished / "results.jsonl").read_bytes().split(b"\n")
    lines[4] = lines[4][:50]
    (finished / "results.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(EvaluationError, match=r"results.jsonl, line 5"):
        evaluate(problems, fake_model(golds), finished, **SETTINGS)


def test_a_context_too_short_is_said_before_anything_runs(tmp_path, problems, golds, fake_model):
    model = fake_model(golds)
    with pytest.raises(EvaluationError, match=r"max_tokens is 5000, .*context is 4096"):
        evaluate(problems, model, tmp_path / "a", **SETTINGS | {"max_tokens": 5000})
    assert model.asked == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": "Solve it."}, "no {problem}"),
    ],
)
def test_bad_settings_are_refused(tmp_path, problems, golds, fake_model, changed, message):
    with pytest.raises(ValueError, match=message):
        evaluate(problems, fake_model(golds), tmp_path / "a", **SETTINGS | changed)


def test_accuracy_at_a_token_budget_grades_the_cut_text(
    tmp_path, golds, problems, pool, fake_model
):
    class Talkative(fake_model):
        def answer(self, request):
            box = rf"\boxed{{{self.golds[request.id]}}}"
            text = f"{box} and " + "so on " * 80
            early = {budget: len(box) for budget in request.budgets if request.sample == 0}
            return SampleOutput(
                request.id, request.sample, text, 90, "stop", self.render(request.messages), early
            )

    settings = SETTINGS | {"samples": 2}
    summary = evaluate(problems, Talkative(golds), tmp_path / "a", pool=pool, **settings)
    assert [(b["tokens"], b["avg"]) for b in summary["budgets"]] == [
        (12, 0.5),
        (25, 0.5),
        (50, 0.5),
        (100, 1.0),
    ]


def test_thinking_that_the_prompt_opened_must_be_closed(
    tmp_path, golds, problems, pool, fake_model
):
    class Thinker(fake_model):
        def render(self, messages):
            return super().render(messages) + "<think>\n"

        def answer(self, request):
            box = rf"\boxed{{{self.golds[request.id]}}}"
            text = f"maybe {box}" + (f"</think> yes, {box}" if request.sample else "")
            return SampleOutput(
                request.id, request.sample, text, 9, "length", self.render(request.messages)
            )

    settings = SETTINGS | {"samples": 2}
    summary = evaluate(problems, Thinker(golds), tmp_path / "a", pool=pool, **settings)
    assert summary["statuses"] == {"unfinished_thinking": 6, "correct": 6}
    assert (summary["avg"], summary["unfinished"], summary["truncated"]) == (0.5, 0.5, 1.0)


def test_a_lenient_score_stands_apart(tmp_path, golds, problems, pool, fake_model):
    class Boxless(fake_model):
        def answer(self, request):
            output = super().answer(request)
            output.completion = f"Final answer: {self.golds[request.id]}"
            return output

    summary = evaluate(problems, Boxless(golds), tmp_path / "a", pool=pool, **SETTINGS)
    assert (summary["avg"], summary["lenient_avg"], summary["no_box"]) == (0.0, 1.0, 1.0)
    assert summary["suspects"][0]["why"] == "right, but outside a box"


def test_a_lone_surrogate_in_an_answer_survives(tmp_path, golds, problems, pool, fake_model):
    class Odd(fake_model):
        def answer(self, request):
            output = super().answer(request)
            output.completion = "\ud800\x00" + output.completion
            return output

    evaluate(problems, Odd(golds), tmp_path / "a", pool=pool, **SETTINGS)
    assert read_rows(tmp_path / "a" / "results.jsonl")[0]["completion"].startswith("\ud800\x00")


def test_a_sample_nobody_asked_for_is_an_error(tmp_path, golds, problems, pool, fake_model):
    class Twice(fake_model):
        def generate(self, requests):
            yield self.answer(requests[0])
            yield self.answer(requests[0])

    with pytest.raises(EvaluationError, match="not asked for"):
        evaluate(problems, Twice(golds), tmp_path / "a", pool=pool, **SETTINGS)


def test_limit_takes_the_first_problems_and_is_part_of_the_configuration(
    tmp_path, benchmark_file, golds, fake_model, pool
):
    summary = evaluate(
        benchmark_file, fake_model(golds), tmp_path / "a", limit=2, pool=pool, **SETTINGS
    )
    assert summary["problems"] == 2
    with pytest.raises(EvaluationError, match=r"benchmark\.problems: 2 -> 6"):
        evaluate(load_benchmark(benchmark_file), fake_model(golds), tmp_path / "a", **SETTINGS)


def test_a_row_holds_nothing_of_clock_or_machine(finished: Path):
    names = {name for row in read_rows(finished / "results.jsonl") for name in row}
    assert not names & {"ms", "at", "seconds", "worker", "host"}
    assert dataclasses.fields(SampleOutput)[-1].name == "seconds"
    timed = read_rows(finished / "timings.jsonl")
    assert {"at", "grade_ms", "seconds"} <= timed[-1].keys()
    assert os.path.getsize(finished / "config.json") > 0
