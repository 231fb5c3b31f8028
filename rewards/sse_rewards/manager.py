"""The thread that owns the worker processes: starts, feeds, times, kills and replaces them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .grader import Question
from .result import Status

SLOW = 0.25
"""Seconds after which a check counts as slow: it gives its place to another."""
SLOW_PLACES = 2
"""Slow checks that may go on beside the normal ones, a worker."""
START_LIMIT = 30.0
RSS_LIMIT = 500 << 20
COUNTED = ("started", "checks", "kills", "crashes", "recycled")


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

    def withdraw(self) -> None:
        """One asker gives up; a check that nobody waits for is not begun."""
        self.askers -= 1
        if self.askers == 0:
            self.verdict.cancel()


@dataclass(slots=True, eq=False)
class _Worker:
    process_id: int
    socket: socket.socket
    checks: int = 0
    job: Job | None = None
    began: float = 0.0
    slow: bool = False
    received: bytearray = field(default_factory=bytearray)

    def give_way(self) -> None:
        """Lower the priority of a slow check."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process_id, 19)


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
        self._nursery: _Nursery | None = None
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="sse-rewards", daemon=True)
        self._thread.start()

    @staticmethod
    def no_counts() -> Counter[str]:
        return Counter(dict.fromkeys(COUNTED, 0))

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
            patience = START_LIMIT + (len(self._asked) + 3) * self._time_limit
            job = self._asked[question] = Job(question, patience)
            self._waiting.append(job)
        self._wake()
        return job

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

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
            self._nursery.abandon()

    def _wake(self) -> None:
        try:
            self._ring.send(b"!")
        except (BlockingIOError, OSError):
            return

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._feed()
                except (OSError, RuntimeError, ValueError) as failure:
                    why = Verdict("error", f"no reward worker could be started: {failure}")
                    self._lose_workers(why)
                    self._fail_one(why)
                for key, _ in self._selector.select(self._next_event()):
                    if key.data is None:
                        self._silence_bell()
                    else:
                        self._receive(key.data)
                self._watch()
        finally:
            self._shut_down()

    def _feed(self) -> None:
        """Give waiting questions to free workers, starting some if there are places, and one
        ahead of need."""
        if not self._workers:
            self._start()
        while self._waiting:
            busy = [w for w in self._workers if w.job]
            slow = sum(w.slow for w in busy)
            if len(busy) - min(slow, SLOW_PLACES * self._places) >= self._places:
                return
            worker = next((w for w in self._workers if not w.job), None) or self._start()
            with self._lock:
                job = self._waiting.popleft()
            if not job.verdict.set_running_or_notify_cancel():
                self._forget(job)
                continue
            worker.job, worker.slow, worker.began = job, False, time.monotonic()
            line = {
                "prediction": job.question.prediction,
                "gold": job.question.gold,
                "seconds": self._time_limit,
            }
            try:
                worker.socket.sendall(json.dumps(line).encode() + b"\n")
            except OSError:
                self._crashed(worker)

    def _start(self) -> _Worker:
        if self._nursery is None:
            self._nursery = _Nursery()
        try:
            process_id, connection = self._nursery.fork()
        except (OSError, RuntimeError):
            self._lose_workers(Verdict("error", "the parent of the reward workers died"))
            self._nursery = _Nursery()
            process_id, connection = self._nursery.fork()
        worker = _Worker(process_id, connection)
        self._workers.add(worker)
        self._selector.register(connection, selectors.EVENT_READ, worker)
        self.counts["started"] += 1
        return worker

    def _next_event(self) -> float | None:
        ends = [
            w.began + (self._time_limit if w.slow else min(SLOW, self._time_limit))
            for w in self._workers
            if w.job
        ]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _silence_bell(self) -> None:
        try:
            self._bell.recv(4096)
        except BlockingIOError:
            return

    def _receive(self, worker: _Worker) -> None:
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
        worker.checks += 1
        self._settle(worker, _verdict(reply))
        if worker.checks >= self._recycle_after or reply["rss"] > RSS_LIMIT:
            self.counts["recycled"] += 1
            self._discard(worker)

    def _watch(self) -> None:
        """Mark slow checks, kill those past the limit."""
        now = time.monotonic()
        for worker in [w for w in self._workers if w.job]:
            if now - worker.began >= self._time_limit:
                self.counts["kills"] += 1
                self._discard(worker)
                self._settle(worker, Verdict("timeout", f"over {self._time_limit:g} s, killed"))
            elif not worker.slow and now - worker.began >= SLOW:
                worker.slow = True
                worker.give_way()

    def _crashed(self, worker: _Worker) -> None:
        self.counts["crashes"] += worker.job is not None
        self._discard(worker)
        self._settle(worker, Verdict("error", "the worker died in this check"))

    def _settle(self, worker: _Worker, verdict: Verdict) -> None:
        if (job := worker.job) is None:
            return
        worker.job = None
        self._forget(job)
        self.counts["checks"] += 1
        job.verdict.set_result(verdict._replace(ms=(time.monotonic() - worker.began) * 1e3))

    def _discard(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        if self._nursery:
            self._nursery.kill(worker.process_id)

    def _fail_one(self, verdict: Verdict) -> None:
        with self._lock:
            if not self._waiting:
                return
            job = self._waiting.popleft()
        self._forget(job)
        if job.verdict.set_running_or_notify_cancel():
            job.verdict.set_result(verdict)
        self._wake()

    def _forget(self, job: Job) -> None:
        with self._lock:
            if self._asked.get(job.question) is job:
                del self._asked[job.question]

    def _lose_workers(self, why: Verdict) -> None:
        for worker in list(self._workers):
            self._discard(worker)
            self._settle(worker, why)
        if self._nursery:
            self._nursery.close()
            self._nursery = None

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
        self._lose_workers(_CLOSED)
        while self._waiting:
            self._fail_one(_CLOSED)
        self._selector.close()
        self._bell.close()
        self._ring.close()


def _verdict(reply: dict[str, object]) -> Verdict:
    if "error" in reply:
        return Verdict("error", str(reply["error"]))
    if reply["equal"] is None:
        return Verdict("unparseable", str(reply.get("reason", "not read as mathematics")))
    return Verdict("correct", "equal") if reply["equal"] else Verdict("wrong", "not equal")


class _Nursery:
    """The process with math-verify imported, from which workers are forked in milliseconds."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), *(p for p in sys.path if p)]
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sse_rewards.worker"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": path, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._socket = ours
        self._socket.settimeout(START_LIMIT)
        self._number()

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process id and our end of its socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [b"fork".ljust(12)], [theirs.fileno()])
        return self._number(), ours

    def kill(self, process_id: int) -> None:
        """Kill a worker that this nursery forked and has not reaped."""
        try:
            os.kill(process_id, signal.SIGKILL)
            self._socket.sendall(b"%12d" % process_id)
        except OSError:
            return

    def abandon(self) -> None:
        self._socket.close()

    def close(self) -> None:
        """End the process and with it every worker it forked."""
        self._socket.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _number(self) -> int:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = self._socket.recv(1)
            if not byte:
                raise RuntimeError("the process that imports math-verify ended; is it installed?")
            line += byte
        return int(line)
