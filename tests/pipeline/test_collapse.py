"""When a policy counts as collapsed."""

from __future__ import annotations

import pytest

from sse_rl.pipeline.collapse import collapse
from sse_rl.recipe import EarlyStop

HEALTHY = {"entropy": 0.5, "completion_length/mean": 100.0, "truncated": 0.1, "reward": 0.4}


def rows(*changes: dict) -> list[dict]:
    return [{"step": i} | HEALTHY | change for i, change in enumerate(changes, start=1)]


@pytest.mark.parametrize(
    ("limits", "change"),
    [
        ({"min_entropy": 0.1}, {"entropy": 0.01}),
        ({"max_entropy": 3.0}, {"entropy": 4.0}),
        ({"min_length": 20}, {"completion_length/mean": 3.0}),
        ({"max_truncated": 0.5}, {"truncated": 0.9}),
        ({"min_reward_share": 0.5}, {"reward": 0.1}),
    ],
)
def test_each_limit_ends_a_run_that_passes_it_and_no_other(limits: dict, change: dict):
    stop = EarlyStop(window=3, **limits)
    healthy, sick = [{}] * 3, [change] * 3
    assert collapse(rows(*healthy, *healthy), stop) is None
    reason = collapse(rows(*healthy, *sick), stop)
    assert reason is not None and f"grpo.early_stop.{next(iter(limits))}" in reason
    assert collapse(rows(*healthy, *sick), EarlyStop(window=3)) is None
    assert collapse(rows(*healthy, *sick), None) is None


def test_one_bad_batch_ends_no_run():
    stop = EarlyStop(window=4, min_entropy=0.3)
    assert collapse(rows({}, {}, {}, {"entropy": 0.0}), stop) is None
    assert collapse(rows({"entropy": 0.0}, {"entropy": 0.0}), stop) is None  # too few to judge


def test_a_share_of_the_best_reward_means_nothing_before_there_is_one():
    stop = EarlyStop(window=2, min_reward_share=0.5)
    assert collapse(rows(*[{"reward": 0.0}] * 6), stop) is None
    assert collapse(rows(*[{"reward": None}] * 6), stop) is None
    falling = [{"reward": r} for r in (0.8, 0.8, 0.5, 0.5, 0.39, 0.39)]
    assert collapse(rows(*falling[:4]), stop) is None
    assert "0.39" in (collapse(rows(*falling), stop) or "")


def test_a_step_without_rewards_is_judged_alike_live_and_read_back():
    stop = EarlyStop(window=3, min_reward_share=0.5)
    healthy, sick = [{}] * 3, [{"reward": 0.1}] * 2
    live, read_back = (rows(*healthy, *sick, {"reward": none}) for none in (float("nan"), None))
    assert collapse(read_back, stop) is not None
    assert collapse(live, stop) == collapse(read_back, stop)
