"""Where the learner's batches come from: prompts go out to rollout workers, scored groups return.

In flight and ready together there are never more than (1 + max_staleness) batches. With
max_staleness 0 nothing is asked for before the weights it will be answered with are in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from sse_rl.data.stream import PromptStream
from sse_rl.pipeline.rollouts import RolloutPool
from sse_rl.recipe import Grpo, Rollout
from sse_rl.types import Completion, Group, Prompt, Request, SamplingParams, Trajectory

CHANNEL = "train"
POLL_S = 0.5


class Scores(Protocol):
    def score(self, groups: list[Group]) -> None: ...


@dataclass(slots=True)
class TakeStats:
    """What it took to fill one batch."""

    dropped_stale: int = 0
    dropped_no_signal: int = 0
    prompts: int = 0
    """Groups generated while this batch was filled."""
    kept_no_signal: int = 0
    """Groups without signal that went into the batch since the rounds of refilling were used up."""


@dataclass(slots=True)
class GroupSource:
    """Deals whole batches of scored groups, oldest prompt first.

    decode turns token ids into the text that is graded. interrupted is asked while waiting and may
    raise. Requests are named by the group's id, so that an answer finds its prompt after any delay.
    """

    stream: PromptStream
    pool: RolloutPool
    scorer: Scores
    decode: Callable[[list[int]], str]
    grpo: Grpo
    rollout: Rollout
    seed: int
    interrupted: Callable[[], None] = lambda: None
    pending: dict[int, Prompt] = field(default_factory=dict)
    ready: dict[int, Group] = field(default_factory=dict)
    spare: dict[int, Group] = field(default_factory=dict)
    """Groups without signal, the last resort of dynamic sampling."""
    _stats: TakeStats = field(default_factory=TakeStats)

    def take(self, version: int) -> tuple[list[Group], TakeStats]:
        """The next `prompts_per_step` groups, none of them more than `max_staleness` versions old.

        With dynamic_sampling, groups without signal are replaced for a bounded number of rounds.
        """
        wanted = self.grpo.prompts_per_step
        while True:
            self._drop_stale(version)
            if len(self.ready) >= wanted:
                break
            if self._exhausted():
                fill = sorted(self.spare)[: wanted - len(self.ready)]
                self._stats.kept_no_signal = len(fill)
                self.ready.update((name, self.spare[name]) for name in fill)
                break
            self._dispatch(limit=self._allowance())
            self.interrupted()
            self._receive(POLL_S)
        groups = [self.ready.pop(name) for name in sorted(self.ready)[:wanted]]
        self.spare.clear()
        stats, self._stats = self._stats, TakeStats()
        return groups, stats

    def pump(self) -> None:
        """Keep the workers busy while the learner learns; does nothing in the synchronous mode."""
        if self.grpo.max_staleness > 0:
            self._dispatch(limit=None)
            self._receive(POLL_S)

    def state_dict(self) -> dict[str, Any]:
        """The cursor: call it between two batches. Prompts in flight are asked again on resume."""
        return {
            "stream": self.stream.state_dict(),
            "pending": sorted(self.pending),
            "ready": [self.ready[name] for name in sorted(self.ready)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.ready = {group.id: group for group in state["ready"]}
        for name in state["pending"]:
            self._ask(name, self.stream[name])

    def _capacity(self) -> int:
        return self.grpo.prompts_per_step * (1 + self.grpo.max_staleness)

    def _allowance(self) -> int | None:
        """Prompts that may still be asked for this batch: what the rounds of refilling leave, or
        what is missing to a whole batch if even groups without signal are counted."""
        if not self.grpo.dynamic_sampling:
            return None
        wanted = self.grpo.prompts_per_step
        missing = wanted - len(self.ready) - len(self.spare) - len(self.pending)
        return max(self.grpo.dynamic_sampling_max_rounds * wanted - self._stats.prompts, missing)

    def _exhausted(self) -> bool:
        allowance = self._allowance()
        return allowance is not None and allowance <= 0 and not self.pending

    def _dispatch(self, *, limit: int | None) -> None:
        room = self._capacity() - len(self.pending) - len(self.ready)
        room = room if limit is None else min(room, limit)
        if room <= 0:
            return
        for name, prompt in self.stream.next(room):
            self._stats.prompts += 1
            self._ask(name, prompt)

    def _ask(self, name: int, prompt: Prompt) -> None:
        self.pending[name] = prompt
        params = sampling(self.grpo, self.rollout, seed=group_seed(self.seed, name))
        self.pool.submit(Request(f"{CHANNEL}/{name}", prompt.token_ids, params))

    def _receive(self, timeout_s: float) -> None:
        groups = []
        for completions in self.pool.poll(CHANNEL, timeout_s):
            name = int(completions[0].request_id.partition("/")[2])
            trajectories = [trajectory(completion, self.decode) for completion in completions]
            groups.append(Group(name, self.pending.pop(name), trajectories))
        if not groups:
            return
        self.scorer.score(groups)
        for group in groups:
            if self.grpo.dynamic_sampling and not has_signal(group):
                self._stats.dropped_no_signal += 1
                self.spare[group.id] = group
            else:
                self.ready[group.id] = group

    def _drop_stale(self, version: int) -> None:
        limit = self.grpo.max_staleness
        for groups in (self.ready, self.spare):
            stale = [name for name, group in groups.items() if staleness(group, version) > limit]
            for name in stale:
                del groups[name]
            self._stats.dropped_stale += len(stale)


def sampling(grpo: Grpo, rollout: Rollout, *, seed: int) -> SamplingParams:
    """How a group's answers are drawn."""
    return SamplingParams(
        n=grpo.num_generations,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        top_k=grpo.top_k,
        min_p=grpo.min_p or 0.0,
        max_tokens=grpo.max_completion_length,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
        seed=seed,
    )


def trajectory(completion: Completion, decode: Callable[[list[int]], str]) -> Trajectory:
    """An answer that no one has scored yet."""
    return Trajectory(
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        routing=completion.routing,
        versions=completion.versions,
        finish_reason=completion.finish_reason,
        text=decode(completion.token_ids.tolist()),
    )


def group_seed(seed: int, group_id: int | str) -> int:
    """A seed in 0 .. 2**63-1 that depends on the run's seed and the group alone."""
    digest = hashlib.sha256(f"{seed}/{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def has_signal(group: Group) -> bool:
    """Whether the rewards that are known differ."""
    return len({t.reward for t in group.trajectories if t.reward is not None}) > 1


def staleness(group: Group, version: int) -> int:
    """Versions between the oldest token of the group and the weights that will learn from it."""
    return version - min(int(t.versions.min()) for t in group.trajectories if t.versions.size)
