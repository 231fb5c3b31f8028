"""Grading in bulk: cheap checks in the caller's thread, symbolic ones in processes that get killed.

One manager thread a pool owns all worker processes and never runs sympy, so that the hard wall
limit holds in any thread, event loop or Ray actor. A check that takes long keeps its process, at
lower priority, while a spare one takes its place: bombs do not starve the honest.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any, NamedTuple, Self

from .grader import Question, judge
from .manager import Job, Manager, Verdict
from .result import Kind, Result
from .telemetry import Telemetry

CACHE_SIZE = 20_000
_MATHEMATICS = ("text", "exact", "guard")
"""Stages that show that mathematics is being graded: workers are then started ahead of need."""


_pools: weakref.WeakSet[RewardPool] = weakref.WeakSet()


class Item(NamedTuple):
    """One answer to grade; plain tuples of two or three do as well."""

    completion: str
    answer: str
    kind: Kind = "auto"


class _Check(NamedTuple):
    question: Question
    job: Job | Verdict
    ms: float
    """Time spent before the question was asked."""


class RewardPool:
    """Grades answers with up to `workers` symbolic checks at a time, each under `time_limit`
    seconds of wall time, after which its process is killed.

    Processes start when the first mathematical gold is seen. Use it from any thread; in an event
    loop through `asyncio.to_thread` if the loop should go on meanwhile.

    Args:
        workers: processes for symbolic checks; by default one a core, at most 4.
        time_limit: hard wall limit of one check, seconds.
        recycle_after: checks after which a process is replaced.
    """

    def __init__(
        self, workers: int | None = None, *, time_limit: float = 2.0, recycle_after: int = 1000
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not 0 < time_limit < 1e6:
            raise ValueError(f"time_limit must be positive seconds, got {time_limit}")
        self.workers = workers or max(1, min(4, len(os.sched_getaffinity(0))))
        self.time_limit = time_limit
        self.recycle_after = recycle_after
        self._telemetry = Telemetry()
        self._lock = threading.Lock()
        self._cache: OrderedDict[Question, Verdict] = OrderedDict()
        self._manager: Manager | None = None
        self._closed = False
        _pools.add(self)

    def score(
        self, completion: str, answer: str, kind: Kind = "auto", *, lenient: bool = False
    ) -> Result:
        """Grade one answer; never raises, returns within the time limit and a little."""
        return self.score_batch([(completion, answer, kind)], lenient=lenient)[0]

    def score_batch(
        self,
        items: Iterable[Item | Sequence[str]],
        *,
        deadline: float | None = None,
        lenient: bool = False,
    ) -> list[Result]:
        """Grade `(completion, answer[, kind])` items; one result each, in order.

        Args:
            deadline: seconds for the whole batch; what is undecided then is a `timeout`.
        """
        until = None if deadline is None else time.monotonic() + deadline
        graded: list[tuple[Item, Result | _Check]] = []
        for fields in items:
            item = Item(*fields)  # pyright: ignore[reportArgumentType]
            started = time.perf_counter()
            judged = judge(*item, lenient=lenient)
            ms = (time.perf_counter() - started) * 1e3
            if isinstance(judged, Question):
                graded.append((item, _Check(judged, self._ask(judged), ms)))
            else:
                graded.append((item, replace(judged, ms=ms)))
                if judged.stage in _MATHEMATICS and self._manager is None:
                    self._running_manager()
        return [self._recorded(item, result, until) for item, result in graded]

    def stats(self) -> dict[str, Any]:
        """Telemetry's summary, with the processes' `kills`, `timeouts`, `crashes`, `recycled`."""
        with self._lock:
            manager = self._manager
        counts = manager.counts if manager else Manager.no_counts()
        return self._telemetry.summary() | {"processes": dict(counts)}

    def close(self) -> None:
        """Kill the processes; checks under way become errors. Idempotent."""
        with self._lock:
            self._closed = True
            manager, self._manager = self._manager, None
        if manager:
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recorded(self, item: Item, graded: Result | _Check, until: float | None) -> Result:
        result = graded if isinstance(graded, Result) else self._answered(graded, until)
        self._telemetry.record(item.completion, item.answer, result)
        return result

    def _answered(self, check: _Check, until: float | None) -> Result:
        question, job, ms = check
        if isinstance(job, Verdict):
            return replace(question.result(job.status, job.reason, "symbolic"), ms=ms)
        waiting = time.monotonic()
        patience = job.patience if until is None else max(0.0, until - waiting)
        try:
            verdict = job.verdict.result(patience)
        except FutureTimeout:
            job.withdraw()
            ms += (time.monotonic() - waiting) * 1e3
            late = question.result("timeout", "not reached before the deadline", "deadline")
            return replace(late, ms=ms)
        if verdict.status in ("correct", "wrong", "unparseable"):
            with self._lock:
                self._cache[question] = verdict
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
        result = question.result(verdict.status, verdict.reason, "symbolic")
        return replace(result, ms=ms + verdict.ms)

    def _ask(self, question: Question) -> Job | Verdict:
        with self._lock:
            if known := self._cache.get(question):
                self._cache.move_to_end(question)
                return known
        manager = self._running_manager()
        if manager is None:
            return Verdict("error", "the reward pool is closed")
        return manager.submit(question)

    def _running_manager(self) -> Manager | None:
        with self._lock:
            if not self._closed and not (self._manager and self._manager.alive):
                self._manager = Manager(self.workers, self.time_limit, self.recycle_after)
            return self._manager

    def _after_fork(self) -> None:
        """A forked process has no manager thread: start over, leave the parent's workers alone."""
        self._lock = threading.Lock()
        self._telemetry = Telemetry()
        if self._manager:
            self._manager.abandon()
            self._manager = None


_default: RewardPool | None = None
_default_lock = threading.Lock()


def default_pool() -> RewardPool:
    """The process's own pool, made when first asked for."""
    global _default
    with _default_lock:
        if _default is None:
            _default = RewardPool()
        return _default


def _after_fork() -> None:
    global _default_lock
    _default_lock = threading.Lock()
    for pool in list(_pools):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def score(completion: str, answer: str, kind: Kind = "auto", *, lenient: bool = False) -> Result:
    """Grade one completion against the gold `answer`; deterministic, never raises.

    Args:
        completion: what the model wrote; never the prompt.
        kind: `aime` compares whole numbers only, `math` any mathematics, `auto` decides by the
            gold's form. Names of datasets (`aime24`, `amc23`, `math500`, `gsm8k`) do as well.
        lenient: without a box, accept "Answer: X" on the last lines; for evaluation only.
    """
    return default_pool().score(completion, answer, kind, lenient=lenient)


def score_batch(
    items: Iterable[Item | Sequence[str]], *, deadline: float | None = None, lenient: bool = False
) -> list[Result]:
    """`RewardPool.score_batch` of the process's own pool."""
    return default_pool().score_batch(items, deadline=deadline, lenient=lenient)
