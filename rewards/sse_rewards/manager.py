"""The thread that owns the worker processes: starts, feeds, times, kills and replaces them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import socket
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from .grader import Question
from .nursery import Nursery, cpu_seconds
from .result import Status

SLOW = 0.25
"""Seconds after which a check counts as slow: it gives its place to another."""
SLOW_PLACES = 2
"""Slow checks that may go on beside the normal ones, a worker."""
DEAD_BEFORE = 0.05
"""A worker lost within so many seconds of a check's begin died idle; the check is asked again."""
START_LIMIT = 120.0
"""Seconds that a worker may take to come up, the import of math-verify included."""
STARVED = 0.05
"""A check that had less than this share of a core until its limit gets as much time again."""
RSS_LIMIT = 500 << 20
COUNTED = ("started", "checks", "kills", "crashes", "recycled", "starved")


class Verdict(NamedTuple):
    status: Status
    reason: str
    ms: float = 0.0
    """Wall time of the check, without waiting for it."""


_CLOSED = Verdict("error", "the reward pool was closed")


class Job:
    """A question on its way, shared by all who ask it meanwhile."""

    def __init__(self, question: Question, patience: float) -> None:
        self.question = question
        self.verdict: Future[Verdict] = Future()
        self.patience = patience
        """Seconds after which a verdict cannot come any more."""
        self.askers = 1
        self.asked_again = False
        """Its first worker was dead before it could begin."""

    def withdraw(self) -> None:
        """One asker gives up; a check that nobody waits for is not begun."""
        self.askers -= 1
        if self.askers == 0:
            self.verdict.cancel()


@dataclass(slots=True, eq=False)
class _Worker:
    socket: socket.socket
    since: float
    """When it was asked for; later, when its check began."""
    process_id: int = 0
    """Known when it has come up."""
    checks: int = 0
    job: Job | None = None
    limit: float = START_LIMIT
    cpu: float = 0.0
    """Processor seconds used before its check."""
    slow: bool = False
    received: bytearray = field(default_factory=bytearray)


class Manager:
    """Runs at most `workers` checks at a time, and some slow ones beside them."""

    def __init__(self, workers: int, time_limit: float, recycle_after: int) -> None:
        self.counts: Counter[str] = self.no_counts()
        self._places = workers
        self._time_limit = time_limit
        self._recycle_after = recycle_after
        self._waiting: deque[Job] = deque()
        self._asked: dict[Question, Job] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._workers: set[_Worker] = set()
        self._nursery: Nursery | None = None
        self._broken = False
        """No worker came up: do not try again before the next question."""
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._silence_bell)
        self._thread = threading.Thread(target=self._run, name="sse-rewards", daemon=True)
        self._thread.start()

    @staticmethod
    def no_counts() -> Counter[str]:
        return Counter(dict.fromkeys(COUNTED, 0))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, question: Question) -> Job:
        """A job for the question; the same question asked twice meanwhile is one job."""
        with self._lock:
            if self._closing:
                job = Job(question, 0.0)
                job.verdict.set_result(_CLOSED)
                return job
            job = self._asked.get(question)
            if job and not job.verdict.cancelled():
                job.askers += 1
                return job
            patience = 2 * START_LIMIT + 2 * (len(self._asked) + 3) * self._time_limit
            job = self._asked[question] = Job(question, patience)
            self._waiting.append(job)
        self._wake()
        return job

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join(5.0)

    def abandon(self) -> None:
        """Drop the sockets in a forked process, so that the workers still notice their owner's
        death; nothing is killed."""
        for worker in self._workers:
            worker.socket.close()
        if self._nursery:
            self._nursery.socket.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._ring.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._feed()
                for key, _ in self._selector.select(self._next_event()):
                    key.data()
                self._watch()
        finally:
            self._shut_down()

    def _feed(self) -> None:
        """Give waiting questions to free workers; ask for as many workers as could be used now,
        and for one ahead of need."""
        free = [w for w in self._workers if w.process_id and not w.job]
        busy = [w for w in self._workers if w.job]
        slow = min(sum(w.slow for w in busy), SLOW_PLACES * self._places)
        places = self._places - (len(busy) - slow)
        while self._waiting and places > 0 and free:
            with self._lock:
                job = self._waiting.popleft()
            if job.asked_again or job.verdict.set_running_or_notify_cancel():
                self._begin(free.pop(), job)
                places -= 1
            else:
                self._forget(job)
        coming = sum(not w.process_id for w in self._workers)
        wanted = max(not self._broken, min(len(self._waiting), places))
        for _ in range(wanted - len(free) - coming):
            self._start()

    def _begin(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.slow, worker.limit = job, False, self._time_limit
        worker.since, worker.cpu = time.monotonic(), cpu_seconds(worker.process_id)
        question = {
            "prediction": job.question.prediction,
            "gold": job.question.gold,
            "seconds": 2 * self._time_limit,
        }
        with contextlib.suppress(OSError):  # a dead worker shows as the end of its socket
            worker.socket.sendall(json.dumps(question).encode() + b"\n")

    def _start(self) -> None:
        if self._nursery is None:
            self._nursery = Nursery()
            self._selector.register(self._nursery.socket, selectors.EVENT_READ, self._lose_nursery)
        worker = _Worker(self._nursery.fork(), time.monotonic())
        self._workers.add(worker)
        receive = functools.partial(self._receive, worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, receive)

    def _next_event(self) -> float | None:
        ends = [
            w.since + (w.limit if w.slow or not w.job else min(SLOW, w.limit))
            for w in self._workers
            if w.job or not w.process_id
        ]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _silence_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)

    def _receive(self, worker: _Worker) -> None:
        if worker not in self._workers:
            return
        try:
            chunk = worker.socket.recv(65536)
        except OSError:
            chunk = b""
        if not chunk:
            self._crashed(worker)
            return
        worker.received += chunk
        if not worker.received.endswith(b"\n"):
            return
        reply = json.loads(worker.received)
        worker.received.clear()
        if not worker.process_id:
            worker.process_id = reply["process_id"]
            self._broken = False
            if self._nursery:
                self._nursery.proven = True
            self.counts["started"] += 1
            return
        worker.checks += 1
        self._settle(worker, _verdict(reply))
        if worker.checks >= self._recycle_after or reply["rss"] > RSS_LIMIT:
            self.counts["recycled"] += 1
            self._discard(worker)

    def _watch(self) -> None:
        """Mark slow checks, kill those past the limit."""
        now = time.monotonic()
        for worker in list(self._workers):
            if now - worker.since >= worker.limit and not worker.process_id:
                self._lose_nursery()
                return
            if worker.job is None:
                continue
            if now - worker.since >= worker.limit:
                self._past_limit(worker)
            elif not worker.slow and now - worker.since >= SLOW:
                worker.slow = True
                if self._waiting:
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, worker.process_id, 10)

    def _past_limit(self, worker: _Worker) -> None:
        first = worker.limit == self._time_limit
        used = cpu_seconds(worker.process_id) - worker.cpu
        if first and used < STARVED * self._time_limit:
            self.counts["starved"] += 1
            worker.limit *= 2
            return
        self.counts["kills"] += 1
        self._discard(worker)
        self._settle(worker, Verdict("timeout", f"over {worker.limit:g} s, killed"))

    def _crashed(self, worker: _Worker) -> None:
        came_up = worker.process_id
        self._discard(worker)
        job = worker.job
        if job and not job.asked_again and time.monotonic() - worker.since < DEAD_BEFORE:
            job.asked_again = True
            with self._lock:
                self._waiting.appendleft(job)
            return
        self.counts["crashes"] += job is not None
        self._settle(worker, Verdict("error", "the worker died in this check"))
        if not came_up:
            self._lose_nursery()

    def _settle(self, worker: _Worker, verdict: Verdict) -> None:
        if (job := worker.job) is None:
            return
        worker.job = None
        self._forget(job)
        self.counts["checks"] += 1
        job.verdict.set_result(verdict._replace(ms=(time.monotonic() - worker.since) * 1e3))

    def _discard(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        if self._nursery and worker.process_id:
            self._nursery.kill(worker.process_id)

    def _fail_waiting(self, verdict: Verdict) -> None:
        while self._waiting:
            with self._lock:
                job = self._waiting.popleft()
            self._forget(job)
            if job.asked_again or job.verdict.set_running_or_notify_cancel():
                job.verdict.set_result(verdict)

    def _forget(self, job: Job) -> None:
        with self._lock:
            if self._asked.get(job.question) is job:
                del self._asked[job.question]

    def _lose_nursery(self) -> None:
        """The nursery died, or never came up: so do its workers; the next question starts over."""
        why = Verdict("error", "the parent of the reward workers died")
        if self._nursery and not self._nursery.proven:
            self._broken = True
            self._fail_waiting(Verdict("error", "no reward worker came up: is math-verify there?"))
        self._end_workers(why)

    def _end_workers(self, why: Verdict) -> None:
        for worker in list(self._workers):
            self._discard(worker)
            self._settle(worker, why)
        if self._nursery:
            self._selector.unregister(self._nursery.socket)
            self._nursery.close()
            self._nursery = None

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
        self._end_workers(_CLOSED)
        self._fail_waiting(_CLOSED)
        self._selector.close()
        self._bell.close()
        self._ring.close()


def _verdict(reply: dict[str, object]) -> Verdict:
    if "error" in reply:
        return Verdict("error", str(reply["error"]))
    if reply["equal"] is None:
        return Verdict("unparseable", str(reply.get("reason", "not read as mathematics")))
    return Verdict("correct", "equal") if reply["equal"] else Verdict("wrong", "not equal")
