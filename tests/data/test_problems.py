"""Sources of problems: what is read, what is refused, how they are split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sse_rl.data.problems import load_problems, load_splits
from sse_rl.errors import UserError
from sse_rl.recipe import Data, Source

SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(source: Source) -> str:
    with pytest.raises(UserError) as caught:
        load_problems(source)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "problems.jsonl"


def test_rows_of_a_file_become_problems(file: Path):
    path = write(file, [{"id": "a", "problem": "1+1?", "answer": "2", "solution": "It is 2."}])
    (problem,) = load_problems(Source(path=path))
    assert (problem.id, problem.question, problem.answer) == ("a", "1+1?", "2")
    assert problem.solution == "It is 2."


def test_columns_are_read_under_their_own_names(file: Path):
    path = write(file, [{"nr": 7, "q": "1+1?", "a": 2}])
    (problem,) = load_problems(Source(path=path, problem="q", answer="a", id="nr"))
    assert (problem.id, problem.question, problem.answer) == ("7", "1+1?", "2")
    assert problem.columns["q"] == problem.columns["problem"] == "1+1?"


def test_an_answer_and_a_solution_are_taken_out_of_one_column(file: Path):
    worked = "Half of 48 is <<48/2=24>>24.\nWith 1000: $<<24+1000=1024>>1024.\n#### 1,024"
    path = write(file, [{"question": "Clips?", "answer": worked}])
    source = {"path": path, "problem": "question", "solution": "answer"}
    patterns = {"answer_match": "#### (.+)", "solution_remove": "<<.*?>>|\n#### .*"}
    (problem,) = load_problems(Source(**source, **patterns))
    assert problem.answer == "1,024"
    assert problem.solution == "Half of 48 is 24.\nWith 1000: $1024."
    message = refusal(Source(**source, answer_match="Answer: (.+)"))
    assert "row 1: answer: nothing in" in message and "matches answer_match" in message


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"solution_remove\n.*not a regular expression"):
        Source(path="x.jsonl", solution_remove="<<(")


def test_parquet_is_read_as_jsonl_is(tmp_path: Path):
    from datasets import Dataset

    path = tmp_path / "problems.parquet"
    Dataset.from_list([{"problem": "1+1?", "answer": "2"}]).to_parquet(path)
    assert [p.answer for p in load_problems(Source(path=str(path)))] == ["2"]


def test_a_repeated_question_is_kept_once(file: Path):
    path = write(file, [{"problem": "1+1?", "answer": "2"}, {"problem": "1+1?", "answer": "2"}])
    assert len(load_problems(Source(path=path))) == 1


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer_is_refused_by_its_number(file: Path, answer: str | None):
    path = write(file, [{"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": answer}])
    assert refusal(Source(path=path)).startswith(f"{path}, row 2: answer is ")


def test_a_gold_that_does_not_verify_against_itself_is_refused(file: Path):
    path = write(file, [{"problem": "1?", "answer": "the first one"}])
    message = refusal(Source(path=path, kind="aime"))
    assert message.startswith(f"{path}, row 1: answer = 'the first one': ")


def test_an_id_given_twice_is_refused_with_both_rows(file: Path):
    rows = [
        {"id": "a", "problem": "1?", "answer": "1"},
        {"id": "a", "problem": "2?", "answer": "2"},
    ]
    path = write(file, rows)
    assert refusal(Source(path=path)) == f"{path}, row 2: id 'a' is also that of row 1"


def test_a_missing_column_is_named_beside_those_there_are(file: Path):
    path = write(file, [{"question": "1?", "answer": "1"}])
    assert refusal(Source(path=path)) == (
        f"{path}, row 1: no column 'problem'; it has answer, question"
    )


def test_a_missing_or_unreadable_file_is_one_message(file: Path):
    assert refusal(Source(path=str(file))) == f"{file}: no such file"
    file.write_text('{"problem": ')
    assert "cannot be read" in refusal(Source(path=str(file)))
    other = file.with_suffix(".csv")
    other.write_text("a,b")
    assert "expected a .jsonl or .parquet file" in refusal(Source(path=str(other)))


def test_generated_answers_are_right_and_questions_differ():
    problems = load_problems(
        Source(task="chain_sum", task_args=SUMS, size=300, problem="expression", kind="aime")
    )
    assert len({problem.question for problem in problems}) == len(problems)
    for problem in problems:
        assert str(eval(problem.question)) == problem.answer
        assert 0 <= int(problem.answer) <= 999


def test_an_unknown_task_or_argument_is_refused_with_the_right_one():
    assert refusal(Source(task="chain_sun")).endswith("did you mean chain_sum?")
    assert refusal(Source(task="chain_sum", task_args={"max_term": 3})).endswith(
        "did you mean max_terms?"
    )
    assert "min_terms" in refusal(Source(task="chain_sum", task_args={"min_terms": 0}))


def test_no_heldout_problem_is_trained_on_not_even_reordered():
    source = Source(task="chain_sum", task_args=SUMS, size=2000, problem="expression", kind="aime")
    train, test = load_splits(Data(train=source, test_fraction=0.2))
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3
    twins = lambda problems: {tuple(sorted(problem.question.split())) for problem in problems}
    assert not twins(train) & twins(test)


def test_a_problem_stays_on_its_side_when_the_source_grows():
    def heldout(size: int) -> set[str]:
        source = Source(task="chain_sum", task_args=SUMS, size=size, problem="expression")
        return {problem.question for problem in load_splits(Data(train=source))[1]}

    assert heldout(200) <= heldout(600)


def test_overlapping_splits_are_refused(file: Path):
    path = write(file, [{"id": "a", "problem": "1+1?", "answer": "2"}])
    data = Data(train=Source(path=path), test=Source(path=path))
    with pytest.raises(UserError, match="1 of its problems are in"):
        load_splits(data)
