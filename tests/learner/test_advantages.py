from __future__ import annotations

import numpy as np
import pytest

from sse_rl.learner.advantages import group_advantages

NONE = float("nan")


def test_equal_rewards_have_no_advantage() -> None:
    for scale in ("group", "batch", "none"):
        (advantages,) = group_advantages([np.array([0.1] * 8)], scale_rewards=scale)
        assert np.abs(advantages).max() < 1e-9


def test_the_deviation_is_unbiased() -> None:
    (advantages,) = group_advantages([np.array([1.0, 0.0])], scale_rewards="group")
    assert advantages.tolist() == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_lone_reward_has_no_advantage(scale) -> None:
    groups = [np.array([NONE, 1.0, NONE]), np.array([NONE, NONE]), np.array([0.0, 1.0])]
    lone, nobody, pair = group_advantages(groups, scale_rewards=scale)
    assert not lone.any() and not nobody.any()
    assert pair[0] == -pair[1] < 0
