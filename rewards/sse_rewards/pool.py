"""Grading in bulk: cheap checks in the caller's thread, symbolic ones in processes that get killed.

One manager thread a pool owns all worker processes and never runs sympy, so that the hard wall
limit holds in any thread, event loop or Ray actor. A check that takes long keeps its process, at
lower priority, while a spare one takes its place: bombs do not starve the honest.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any, NamedTuple, Self

from .grader import Question, judge
from .manager import Manager, Verdict
from .result import Kind, Result
from .telemetry import Telemetry

CACHE_SIZE = 20_000
START_LIMIT = 30.0
"""Seconds that the first worker may take to import math-verify."""


class Item(NamedTuple):
    """One answer to grade; plain tuples of two or three do as well."""

    completion: str
    answer: str
    kind: Kind = "auto"


class RewardPool:
    """Grades answers with up to `workers` symbolic checks at a time, each under `time_limit`
    seconds of wall time, after which its process is killed.

    Processes start with the first answer that needs one. Use it from any thread; in an event loop
    through `asyncio.to_thread` if the loop should go on meanwhile.

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
        self._process = os.getpid()
        self._closed = False

    def score(
        self, completion: str, answer: str, kind: Kind = "auto", *, lenient: bool = False
    ) -> Result:
        """Grade one answer; never raises, returns within the time limit and a little."""
        started = time.perf_counter()
        judged = judge(completion, answer, kind, lenient=lenient)
        if isinstance(judged, Question):
            judged = self._finish(judged, self._ask(judged), time.monotonic() + self._patience())
        return self._record(completion, answer, judged, started)

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
        begun = time.monotonic()
        until = begun + (self._patience() if deadline is None else deadline)
        open_checks: list[tuple[int, str, str, Question, Future[Verdict], float]] = []
        results: list[Result | None] = []
        for index, item in enumerate(items):
            completion, answer, kind = Item(*item)  # pyright: ignore[reportArgumentType]
            started = time.perf_counter()
            judged = judge(completion, answer, kind, lenient=lenient)
            if isinstance(judged, Question):
                check = self._ask(judged)
                open_checks.append((index, completion, answer, judged, check, started))
                results.append(None)
            else:
                results.append(self._record(completion, answer, judged, started))
        if deadline is None:
            until += len(open_checks) * self.time_limit
        for index, completion, answer, question, check, started in open_checks:
            result = self._finish(question, check, until)
            results[index] = self._record(completion, answer, result, started)
        return [result for result in results if result is not None]

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
        if manager and self._process == os.getpid():
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _patience(self) -> float:
        return START_LIMIT + 2 * self.time_limit

    def _ask(self, question: Question) -> Future[Verdict]:
        with self._lock:
            if known := self._cache.get(question):
                self._cache.move_to_end(question)
                done: Future[Verdict] = Future()
                done.set_result(known)
                return done
            if self._closed:
                done = Future()
                done.set_result(Verdict("error", "the reward pool is closed"))
                return done
            if self._manager is None or self._process != os.getpid():
                self._process = os.getpid()
                self._manager = Manager(self.workers, self.time_limit, self.recycle_after)
            return self._manager.submit(question)

    def _finish(self, question: Question, check: Future[Verdict], until: float) -> Result:
        try:
            verdict = check.result(max(0.0, until - time.monotonic()))
        except FutureTimeout:
            check.cancel()
            return question.result("timeout", "not reached before the deadline", "deadline")
        if verdict.status in ("correct", "wrong", "unparseable"):
            with self._lock:
                self._cache[question] = verdict
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
        return question.result(verdict.status, verdict.reason, "symbolic")

    def _record(self, completion: str, answer: str, result: Result, started: float) -> Result:
        result = replace(result, ms=(time.perf_counter() - started) * 1e3)
        self._telemetry.record(completion, answer, result)
        return result


_default: RewardPool | None = None
_default_lock = threading.Lock()


def default_pool() -> RewardPool:
    """The process's own pool, made when first asked for; a forked process gets a new one."""
    global _default
    with _default_lock:
        if _default is None or _default._process != os.getpid():
            _default = RewardPool()
        return _default


def _forget_after_fork() -> None:
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


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
