"""The engine samples, the learner replays: both must mean the same model."""

from __future__ import annotations

import numpy as np
import pytest

from sse_rl.learner.step import Learner
from sse_rl.rollout.engine import Engine
from sse_rl.types import Group, Prompt, Request, SamplingParams, Trajectory


def sampled_groups(engine: Engine, seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    params = SamplingParams(n=4, temperature=1.2, max_tokens=80, seed=seed)
    requests = [
        Request(str(i), tuple(rng.integers(3, 29, rng.integers(1, 70)).tolist()), params)
        for i in range(4)
    ]
    return [
        Group(
            int(request.request_id),
            Prompt(request.request_id, request.prompt_token_ids, ""),
            [
                Trajectory(
                    c.token_ids, c.logprobs, c.routing, c.versions, c.finish_reason,
                    reward=float(rng.integers(0, 2)),
                )
                for c in completions
            ],
        )
        for request, completions in zip(requests, engine.generate(requests), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_engine_and_learner_agree_over_updates(policy, settings, variant: str) -> None:
    engine = Engine(
        policy(linear_attn_type=variant),
        max_num_seqs=8,
        num_pages=40,
        page_size=64,
        max_num_batched_tokens=128,
        eos_token_ids=(2,),
        max_model_len=160,
    )
    learner = Learner(policy(linear_attn_type=variant), settings(max_tokens_per_micro_batch=600))
    for step in range(3):
        metrics = learner.step(sampled_groups(engine, seed=step))
        assert metrics["rollout_logprob_diff_max"] < 1e-5  # measured: 2.9e-6
        assert 0 <= metrics["rollout_kl"] < 1e-10
        assert metrics["flip_rate"] < 1e-3
        assert metrics["correction_share"] == 0
        engine.set_weights(learner.weights(), version=step + 1)
