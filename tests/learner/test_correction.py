"""What TRL has not; the rest is in test_losses_against_trl."""

from __future__ import annotations

import math

import pytest
import torch

from sse_rl.learner.correction import correction_weights
from sse_rl.recipe import Correction

LEARNER = torch.tensor([0.1, 0.3, -0.5, 0.4], requires_grad=True)
ROLLOUT = torch.zeros(4)
LENGTHS = torch.tensor([3, 1])


def weights(**settings: object) -> list[float]:
    result, _ = correction_weights(
        LEARNER, ROLLOUT, lengths=LENGTHS, correction=Correction.model_validate(settings)
    )
    assert not result.requires_grad
    return result.tolist()


def test_geometric_is_exp_of_the_mean_log_ratio() -> None:
    wide = {"mode": "truncate", "clip_min": None, "clip_max": None}
    mean, total = math.exp(-0.1 / 3), math.exp(-0.1)
    own = math.exp(0.4)
    assert weights(level="geometric", **wide) == pytest.approx([mean] * 3 + [own])
    assert weights(level="sequence", **wide) == pytest.approx([total] * 3 + [own])


def test_mask_zeroes_and_truncate_clamps_what_is_outside() -> None:
    band = {"level": "geometric", "clip_min": 0.99, "clip_max": 1.2}
    assert weights(mode="mask", **band) == pytest.approx([0, 0, 0, 0])
    assert weights(mode="truncate", **band) == pytest.approx([0.99] * 3 + [1.2])


def test_none_weighs_every_token_one() -> None:
    assert weights(level="none", mode="mask", clip_max=0.1) == [1, 1, 1, 1]


def test_a_log_prob_that_is_not_a_number_is_not_masked_away() -> None:
    rollout = torch.tensor([0.0, torch.nan, 0.0, 0.0])
    result, _ = correction_weights(
        LEARNER, rollout, lengths=LENGTHS, correction=Correction(level="sequence", mode="mask")
    )
    assert result[:3].isnan().all() and not result[3].isnan()
