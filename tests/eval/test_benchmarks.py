import json
import os
import sys
import types
from pathlib import Path

import pytest
from sse_eval import load_benchmark

GOOD = {"id": "a", "problem": "Find $x$.", "answer": "204"}


def written(folder: Path, *rows: object, name: str = "mine.jsonl") -> Path:
    file = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def test_a_file_is_a_benchmark_with_its_checksum(tmp_path):
    bench = load_benchmark(written(tmp_path, GOOD, "", GOOD | {"id": 7, "answer": 25}))
    assert [(p.id, p.answer, p.kind) for p in bench.problems] == [
        ("a", "204", "auto"),
        ("7", "25", "auto"),
    ]
    assert (bench.name, bench.source, bench.revision) == ("mine", "mine.jsonl", "")
    assert len(bench.sha256) == 64


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("aime24.jsonl", "aime24", "aime"),
        ("aime25_copy.jsonl", "aime25", "aime"),
        ("aime_1983_2023.jsonl", "aime_1983_2023", "aime"),
        ("amc23.jsonl", "amc23", "aime"),
        ("math500.jsonl", "math500", "math"),
        ("gsm8k_test.jsonl", "gsm8k", "math"),
        ("aime240.jsonl", "aime240", "aime"),
        ("other.jsonl", "other", "auto"),
    ],
)
def test_a_file_that_bears_a_benchmarks_name_is_that_benchmark(tmp_path, file, name, kind):
    bench = load_benchmark(written(tmp_path, GOOD, name=file))
    assert (bench.name, bench.problems[0].kind) == (name, kind)


def test_a_row_may_bring_its_kind_and_exam(tmp_path):
    rows = [GOOD | {"kind": "aime", "exam": "qualifier"}, GOOD | {"id": "aime2024-II-03"}]
    first, second = load_benchmark(written(tmp_path, *rows)).problems
    assert (first.kind, first.exam, second.exam) == ("aime", "qualifier", "II")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "id"}, "line 2: id is missing"),
        (GOOD, "line 2: id 'a' is there twice"),
        ({"id": "b", "problem": "Find $x$."}, "line 2: answer is missing"),
        (GOOD | {"id": "b", "answer": " "}, "line 2: answer is ' '"),
        (GOOD | {"id": "b", "problem": ["Find"]}, "line 2: problem is"),
        (GOOD | {"id": "b", "problem": "$\frac12$"}, r"problem has the control character '\\x0c'"),
        (GOOD | {"id": "b", "answer": "2\x000"}, r"answer has the control character '\\x00'"),
        (GOOD | {"id": "b", "kind": "physics"}, "kind must be auto, aime or math, not 'physics'"),
        ("[1]", "line 2: must be an object"),
        ('{"id": "b"', "line 2: not JSON in UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load_benchmark(written(tmp_path, GOOD, row))
    assert "mine.jsonl" in str(refusal.value)


def test_a_gold_that_does_not_verify_is_named(tmp_path):
    rows = [GOOD, GOOD | {"id": "b", "answer": "two hundred"}]
    with pytest.raises(ValueError, match=r"line 2: answer 'two hundred' of 'b' is unusable"):
        load_benchmark(written(tmp_path, *rows, name="aime24.jsonl"))


RAW = {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1200\n#### 1,200"}


def test_gsm8ks_own_rows_are_read_from_a_file_as_from_the_hub(tmp_path, hub):
    hub([RAW, RAW])
    from_hub = load_benchmark("gsm8k")
    for name in ("gsm8k.jsonl", "gsm8k_test.jsonl"):
        assert load_benchmark(written(tmp_path, RAW, RAW, name=name)).problems == from_hub.problems
    (problem,) = load_benchmark(written(tmp_path, RAW, name="gsm8k_train.jsonl")).problems
    assert problem.id == "gsm8k-train-00000"
    mixed = GOOD | {"answer": RAW["answer"]}
    (problem,) = load_benchmark(written(tmp_path, mixed, name="gsm8k_mine.jsonl")).problems
    assert (problem.id, problem.answer) == ("a", "1200")


def test_a_worked_solution_as_gold_is_refused_in_another_file(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: answer .* of 'a' .*####"):
        load_benchmark(written(tmp_path, GOOD | {"answer": RAW["answer"]}))


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not JSON in UTF-8"):
        load_benchmark(tmp_path / "x.jsonl")


def test_an_empty_file_a_missing_one_and_an_unknown_name_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no problems in it"):
        load_benchmark(written(tmp_path))
    with pytest.raises(ValueError, match=r"cannot read the benchmark .*nowhere\.jsonl"):
        load_benchmark(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="no benchmark 'aime99': give one of aime24"):
        load_benchmark("aime99")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_benchmark(written(tmp_path, GOOD), limit=0)


class HubData(list):
    """Rows as `datasets` hands them out, with the addresses it downloaded."""

    def __init__(self, rows: list[dict], commit: str = "c" * 40) -> None:
        super().__init__(rows)
        address = f"hf://datasets/some/set@{commit}/data/train.parquet"
        self.info = types.SimpleNamespace(download_checksums={address: {}})


@pytest.fixture
def hub(monkeypatch):
    """Put a `datasets` in place that answers with given rows, or raises."""

    def serve(answer: list[dict] | Exception) -> None:
        def load_dataset(*_: object, **__: object) -> HubData:
            if isinstance(answer, Exception):
                raise answer
            return HubData(answer)

        fake = types.SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", fake)

    return serve


def test_a_benchmark_by_name_records_the_commit_and_checksum(hub):
    url = "https://example.org/wiki/2024_AIME_II_Problems/Problem_4"
    hub([{"id": 60, "problem": "Find $x$.", "answer": "204", "url": url, "year": "2024"}])
    bench = load_benchmark("aime24")
    assert (bench.name, bench.source) == ("aime24", "HuggingFaceH4/aime_2024")
    assert bench.revision == "c" * 40 and len(bench.sha256) == 64
    (problem,) = bench.problems
    assert (problem.id, problem.kind, problem.exam) == ("60", "aime", "II")


def test_the_hubs_columns_become_ours(hub):
    hub([{"problem_idx": 3, "problem": "Find $x$.", "answer": 25}])
    assert load_benchmark("aime26").problems[0].id == "3"
    hub([{"id": 0, "question": "Find $x$.", "answer": 27.0}])
    assert load_benchmark("amc23").problems[0].answer == "27"
    hub([{"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1200\n#### 1,200"}])
    (problem,) = load_benchmark("gsm8k").problems
    assert (problem.id, problem.answer) == ("gsm8k-test-00000", "1200")


def test_an_unreachable_hub_points_to_the_file(hub):
    hub(ConnectionError("Couldn't reach the hub"))
    with pytest.raises(ValueError, match=r"(?s)cannot load aime25 .*Couldn't reach.*aime25\.jsonl"):
        load_benchmark("aime25")


def test_hub_rows_of_another_shape_are_an_error(hub):
    hub([{"problem": "Find $x$."}])
    with pytest.raises(ValueError, match=r"math-ai/aime25, row 0: no column 'id'"):
        load_benchmark("aime25")


DATA = os.environ.get("SSE_RL_DATA")


@pytest.mark.skipif(not DATA, reason="SSE_RL_DATA names no folder of benchmarks")
@pytest.mark.parametrize(
    ("name", "problems"), [("aime24", 30), ("aime25", 30), ("amc23", 40), ("gsm8k_test", 1319)]
)
def test_the_benchmarks_load_whole(name: str, problems: int):
    assert DATA is not None
    assert len(load_benchmark(Path(DATA) / f"{name}.jsonl").problems) == problems
