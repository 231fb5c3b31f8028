"""What goes through a pool to an engine: how many prefills, and how full its slots are."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sse_eval.types import SampleRequest

from sse_rl.data.tokenizer import byte_tokenizer
from sse_rl.model import SSEConfig, SSEForCausalLM
from sse_rl.pipeline import rollouts
from sse_rl.pipeline.evaluate import PoolGenerator, Prompter
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.pipeline.weights import pack
from sse_rl.recipe import Rollout
from sse_rl.rollout.worker import EngineSpec, RolloutWorker
from sse_rl.types import Request, SamplingParams

SLOTS, TOKENIZER = 32, byte_tokenizer()
ENDS = tuple(range(0, 256, 42))
"""Random weights sample all ids alike: an answer has 37 tokens on the average."""


class Actor:
    """A worker in this process, under Ray's way of calling; it may die after so many calls."""

    def __init__(self, worker: RolloutWorker, lives: int = 10**9) -> None:
        self.worker, self.lives = worker, lives

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: lambda: self.call(name, *arguments))

    def call(self, name: str, *arguments: Any) -> Any:
        self.lives -= 1
        if self.lives < 0:
            raise rollouts.ray.exceptions.RayActorError
        return getattr(self.worker, name)(*arguments)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        wait=lambda calls, num_returns, timeout: (calls, []),
        get=lambda call, timeout=None: call(),
        kill=lambda _: None,
        exceptions=rollouts.ray.exceptions,
    )
    monkeypatch.setattr(rollouts, "ray", fake)


@pytest.fixture
def make_pool() -> Callable[..., tuple[RolloutPool, list[Actor]]]:
    """A pool of one worker, and the actors that it has had; the first dies after `lives` calls."""

    def build(lives: int = 10**9) -> tuple[RolloutPool, list[Actor]]:
        torch.manual_seed(0)
        config = SSEConfig(
            hidden_size=32,
            head_dim=16,
            num_heads=2,
            num_sparse_partition=2,
            num_writer=1,
            num_reader=1,
            num_hidden_layers=2,
            attn={"layers": [1], "num_heads": 2},
            intermediate_size=64,
            vocab_size=len(TOKENIZER),
        )
        spec = EngineSpec(
            config=config.to_dict(),
            dtype="float32",
            eos_token_ids=ENDS,
            max_model_len=128,
            rollout=Rollout(max_num_seqs=SLOTS),
        )
        actors: list[Actor] = []

        def spawn() -> Actor:
            actors.append(Actor(RolloutWorker(spec), 10**9 if actors else lives))
            return actors[-1]

        pool = RolloutPool(spawn, num_workers=1, capacity=SLOTS, timeout_s=60, max_restarts=1)
        index, buffer = pack(SSEForCausalLM(config).state_dict(), version=0)
        pool.set_weights(index, buffer)
        return pool, actors

    return build


def asked(problems: int, samples: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            id=f"p{problem}",
            sample=sample,
            messages=({"role": "user", "content": f"{problem}+1" + "?" * (problem % 5)},),
            seed=problem * samples + sample,
            temperature=1.0,
            top_p=1.0,
            max_tokens=90,
            budgets=(32,),
        )
        for problem in range(problems)
        for sample in range(samples)
    ]


def answers(pool: RolloutPool, requests: list[SampleRequest]) -> dict[tuple[str, int], str]:
    generator = PoolGenerator(pool, Prompter(TOKENIZER, chat_template=False), 128)
    outputs = list(generator.generate(requests))
    assert len(outputs) == len(requests)
    return {(output.id, output.sample): output.completion for output in outputs}


def test_an_evaluation_prefills_a_problem_once_and_keeps_the_slots_full(make_pool):
    pool, [actor] = make_pool()
    found = answers(pool, asked(32, 8))
    stats = actor.worker.engine.stats
    lengths = sum(len(TOKENIZER(f"{i}+1" + "?" * (i % 5))["input_ids"]) for i in range(32))
    assert len(found) == 256 and stats.prefill_tokens == lengths
    assert stats.prefills <= 32
    assert stats.slot_use > 0.7, "its last answers are alone, all others in company"


def test_a_sample_is_what_it_would_be_alone(make_pool):
    requests = asked(6, 8)
    together = answers(make_pool()[0], requests)
    pool, _ = make_pool()
    for request in requests[::7]:
        assert answers(pool, [request]) == {
            (request.id, request.sample): together[request.id, request.sample]
        }


@pytest.mark.parametrize("lives", [1, 2])
def test_a_lost_workers_samples_come_once_and_the_same(make_pool, lives, monkeypatch):
    monkeypatch.setattr("sse_rl.rollout.worker.GATHER_S", 0.0)
    requests = asked(12, 8)
    whole = answers(make_pool()[0], requests)
    pool, actors = make_pool(lives=1 + lives)
    assert answers(pool, requests) == whole
    assert len(actors) == 2


def test_groups_that_wait_for_one_answer_leave_no_slot_empty(make_pool):
    pool, [actor] = make_pool()
    for i in range(64):
        params = SamplingParams(n=8, max_tokens=90, seed=i)
        pool.submit(Request(f"difficulty/{i}", (40, 41 + i % 7), params))
    groups = []
    while len(groups) < 64:
        groups += pool.poll("difficulty", 1.0)
    assert all([c.index for c in group] == list(range(8)) for group in groups)
    stats = actor.worker.engine.stats
    assert stats.slot_use > 0.7
    assert stats.prefills < 64


def test_what_is_cancelled_makes_room(make_pool):
    pool, _ = make_pool()
    for i in range(20):
        pool.submit(Request(f"old/{i}", (40,), SamplingParams(n=8, max_tokens=90)), apart=i % 2 > 0)
    pool.poll("old", 0.0)
    pool.cancel("old")
    pool.submit(Request("new/0", (40,), SamplingParams(n=2, max_tokens=5)))
    found = []
    while not found:
        found = pool.poll("new", 1.0)
    assert len(found[0]) == 2 and not pool.poll("old", 0.0)
    assert pool._workers[0].load == 0 and not pool._apart
