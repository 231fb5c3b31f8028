"""A set of rollout workers: requests go in and completions come out, whatever dies on the way.

What a request yields depends on its seed and the weights alone, so a worker that is lost is
replaced and its unfinished requests are simply asked again, of anyone, with the same result.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from sse_rl.errors import RunError
from sse_rl.pipeline.cluster import failure
from sse_rl.pipeline.weights import WeightsIndex
from sse_rl.types import Completion, Request

log = logging.getLogger(__name__)

ADVANCE_BUDGET_S = 1.0
"""How long a worker decodes before it looks for new requests or weights."""

AHEAD = 1.5
"""What a worker is given to do, in samples that it can decode together: the rest waits in its
engine for slots that become free between two calls."""


@dataclass(slots=True)
class _Worker:
    actor: Any
    outbox: list[Request] = field(default_factory=list)
    """Assigned but not sent yet."""
    outstanding: dict[str, Request] = field(default_factory=dict)
    """Assigned and not finished, the outbox included."""
    load: int = 0
    """Samples assigned and not finished."""
    call: Any = None
    """The `advance` in flight, and since when."""
    called_at: float = 0.0


class RolloutPool:
    """Spreads requests over workers, keeps all of them busy, replaces the dead.

    spawn: makes one worker actor. capacity: sequences a worker decodes together. A worker that
    answers nothing for `timeout_s` counts as dead; more than `max_restarts` deaths, or an error
    that a worker raises, is a RunError.
    """

    def __init__(
        self,
        spawn: Callable[[], Any],
        *,
        num_workers: int,
        capacity: int,
        timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._spawn = spawn
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        self._workers = [_Worker(spawn()) for _ in range(num_workers)]
        self._queue: deque[Request] = deque()
        self._finished: dict[str, list[list[Completion]]] = {}
        self._partial: dict[str, dict[int, Completion]] = {}
        self._apart: set[str] = set()
        self._weights: tuple[WeightsIndex, Any] | None = None
        self.restarts = 0

    @property
    def weights(self) -> tuple[WeightsIndex, Any]:
        """What `set_weights` was given last."""
        assert self._weights is not None
        return self._weights

    def set_weights(self, index: WeightsIndex, buffer: Any) -> None:
        """Load a version into every worker before its next step; `buffer` is a reference."""
        self._weights = (index, buffer)
        calls = [
            (worker, worker.actor.set_weights.remote(index, buffer)) for worker in self._workers
        ]
        for worker, call in calls:
            try:
                self._settle(call)
            except _Lost as lost:
                self._replace(worker, lost)

    def submit(self, request: Request, *, apart: bool = False) -> None:
        """Queue a request; what stands before the first `/` of its id names its channel.

        apart: give its completions back one by one as they end. If a worker is lost, those that
        were given back may come again.
        """
        self._queue.append(request)
        if apart:
            self._apart.add(request.request_id)

    def cancel(self, channel: str) -> None:
        """Forget a channel's requests, wherever they are."""
        self._queue = deque(r for r in self._queue if _channel(r.request_id) != channel)
        self._finished.pop(channel, None)
        self._apart = {name for name in self._apart if _channel(name) != channel}
        for worker in self._workers:
            names = [name for name in worker.outstanding if _channel(name) == channel]
            for name in names:
                request = worker.outstanding.pop(name)
                worker.load -= request.params.n - len(self._partial.pop(name, ()))
            worker.outbox = [r for r in worker.outbox if r.request_id in worker.outstanding]
            if names:
                worker.actor.abort.remote(names)

    def poll(self, channel: str, timeout_s: float) -> list[list[Completion]]:
        """A channel's requests that finished, each with its n completions in order; of those that
        were submitted to come apart one completion each.

        Waits `timeout_s` at most; what other channels finish meanwhile is kept for them.
        """
        if not self._finished.get(channel):
            for completions in self._advance(timeout_s):
                name = _channel(completions[0].request_id)
                self._finished.setdefault(name, []).append(completions)
        return self._finished.pop(channel, [])

    def _advance(self, timeout_s: float) -> list[list[Completion]]:
        self._dispatch()
        calls = {worker.call: worker for worker in self._workers if worker.call is not None}
        if not calls:
            return []
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        if ready:  # whatever else finished meanwhile
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        finished: list[list[Completion]] = []
        for call in ready:
            worker = calls[call]
            worker.call = None
            try:
                completions = self._settle(call)
            except _Lost as lost:
                self._replace(worker, lost)
            else:
                finished += self._collect(worker, completions)
        for worker in self._workers:
            if worker.call is not None and time.monotonic() - worker.called_at > self._timeout_s:
                self._replace(worker, _Lost(f"no answer for {self._timeout_s:g} s"))
        self._dispatch()
        return finished

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

    def _dispatch(self) -> None:
        while self._queue:
            worker = min(self._workers, key=lambda worker: worker.load)
            if worker.load >= AHEAD * self._capacity:
                break
            request = self._queue.popleft()
            worker.outbox.append(request)
            worker.outstanding[request.request_id] = request
            worker.load += request.params.n
        for worker in self._workers:
            if worker.call is None and worker.outstanding:
                worker.call = worker.actor.advance.remote(worker.outbox, ADVANCE_BUDGET_S)
                worker.called_at = time.monotonic()
                worker.outbox = []

    def _collect(self, worker: _Worker, completions: list[Completion]) -> list[list[Completion]]:
        finished = []
        for completion in completions:
            name = completion.request_id
            if name not in worker.outstanding:  # cancelled meanwhile
                continue
            worker.load -= 1
            samples = self._partial.setdefault(name, {})
            samples[completion.index] = completion
            if name in self._apart:
                finished.append([completion])
            if len(samples) == worker.outstanding[name].params.n:
                del worker.outstanding[name]
                done = self._partial.pop(name)
                if name in self._apart:
                    self._apart.remove(name)
                else:
                    finished.append([done[index] for index in sorted(done)])
        return finished

    def _settle(self, call: Any) -> Any:
        """The result of a call; _Lost if the worker is gone, RunError if it raised."""
        try:
            return ray.get(call, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise _Lost(f"no answer for {self._timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            raise failure(error, "a rollout worker") from None
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):  # the next one would fail as well
                raise RunError(f"a rollout worker could not start: {error}") from None
            raise _Lost(str(error)) from None

    def _replace(self, worker: _Worker, reason: _Lost) -> None:
        for name in worker.outstanding:
            self._partial.pop(name, None)
        self._queue.extendleft(reversed(worker.outstanding.values()))
        worker.call, worker.outbox, worker.outstanding, worker.load = None, [], {}, 0
        while True:
            self.restarts += 1
            if self.restarts > self._max_restarts:
                raise RunError(
                    f"rollout workers died {self.restarts} times, more than rollout.max_restarts = "
                    f"{self._max_restarts}; the last one: {reason}"
                )
            log.warning("a rollout worker died and is replaced (%s)", reason)
            ray.kill(worker.actor)
            worker.actor = self._spawn()
            if self._weights is None:
                return
            try:
                self._settle(worker.actor.set_weights.remote(*self._weights))
                return
            except _Lost as lost:
                reason = lost


class _Lost(Exception):
    """A worker that is dead or silent; the message says how it went."""


def _channel(request_id: str) -> str:
    return request_id.partition("/")[0]
