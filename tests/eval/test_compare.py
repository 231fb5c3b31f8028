from pathlib import Path

import pytest
from sse_eval import EvaluationError, evaluate
from sse_eval.compare import compare, describe
from sse_eval.folder import read_rows, write_rows

SETTINGS = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 100, "seed": 3}


@pytest.fixture
def base(tmp_path, problems, golds, fake_model, pool) -> Path:
    evaluate(problems, fake_model(golds), tmp_path / "base", pool=pool, **SETTINGS)
    return tmp_path / "base"


def with_rewards(base: Path, name: str, reward) -> Path:
    """A copy of an evaluation with other verdicts."""
    copy = base.parent / name
    copy.mkdir()
    (copy / "config.json").write_bytes((base / "config.json").read_bytes())
    rows = read_rows(base / "results.jsonl")
    write_rows(copy / "results.jsonl", [row | {"reward": reward(row)} for row in rows])
    return copy


def test_an_evaluation_equals_itself(base: Path):
    same = compare(base, base, max_drop=0.0)
    assert (same.difference, same.p_value, same.interval) == (0.0, 1.0, (0.0, 0.0))
    assert same.gained == same.lost == [] and same.passes


def test_a_difference_by_hand(base: Path, golds):
    first = min(golds)
    none = with_rewards(base, "none", lambda row: 0.0)
    some = with_rewards(base, "some", lambda row: float(row["id"] == first))
    comparison = compare(none, some)
    assert comparison.difference == pytest.approx(1 / 6)
    assert comparison.p_value == 1.0  # one problem of one sign proves nothing
    assert [change.id for change in comparison.gained] == [first]
    back = compare(some, none, max_drop=0.1)
    assert [change.id for change in back.lost] == [first] and not back.passes
    assert compare(some, none, max_drop=0.2).passes
    assert "BEYOND" in describe(back)


def test_all_problems_gained_is_as_sure_as_six_problems_can_be(base: Path):
    none = with_rewards(base, "none", lambda row: 0.0)
    all_right = with_rewards(base, "all", lambda row: 1.0)
    comparison = compare(none, all_right)
    assert (comparison.difference, comparison.p_value) == (1.0, 2 / 2**6)
    assert "0.0 % -> 100.0 %, +100.0 points" in describe(comparison)


def test_problems_of_one_side_only_are_left_out_and_counted(base: Path, golds):
    part = with_rewards(base, "part", lambda row: row["reward"])
    rows = [row for row in read_rows(base / "results.jsonl") if row["id"] != min(golds)]
    write_rows(part / "results.jsonl", rows)
    comparison = compare(base, part)
    assert (comparison.problems, comparison.unpaired, comparison.difference) == (5, 1, 0.0)


def test_other_settings_are_shown(base: Path, tmp_path, problems, golds, fake_model, pool):
    evaluate(
        problems,
        fake_model(golds),
        tmp_path / "cold",
        pool=pool,
        model={"name": "other"},
        **SETTINGS | {"temperature": 0.5, "samples": 2},
    )
    comparison = compare(base, tmp_path / "cold")
    assert comparison.settings == [
        "sampling.samples: 4 -> 2",
        "sampling.temperature: 1.0 -> 0.5",
    ]


def test_what_cannot_be_compared_is_an_error(
    base: Path, tmp_path, benchmark_file, golds, fake_model, pool
):
    with pytest.raises(EvaluationError, match="no evaluation's folder"):
        compare(base, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_drop"):
        compare(base, base, max_drop=2)
    other = benchmark_file.rename(tmp_path / "aime24.jsonl")
    evaluate(other, fake_model(golds), tmp_path / "other", pool=pool, **SETTINGS)
    with pytest.raises(EvaluationError, match=r"is of aime31, .* of aime24"):
        compare(base, tmp_path / "other")
    changed = with_rewards(base, "changed", lambda row: 1.0)
    rows = read_rows(changed / "results.jsonl")
    write_rows(changed / "results.jsonl", [row | {"answer": "9"} for row in rows])
    with pytest.raises(EvaluationError, match=r"the gold of .* is '204' in A and '9' in B"):
        compare(base, changed)
