"""What a run would read for distillation and the cold start is looked at before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sse_rl.data import corpus
from sse_rl.errors import UserError
from sse_rl.pipeline import texts
from sse_rl.pipeline.initial import initialise, run_distill
from sse_rl.pipeline.stages import Job
from sse_rl.recipe import Recipe
from sse_rl.recipe_io import check_files, load_recipe, parse_recipe

CONVERSION = Path(__file__).parent / "conversion.yaml"
OWN = ["sft={max_steps: 1, max_length: 96}", "eval.max_tokens=8"]


def recipe(source: str, *overrides: str) -> Recipe:
    named = [f"model.convert.source={source}", f"data.tokenizer={source}"]
    return load_recipe(CONVERSION, [*named, *OWN, *overrides])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {i} " * 4}) + "\n" for i in range(20)))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.eval=[{path: gone.jsonl}]", r"distill\.eval\.0: gone\.jsonl: no such file"),
        ("distill.corpora=[{task: chain_sun}]", r"distill\.corpora\.0: .*did you mean chain_sum"),
        (
            "distill.eval=[{task: chain_sum, text: expression}, {path: ROWS, text: text}]",
            r"distill\.eval\.1: .*rows\.jsonl, row 1: no column 'text'; it has body",
        ),
        ("distill.corpora=[{path: ROWS}]", r"distill\.corpora\.0: .*no column 'problem'"),
        (
            "distill.eval=[{path: ROWS, text: body, limit: 1}]",
            r"eval\.0: distill\.max_length = 48: all",
        ),
        ("distill.max_length=50000", r"distill\.eval: distill\.max_length = 50000: all text"),
        ("data.test_fraction=0.0", r"distill\.eval: no text to measure perplexity on"),
        ("sft.max_length=10", r"sft\.max_length = 10: the shortest example has \d\d tokens"),
    ],
)
def test_text_that_cannot_be_read_is_found_before_a_run_starts(
    source: str, rows: Path, tmp_path: Path, override: str, message: str
):
    of = recipe(source, override.replace("ROWS", str(rows)))
    with pytest.raises(UserError, match=message):
        Job.prepare(of, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_of_a_stage_that_is_finished_is_not_read(source: str, rows: Path, tmp_path: Path):
    Job.prepare(recipe(source), tmp_path)
    of = recipe(source, "distill.eval=[{path: gone.jsonl}]", "sft.max_length=20")
    for stage in ("distill", "sft"):
        (tmp_path / stage).mkdir()
    Job.prepare(of, tmp_path)


def test_of_long_text_the_first_rows_are_read(source: str, rows: Path, tmp_path, monkeypatch):
    read: list[int] = []
    real = corpus.load_texts

    def counted(*arguments):
        found = real(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(corpus, "load_texts", counted)
    monkeypatch.setattr(texts, "HEAD", 3)
    of = recipe(source, f"distill.corpora=[{{path: {rows}, text: body}}]")
    Job.prepare(of, tmp_path / "run")
    long_rows = "distill.max_length=200", "data.test_fraction=0.5"
    of = recipe(source, f"distill.corpora=[{{path: {rows}, text: body}}]", *long_rows)
    Job.prepare(of, tmp_path / "run")
    assert read == [3, 3, 20]


def test_the_held_out_text_is_read_before_the_teacher_answers(source: str, tmp_path: Path):
    from sse_rl.data.tokenizer import load_tokenizer

    of = recipe(source, "distill.eval=[{path: gone.jsonl}]", "distill.teacher_prompts=3")
    initialise(of, load_tokenizer(of.data), tmp_path)
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        run_distill(of, str(tmp_path), "init")
    assert not (tmp_path / "teacher.jsonl").exists()


def test_a_model_that_is_not_there_is_named_by_the_check(tmp_path: Path):
    text = "name: a\nmodel: {path: PATH}\ndata: {train: {task: chain_sum}}"
    with pytest.raises(UserError, match=r"r\.yaml: model\.path = gone: no such folder"):
        check_files(parse_recipe(text.replace("PATH", "gone")), origin="r.yaml")
    check_files(parse_recipe(text.replace("PATH", str(tmp_path))))
