"""Golds of public benchmarks verify against themselves; SSE_RL_DATA names their folder."""

import itertools
import json
import os
from pathlib import Path

import pytest
from sse_rewards import RewardPool, score, validate_gold

DATA = Path(os.environ.get("SSE_RL_DATA", ""))
SETS = {
    "math500": "math",
    "math_train": "math",
    "gsm8k_test": "gsm8k",
    "gsm8k_train": "gsm8k",
    "aime24": "aime",
    "aime25": "aime",
    "aime_1983_2023": "aime",
    "amc23": "amc",
}


def golds(name: str) -> list[str]:
    path = DATA / f"{name}.jsonl"
    if not os.environ.get("SSE_RL_DATA") or not path.exists():
        pytest.skip(f"SSE_RL_DATA names no folder with {name}.jsonl")
    return [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]


@pytest.mark.parametrize(("name", "kind"), SETS.items())
def test_every_gold_verifies_against_itself(name: str, kind: str):
    with RewardPool(workers=1) as pool:
        problems = {a: p for a in golds(name) if (p := validate_gold(a, kind, pool=pool))}
    assert problems == {}


def test_neighbouring_golds_are_not_taken_for_each_other():
    answers = sorted(set(golds("math500")))
    for first, second in itertools.pairwise(answers):
        result = score(rf"\boxed{{{first}}}", second, "math")
        assert not result.correct or result.stage != "symbolic", (first, second, result)
