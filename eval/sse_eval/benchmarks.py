"""Benchmarks by name, from the hub, or from a JSON lines file; a bad row never gets past here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sse_rewards import validate_gold

from sse_eval.types import Benchmark, Problem


class HubSet(NamedTuple):
    """Where a named benchmark lives, and what its columns are called."""

    path: str
    kind: str
    split: str
    id: str
    """Column of the id; empty numbers the rows."""
    problem: str = "problem"
    config: str | None = None


HUB = {
    "aime24": HubSet("HuggingFaceH4/aime_2024", "aime", "train", "id"),
    "aime25": HubSet("math-ai/aime25", "aime", "test", "id"),
    "aime26": HubSet("MathArena/aime_2026", "aime", "train", "problem_idx"),
    "amc23": HubSet("math-ai/amc23", "aime", "test", "id", "question"),
    "math500": HubSet("HuggingFaceH4/MATH-500", "math", "test", "unique_id"),
    "gsm8k": HubSet("openai/gsm8k", "math", "test", "", "question", "main"),
}

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_EXAM = re.compile(r"AIME_(II?)_|-(II?)-")


def load_benchmark(benchmark: str | Path, *, limit: int | None = None) -> Benchmark:
    """A benchmark by name or from `FILE.jsonl`, its first `limit` problems.

    A row of a file is {id, problem, answer} with optional kind (auto, aime, math) and exam. A file
    that begins with a benchmark's name, as aime24.jsonl or gsm8k_test.jsonl, is that benchmark:
    its name, kind and seeds. GSM8K's own rows, {question, answer} with the worked solution and
    the number after ####, are read as from the hub.

    Raises ValueError naming file and row for a row that is no such object, a missing or doubled
    id, an empty problem or answer, a control character, or an answer that does not verify against
    itself; and for a name that is neither known nor a file.
    """
    if str(benchmark) in HUB:
        loaded = _from_hub(str(benchmark))
    elif Path(benchmark).suffix == ".jsonl":
        loaded = _from_file(Path(benchmark))
    else:
        raise ValueError(
            f"no benchmark {str(benchmark)!r}: give one of {', '.join(HUB)}, or a FILE.jsonl"
        )
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        loaded = replace(loaded, problems=loaded.problems[:limit])
    return loaded


def _from_file(path: Path) -> Benchmark:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the benchmark {path}: {error.strerror}") from error
    name = next((name for name in HUB if re.match(rf"{name}(?![a-z0-9])", path.stem)), path.stem)
    rows = _file_rows(path, content)
    if name.startswith("gsm8k"):
        split = "train" if "train" in path.stem else "test"
        rows = ((at, _own_row(row, f"gsm8k-{split}-{i:05}")) for i, (at, row) in enumerate(rows))
    return Benchmark(
        name=name,
        problems=_problems(str(path), rows, _kind_of(name)),
        source=path.name,
        revision="",
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _kind_of(name: str) -> str:
    if name in HUB:
        return HUB[name].kind
    if name.startswith(("aime", "amc")):
        return "aime"
    return "math" if name.startswith(("math", "gsm8k")) else "auto"


def _file_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line.decode())
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from error


def _from_hub(name: str) -> Benchmark:
    hub = HUB[name]
    data = _download(name, hub)
    rows = [_hub_row(name, hub, index, row) for index, row in enumerate(data)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return Benchmark(
        name=name,
        problems=_problems(hub.path, ((f"row {i}", row) for i, row in enumerate(rows)), hub.kind),
        source=hub.path,
        revision=_revision(data),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def _hub_row(name: str, hub: HubSet, index: int, row: dict[str, Any]) -> dict[str, str]:
    for column in filter(None, (hub.id, hub.problem, "answer")):
        if column not in row:
            raise ValueError(f"{hub.path}, row {index}: no column {column!r} but {sorted(row)}")
    answer = _whole(row["answer"])
    if name == "gsm8k":
        answer = _final_number(answer)
    return {
        "id": str(row[hub.id]) if hub.id else f"{name}-{hub.split}-{index:05}",
        "problem": row[hub.problem],
        "answer": answer,
        "exam": _exam(str(row.get("url", ""))),
    }


def _own_row(row: Any, id: str) -> Any:
    """A row of a GSM8K file in our columns, where it has the data set's."""
    if not isinstance(row, dict):
        return row
    if "problem" not in row and "question" in row:
        row = {"id": id, **row, "problem": row["question"]}
    if isinstance(answer := row.get("answer"), str) and "####" in answer:
        row = {**row, "answer": _final_number(answer)}
    return row


def _final_number(worked: str) -> str:
    """Of GSM8K's answer column, which holds a worked solution and the number after ####."""
    return worked.rsplit("####", 1)[-1].strip().replace(",", "")


def _download(name: str, hub: HubSet) -> Any:
    import datasets  # takes seconds to import, and a file needs none of it

    try:
        return datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot load {name} from the hub ({hub.path}): {error}\n"
            f"Without the hub, pass a file: {name}.jsonl with a line "
            '{"id": ..., "problem": ..., "answer": ...} for each problem.'
        ) from error


def _revision(data: Any) -> str:
    """The commit, which the addresses of the downloaded files carry (`...@<commit>/...`)."""
    for address in data.info.download_checksums or {}:
        if found := re.search(r"@([0-9a-f]{40})/", address):
            return found[1]
    return ""


def _whole(answer: Any) -> str:
    """An answer as text; amc23 has its integers as floats."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _exam(text: str) -> str:
    found = _EXAM.search(text)
    return (found[1] or found[2]) if found else ""


def _problems(source: str, rows: Iterable[tuple[str, Any]], kind: str) -> tuple[Problem, ...]:
    problems: dict[str, Problem] = {}
    for place, row in rows:
        try:
            problem = _problem(row, kind)
            if problem.id in problems:
                raise ValueError(f"id {problem.id!r} is there twice")
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {error}") from error
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{source}: no problems in it")
    return tuple(problems.values())


def _problem(row: Any, kind: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with id, problem and answer, not {row!r:.60}")
    id = _text(row, "id")
    kind = _text(row, "kind") if kind == "auto" and "kind" in row else kind
    if kind not in ("auto", "aime", "math"):
        raise ValueError(f"kind must be auto, aime or math, not {kind!r}")
    problem = Problem(
        id=id,
        problem=_text(row, "problem"),
        answer=_text(row, "answer"),
        kind=kind,
        exam=str(row.get("exam") or _exam(id)),
    )
    if why := validate_gold(problem.answer, kind):
        raise ValueError(f"answer {problem.answer!r} of {id!r} is unusable: {why}")
    return problem


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and key != "problem":
        value = _whole(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is missing" if value is None else f"{key} is {value!r}")
    if found := _CONTROL.search(value):
        raise ValueError(
            f"{key} has the control character {found[0]!r} (a LaTeX backslash read as an escape?)"
        )
    return value
