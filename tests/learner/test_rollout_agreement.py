"""The engine samples, the learner replays: both must mean the same model."""

from __future__ import annotations

import numpy as np
import pytest

from sse_rl.learner.step import Learner
from sse_rl.model import SSEForCausalLM
from sse_rl.rollout.engine import Engine
from sse_rl.types import Group, Prompt, Request, SamplingParams, Trajectory


def sampled_groups(engine: Engine, seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    params = SamplingParams(n=4, temperature=1.2, max_tokens=80, seed=seed)
    requests = [
        Request(str(i), tuple(rng.integers(3, 29, rng.integers(1, 70)).tolist()), params)
        for i in range(4)
    ]
    return as_groups(requests, engine, rng)


def as_groups(requests: list[Request], engine: Engine, rewards: np.random.Generator) -> list[Group]:
    return [
        Group(
            int(request.request_id),
            Prompt(request.request_id, request.prompt_token_ids, ""),
            [
                Trajectory(
                    c.token_ids, c.logprobs, c.routing, c.versions, c.finish_reason,
                    reward=float(rewards.integers(0, 2)),
                )
                for c in completions
            ],
        )
        for request, completions in zip(requests, engine.generate(requests), strict=True)
    ]  # fmt: skip


def engine_of(model: SSEForCausalLM) -> Engine:
    return Engine(
        model,
        max_num_seqs=8,
        num_pages=40,
        page_size=64,
        max_num_batched_tokens=128,
        eos_token_ids=(2,),
        max_model_len=160,
    )


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_exact_logprobs_are_the_engines_to_the_bit(policy, settings, variant: str) -> None:
    changes = {"linear_attn_type": variant, "initializer_range": 0.6}
    engine = engine_of(policy(**changes))
    options = {"max_tokens_per_micro_batch": 600, "num_iterations": 2, "learning_rate": 0.05}
    exact = Learner(policy(**changes), settings(**options, exact_logprobs=True))
    chunked = Learner(policy(**changes), settings(**options))
    for step in range(2):
        groups = sampled_groups(engine, seed=step)
        metrics, theirs = exact.step(groups), chunked.step(groups)
        assert metrics["rollout_logprob_diff_max"] == 0
        assert metrics["importance_ratio/max"] == 1
        assert theirs["rollout_logprob_diff_max"] > 0
        assert metrics["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        engine.set_weights(exact.weights(), version=step + 1)
        chunked.model.load_state_dict(exact.weights())


def test_exact_logprobs_of_prompts_of_one_token(policy, settings) -> None:
    engine = engine_of(policy())
    params = SamplingParams(n=2, temperature=1.2, max_tokens=5)
    requests = [Request(str(i), (3 + i,), params) for i in range(8)]
    groups = as_groups(requests, engine, np.random.default_rng(0))
    metrics = Learner(policy(), settings(exact_logprobs=True)).step(groups)
    assert metrics["rollout_logprob_diff_max"] == 0


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_engine_and_learner_agree_over_updates(policy, settings, variant: str) -> None:
    engine = engine_of(policy(linear_attn_type=variant))
    learner = Learner(policy(linear_attn_type=variant), settings(max_tokens_per_micro_batch=600))
    for step in range(3):
        metrics = learner.step(sampled_groups(engine, seed=step))
        assert metrics["rollout_logprob_diff_max"] < 1e-5  # measured: 2.9e-6
        assert 0 <= metrics["rollout_kl"] < 1e-10
        assert metrics["flip_rate"] < 1e-3
        assert metrics["correction_share"] == 0
        engine.set_weights(learner.weights(), version=step + 1)
