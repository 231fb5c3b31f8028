"""The batch source against a pool that answers in any order it likes."""

import numpy as np
import pytest

from sse_rl.data.stream import PromptStream
from sse_rl.pipeline.source import GroupSource
from sse_rl.recipe import Grpo, Rollout
from sse_rl.types import Completion, Prompt


class ReversedPool:
    """Answers everything it was asked, the latest first, with the weights it holds."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.asked: list[str] = []
        self._waiting = []

    def submit(self, request):
        self.asked.append(request.request_id)
        self._waiting.append(request)

    def poll(self, channel, timeout_s):
        answered = [
            [
                Completion(
                    request_id=request.request_id,
                    index=index,
                    token_ids=np.array([request.params.seed % 97, index], dtype=np.int32),
                    logprobs=np.zeros(2, dtype=np.float32),
                    routing=np.zeros((3, 1, 1), dtype=np.uint8),
                    versions=np.full(2, self.version, dtype=np.int32),
                    finish_reason="stop",
                )
                for index in range(request.params.n)
            ]
            for request in reversed(self._waiting)
        ]
        self._waiting = []
        return answered


class SignalFor:
    """Rewards that differ within the groups named, and are all alike in the others."""

    def __init__(self, signal) -> None:
        self.signal = signal

    def score(self, groups):
        for group in groups:
            for index, trajectory in enumerate(group.trajectories):
                trajectory.reward = float(index % 2) if self.signal(group.id) else 1.0


def make(pool, signal=lambda _: True, **grpo) -> GroupSource:
    prompts = [Prompt(id=str(i), token_ids=(i, i + 1), answer="1") for i in range(5)]
    settings = {"max_steps": 1, "prompts_per_step": 3, "num_generations": 2} | grpo
    return GroupSource(
        stream=PromptStream(prompts, seed=0),
        pool=pool,
        scorer=SignalFor(signal),
        decode=str,
        grpo=Grpo(**settings),
        rollout=Rollout(),
        seed=0,
    )


def names(groups) -> list[int]:
    return [group.id for group in groups]


def test_batches_come_in_the_order_of_the_prompts_whatever_finishes_first():
    source = make(ReversedPool())
    assert names(source.take(0)[0]) == [0, 1, 2]
    assert names(source.take(0)[0]) == [3, 4, 5]


def test_the_synchronous_mode_asks_for_nothing_ahead():
    pool = ReversedPool()
    source = make(pool)
    source.take(0)
    source.pump()
    assert pool.asked == ["train/0", "train/1", "train/2"]


def test_the_asynchronous_mode_keeps_the_workers_busy_up_to_its_capacity():
    pool = ReversedPool()
    source = make(pool, max_staleness=1)
    source.take(0)
    source.pump()
    assert len(pool.asked) == 9 and len(source.ready) == 6


def test_groups_that_are_too_old_are_dropped_and_replaced():
    pool = ReversedPool()
    source = make(pool, max_staleness=1)
    source.take(0)
    source.pump()
    pool.version = 2
    groups, stats = source.take(2)
    assert stats.dropped_stale == 6
    assert names(groups) == [9, 10, 11]


def test_groups_without_signal_are_refilled():
    source = make(ReversedPool(), signal=lambda name: name % 2 == 0, dynamic_sampling=True)
    groups, stats = source.take(0)
    assert names(groups) == [0, 2, 4]
    assert stats.dropped_no_signal == 2


def test_refilling_ends_after_its_rounds():
    source = make(
        ReversedPool(),
        signal=lambda name: name == 1,
        dynamic_sampling=True,
        dynamic_sampling_max_rounds=2,
    )
    groups, stats = source.take(0)
    assert stats.prompts == 6 and stats.kept_no_signal == 2
    assert names(groups) == [0, 1, 2]


def test_a_resumed_source_deals_what_an_uninterrupted_one_would():
    whole = make(ReversedPool(), max_staleness=1)
    whole.take(0)
    whole.pump()
    state = whole.state_dict()
    resumed = make(ReversedPool(), max_staleness=1)
    resumed.load_state_dict(state)
    for _ in range(3):
        ours, theirs = resumed.take(0)[0], whole.take(0)[0]
        assert names(ours) == names(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.prompt == other.prompt
            for a, b in zip(one.trajectories, other.trajectories, strict=True):
                assert np.array_equal(a.token_ids, b.token_ids)


def test_an_interrupted_take_is_dealt_again_from_its_cursor():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    source = make(ReversedPool())
    source.take(0)
    cursor = source.state_dict()
    source.interrupted = stop
    with pytest.raises(Stop):
        source.take(0)
    resumed = make(ReversedPool())
    resumed.load_state_dict(cursor)
    assert names(resumed.take(0)[0]) == [3, 4, 5]


def test_a_group_has_the_same_seed_in_every_run_and_its_own():
    first, again = ReversedPool(), ReversedPool()
    a = make(first).take(0)[0]
    b = make(again).take(0)[0]
    assert [g.trajectories[0].token_ids[0] for g in a] == [
        g.trajectories[0].token_ids[0] for g in b
    ]
    assert len({int(g.trajectories[0].token_ids[0]) for g in a}) > 1


def test_refilling_goes_on_when_what_the_rounds_brought_is_too_old():
    pool = ReversedPool()
    source = make(pool, max_staleness=1, dynamic_sampling=True, dynamic_sampling_max_rounds=1)
    source.take(0)
    source.pump()
    pool.version = 2
    groups, stats = source.take(2)
    assert len(groups) == 3 and stats.dropped_stale == 6


def test_groups_without_signal_are_no_resort_once_they_are_too_old():
    pool = ReversedPool()
    source = make(pool, signal=lambda name: False, max_staleness=1, dynamic_sampling=True)
    source.take(0)
    source.pump()
    pool.version = 2
    groups, _ = source.take(2)
    assert all(trajectory.versions.min() == 2 for g in groups for trajectory in g.trajectories)
