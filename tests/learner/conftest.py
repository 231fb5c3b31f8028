"""A tiny policy and batches that it sampled itself, as far as the learner can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.model.cache import packed_inputs
from sse_rl.recipe import Grpo
from sse_rl.types import Group, Prompt, Trajectory

TEMPERATURE = 1.2


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def policy() -> Callable[..., SSEForCausalLM]:
    """Builds the same tiny hybrid each time; keys of SSEConfig change it."""

    def build(**changes: Any) -> SSEForCausalLM:
        torch.manual_seed(0)
        config: dict[str, Any] = {
            "vocab_size": 29,
            "hidden_size": 16,
            "num_heads": 2,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "intermediate_size": 24,
            "num_sparse_partition": 4,
            "num_writer": 2,
            "num_reader": 2,
            "use_short_conv": True,
            "initializer_range": 0.2,
            "attn": {"layers": [1], "num_heads": 2},
        }
        return SSEForCausalLM(SSEConfig(**(config | changes)))

    return build


@pytest.fixture
def settings() -> Callable[..., Grpo]:
    """A Grpo section; Adam's epsilon makes an update proportional to the clipped gradient."""

    def build(**changes: Any) -> Grpo:
        plain: dict[str, Any] = {
            "max_steps": 100,
            "max_completion_length": 12,
            "temperature": TEMPERATURE,
            "learning_rate": 0.5,
            "adam_epsilon": 1.0,
            "lr_scheduler_type": "constant",
        }
        return Grpo.model_validate(plain | changes)

    return build


@pytest.fixture
def batch() -> Callable[..., list[Group]]:
    """Random answers, with the log-probs and the routing that `model` itself gives them."""

    def build(
        model: SSEForCausalLM, *, prompts: int = 3, answers: int = 4, seed: int = 0
    ) -> list[Group]:
        rng = np.random.default_rng(seed)
        groups = []
        for number in range(prompts):
            prompt = tuple(rng.integers(3, 29, rng.integers(1, 8)).tolist())
            trajectories = [_answer(model, prompt, rng) for _ in range(answers)]
            groups.append(Group(number, Prompt(str(number), prompt, "0"), trajectories))
        return groups

    return build


@torch.no_grad()
def _answer(model: SSEForCausalLM, prompt: tuple[int, ...], rng: np.random.Generator) -> Trajectory:
    ids = rng.integers(3, 29, rng.integers(1, 13))
    fed = torch.tensor([*prompt, *ids[:-1]])
    out = model.packed(fed, packed_inputs([len(fed)]))
    hidden = out.hidden[len(prompt) - 1 :]
    logprobs, _ = model.logprobs(hidden, torch.from_numpy(ids), temperature=TEMPERATURE)
    return Trajectory(
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.numpy(),
        routing=out.routing_ids.numpy(),
        versions=np.zeros(len(ids), np.int32),
        finish_reason="stop",
        reward=float(rng.integers(0, 2)),
    )
