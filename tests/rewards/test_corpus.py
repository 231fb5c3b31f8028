"""The labelled cases of `corpus/*.jsonl`, one file a class.

A case is `{completion | pieces, answer, kind, correct, status?, why?}`; `pieces` are texts with
their repetitions, for long completions.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sse_rewards import Result, RewardPool

FILES = sorted((Path(__file__).parent / "corpus").glob("*.jsonl"))
RIGHT = 0.985
SECONDS = 2.5


def cases(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(case: dict) -> str:
    if "pieces" in case:
        return "".join(piece * times for piece, times in case["pieces"])
    return case["completion"]


def timed(pool: RewardPool, case: dict) -> tuple[Result, float]:
    text, started = text_of(case), time.monotonic()
    result = pool.score(text, case["answer"], case["kind"])
    return result, time.monotonic() - started


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(workers=2) as pool:
        pool.score(r"\boxed{\arctan 1}", r"\arctan 2", "math")
        yield pool


def test_the_corpus_has_every_class_and_enough_cases():
    names = {path.stem for path in FILES}
    assert names == {
        "aime_right",
        "aime_wrong",
        "bombs",
        "boxes",
        "characters",
        "echo_and_injection",
        "large",
        "math_right",
        "math_wrong",
        "thinking",
        "turns",
    }
    assert sum(len(cases(path)) for path in FILES) >= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_class_is_graded_right_and_in_time(path: Path, pool: RewardPool):
    wrong, slow = [], []
    all_cases = cases(path)
    for case in all_cases:
        result, seconds = timed(pool, case)
        if seconds > SECONDS:  # perhaps the machine was busy
            result, seconds = timed(pool, case)
        assert result.status != "error", result
        assert not (result.correct and not case["correct"]), ("false positive", case, result)
        if result.correct != case["correct"] or result.status != case.get("status", result.status):
            wrong.append((case, result))
        if seconds > SECONDS:
            slow.append((case, seconds))
    assert len(wrong) <= (1 - RIGHT) * len(all_cases), wrong
    assert not slow
