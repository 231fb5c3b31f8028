"""Problems: read from a file or a hub, or generated, checked row by row, split by their text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sse_rewards import validate_gold

from sse_rl.data.generated import generate
from sse_rl.errors import UserError
from sse_rl.recipe import Data, Source


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a source, its columns under our names."""

    id: str
    question: str
    answer: str
    kind: str = "auto"
    solution: str | None = None
    """Worked text that ends in the boxed answer; what the cold start imitates."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All columns of the row, under their own names."""


def load_splits(data: Data) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems; no held-out question is among the training ones.

    Without `data.test`, a problem is held out by a hash of its question: the same problem falls
    on the same side in every run, whatever the source's order or size.

    Raises:
        UserError: see `load_problems`; or a side is empty; or the two sides overlap.
    """
    train = load_problems(data.train)
    if data.test is None:
        test = [problem for problem in train if _is_held_out(problem, data.test_fraction)]
        train = [problem for problem in train if not _is_held_out(problem, data.test_fraction)]
        if not test and data.test_fraction > 0:
            raise UserError(
                f"data.test_fraction = {data.test_fraction}: holds out none of {len(train)}"
            )
    else:
        test = load_problems(data.test)
    if not train:
        raise UserError("data.train: no training problem is left")
    seen = {_key(problem) for problem in train}
    overlap = [problem for problem in test if _key(problem) in seen]
    if overlap:
        raise UserError(
            f"data.test: {len(overlap)} of its problems are in data.train too, "
            f"the first is {overlap[0].id}: {_clip(overlap[0].question)}"
        )
    return train, test[: data.test_limit]


def load_problems(source: Source) -> list[Problem]:
    """The problems of `source`; a repeated question is kept once.

    Raises:
        UserError: the file, data set or task cannot be read, or a row is bad: no question, no
            answer, an id given twice, an answer that does not verify against itself. The message
            names the source and the row.
    """
    name, rows = _rows(source)
    problems: list[Problem] = []
    ids: dict[str, int] = {}
    questions: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if len(problems) == source.limit:
            break
        problem = _problem(row, source, f"{name}, row {number}", number)
        if problem.id in ids:
            raise UserError(
                f"{name}, row {number}: id {problem.id!r} is also that of row {ids[problem.id]}"
            )
        ids[problem.id] = number
        if problem.question not in questions:
            questions.add(problem.question)
            problems.append(problem)
    if not problems:
        raise UserError(f"{name}: no problems")
    return problems


def load_texts(source: Source, column: str) -> list[str | list[dict[str, str]]]:
    """Column `column` of each row: text, or chat messages {role, content}.

    Raises:
        UserError: the source cannot be read, or a row has neither.
    """
    name, rows = _rows(source)
    texts: list[str | list[dict[str, str]]] = []
    for number, row in enumerate(rows, start=1):
        if len(texts) == source.limit:
            break
        value = row.get(column)
        if isinstance(value, list) and value and all(_is_message(turn) for turn in value):
            texts.append(value)
        else:
            texts.append(_text(row, column, f"{name}, row {number}"))
    if not texts:
        raise UserError(f"{name}: no rows")
    return texts


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))


def _rows(source: Source) -> tuple[str, Iterable[dict[str, Any]]]:
    if source.task is not None:
        rows = generate(source.task, source.task_args, size=source.size, seed=source.seed)
        if source.kind == "aime":
            rows = [row for row in rows if _is_aime(row["answer"])]
        return source.task, [
            {source.problem: row["question"], source.answer: row["answer"], **row["columns"]}
            for row in rows
        ]
    return source.path or source.dataset or "", _read(source)


def _read(source: Source) -> Iterable[Any]:
    """The rows of a file or hub data set, through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if source.path is None:
            assert source.dataset is not None
            return load_dataset(source.dataset, source.dataset_config, split=source.split)
        path = Path(source.path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
        if path.suffix not in builders:
            raise UserError(f"{path}: expected a .jsonl or .parquet file")
        return load_dataset(builders[path.suffix], data_files=str(path), split="train")
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{source.path or source.dataset}: cannot be read: {reason}") from None


def _problem(row: dict[str, Any], source: Source, place: str, number: int) -> Problem:
    question = _text(row, source.problem, place)
    answer = _text(row, source.answer, place)
    if source.answer_match is not None:
        answer = _last_group(source.answer_match, answer, f"{place}: {source.answer}")
    reason = validate_gold(answer, source.kind)
    if reason is not None:
        raise UserError(f"{place}: {source.answer} = {answer!r}: {reason}")
    solution = row.get(source.solution)
    if isinstance(solution, str) and source.solution_remove is not None:
        solution = re.sub(source.solution_remove, "", solution).strip()
    return Problem(
        id=str(row[source.id]) if row.get(source.id) is not None else str(number),
        question=question,
        answer=answer,
        kind=source.kind,
        solution=solution if isinstance(solution, str) and solution.strip() else None,
        columns={**row, "problem": question, "answer": answer},
    )


def _text(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column {column!r}; it has {', '.join(sorted(row))}")
    value = row[column]
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: {column} is {value!r}, expected text")
    return text


def _last_group(pattern: str, text: str, place: str) -> str:
    """The first group of the last match, or the whole match of a pattern without groups."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        raise UserError(f"{place}: nothing in {_clip(text)!r} matches answer_match {pattern!r}")
    return matches[-1][1 if matches[-1].re.groups else 0].strip()


def _is_aime(answer: str) -> bool:
    return answer.isascii() and answer.isdigit() and int(answer) <= 999


def _key(problem: Problem) -> str:
    """The question's words in sorted order: twins such as 2 + 3 and 3 + 2 stay on one side."""
    return " ".join(sorted(problem.question.split()))


def _is_held_out(problem: Problem, fraction: float) -> bool:
    digest = hashlib.sha256(_key(problem).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _clip(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
