"""What a run that goes on, but not as meant, says of itself."""

from __future__ import annotations

import math

import pytest

from sse_rl.pipeline.remarks import WINDOW, remarks
from sse_rl.recipe import Grpo

GRPO = Grpo(max_steps=3, max_completion_length=64)
WELL = {"reward": 0.4, "frac_reward_zero_std": 0.5, "truncated": 0.1, "status/correct": 0.4}
SILENT = {"reward": 0.0, "frac_reward_zero_std": 1.0, "truncated": 0.1}


def rows(*kinds: dict) -> list[dict]:
    """As many steps of each kind as are judged together, in turn."""
    return [{"step": n} | kinds[n % len(kinds)] for n in range(1, WINDOW + 1)]


def test_a_run_whose_rewards_are_all_alike_says_so_and_what_the_graders_said():
    found = remarks(rows(SILENT | {"status/wrong": 0.5}, SILENT | {"status/no_box": 1.0}), GRPO)
    assert list(found) == ["signal"]
    assert "in steps 1 to 10" in found["signal"] and "0 in the mean," in found["signal"]
    assert "no_box 50 %, wrong 25 %" in found["signal"]


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_rewards_that_nobody_knows_teach_nothing(unknown):
    found = remarks(rows(SILENT | {"reward": unknown}), GRPO)
    assert "had the same, none;" in found["signal"]


def test_a_run_with_signal_in_some_step_or_of_few_steps_says_nothing():
    assert remarks(rows(SILENT, WELL), GRPO) == {}
    assert remarks(rows(SILENT)[1:], GRPO) == {}


def test_a_run_whose_answers_are_mostly_cut_off_names_the_limit():
    found = remarks(rows(WELL | {"truncated": 0.9}, WELL | {"truncated": 0.5}), GRPO)
    assert list(found) == ["truncated"]
    assert "70 %" in found["truncated"] and "grpo.max_completion_length = 64" in found["truncated"]
