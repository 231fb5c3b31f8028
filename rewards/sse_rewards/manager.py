"""The thread that owns the worker processes: starts, feeds, times, kills and replaces them."""

from __future__ import annotations

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
COUNTED = ("started", "checks", "timeouts", "crashes", "kills", "recycled")


class Verdict(NamedTuple):
    status: Status
    reason: str


@dataclass(slots=True, eq=False)
class _Worker:
    process_id: int
    socket: socket.socket
    checks: int = 0
    question: Question | None = None
    answer: Future[Verdict] | None = None
    began: float = 0.0
    slow: bool = False
    received: bytearray = field(default_factory=bytearray)


class Manager:
    """Runs at most `workers` checks at a time, and some slow ones beside them."""

    def __init__(self, workers: int, time_limit: float, recycle_after: int) -> None:
        self.counts: Counter[str] = self.no_counts()
        self._places = workers
        self._time_limit = time_limit
        self._recycle_after = recycle_after
        self._waiting: deque[tuple[Question, Future[Verdict]]] = deque()
        self._asked: dict[Question, Future[Verdict]] = {}
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

    def submit(self, question: Question) -> Future[Verdict]:
        """A future verdict; the same question asked twice meanwhile is checked once."""
        with self._lock:
            if (asked := self._asked.get(question)) and not asked.cancelled():
                return asked
            answer: Future[Verdict] = Future()
            self._asked[question] = answer
            self._waiting.append((question, answer))
        self._wake()
        return answer

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join(5.0)

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
                    self._replace_nursery()
                    self._fail_one(f"no reward worker could be started: {failure}")
                for key, _ in self._selector.select(self._next_event()):
                    if key.data is None:
                        self._silence_bell()
                    else:
                        self._receive(key.data)
                self._watch()
        finally:
            self._shut_down()

    def _feed(self) -> None:
        """Give waiting questions to free workers, starting some if there are places."""
        while self._waiting:
            busy = [w for w in self._workers if w.question]
            slow = sum(w.slow for w in busy)
            if len(busy) - min(slow, SLOW_PLACES * self._places) >= self._places:
                return
            worker = next((w for w in self._workers if not w.question), None) or self._start()
            with self._lock:
                question, answer = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                self._forget(question, answer)
                continue
            worker.question, worker.answer, worker.slow = question, answer, False
            worker.began = time.monotonic()
            line = {
                "prediction": question.prediction,
                "gold": question.gold,
                "seconds": self._time_limit,
            }
            try:
                worker.socket.sendall(json.dumps(line).encode() + b"\n")
            except OSError:
                self._crashed(worker)

    def _start(self) -> _Worker:
        if self._nursery is None:
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
            if w.question
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
        for worker in [w for w in self._workers if w.question]:
            if now - worker.began >= self._time_limit:
                self.counts["timeouts"] += 1
                self._discard(worker)
                self._settle(worker, Verdict("timeout", f"over {self._time_limit:g} s, killed"))
            elif not worker.slow and now - worker.began >= SLOW:
                worker.slow = True

    def _crashed(self, worker: _Worker) -> None:
        self.counts["crashes"] += worker.question is not None
        self._discard(worker)
        self._settle(worker, Verdict("error", "the worker died in this check"))

    def _settle(self, worker: _Worker, verdict: Verdict) -> None:
        if worker.question is None or worker.answer is None:
            return
        self._forget(worker.question, worker.answer)
        self.counts["checks"] += 1
        worker.answer.set_result(verdict)
        worker.question = worker.answer = None

    def _discard(self, worker: _Worker) -> None:
        self.counts["kills"] += 1
        self._workers.discard(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        if self._nursery:
            self._nursery.kill(worker.process_id)

    def _fail_one(self, reason: str) -> None:
        with self._lock:
            if not self._waiting:
                return
            question, answer = self._waiting.popleft()
        self._forget(question, answer)
        if answer.set_running_or_notify_cancel():
            answer.set_result(Verdict("error", reason))
        self._wake()

    def _forget(self, question: Question, answer: Future[Verdict]) -> None:
        with self._lock:
            if self._asked.get(question) is answer:
                del self._asked[question]

    def _replace_nursery(self) -> None:
        if self._nursery:
            self._nursery.close()
            self._nursery = None

    def _shut_down(self) -> None:
        self._closing = True
        for worker in list(self._workers):
            self._discard(worker)
            self._settle(worker, Verdict("error", "the reward pool was closed"))
        while self._waiting:
            self._fail_one("the reward pool was closed")
        self._replace_nursery()


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

    def close(self) -> None:
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
