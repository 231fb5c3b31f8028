"""When a run evaluates: between two steps, or beside the training on workers of its own.

Both give the same scores, since an evaluation depends on weights and seeds alone. The weights of an
evaluation beside the training lie in the run's folder until it has ended, so that a killed run that
has moved on still finishes it.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray

from sse_rl.errors import Interrupted
from sse_rl.pipeline.checkpoint import MANIFEST, atomic_folder, is_complete
from sse_rl.pipeline.rollouts import RolloutPool

WEIGHTS, INDEX, BUFFER = "weights", "index.pkl", "buffer.npy"
POLL_S = 0.5


def is_due(step: int, every: int) -> bool:
    """Whether the weights after `step` steps are evaluated before training goes on."""
    return step == 0 or bool(every and step % every == 0)


def discard_after(run_dir: Path, step: int) -> None:
    """Remove the evaluations of steps after `step`, which a resumed run makes anew."""
    for folder in (run_dir / "eval").glob("*-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder)


@dataclass(frozen=True, slots=True)
class BetweenSteps:
    """Training waits for its evaluations."""

    evaluate: Callable[[int], dict[str, float]]
    """Evaluates the weights that are published now, as those of a step."""
    every: int

    def scores(self, step: int) -> dict[str, float]:
        """What the weights of `step` score, {} if they are not due."""
        return self.evaluate(step) if is_due(step, self.every) else {}

    def finish(self, step: int) -> dict[str, float]:
        """Evaluate the last weights."""
        return self.evaluate(step)


class Beside:
    """Evaluations on a pool of their own, one at a time, in a thread.

    trained: the pool whose weights are evaluated. pool: the one that evaluates them. evaluate:
    called with a step and a function that raises once it should stop. interrupted: raises once the
    run was asked to stop.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every: int,
        trained: RolloutPool,
        pool: RolloutPool,
        evaluate: Callable[[int, Callable[[], None]], dict[str, float]],
        interrupted: Callable[[], None],
    ) -> None:
        self._eval_dir = run_dir / "eval"
        self._every = every
        self._trained, self._pool = trained, pool
        self._evaluate = evaluate
        self._interrupted = interrupted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._started: deque[tuple[int, Future[dict[str, float]]]] = deque()
        self._closed = threading.Event()
        for step in sorted(self._left()):
            self._submit(step)

    def scores(self, step: int) -> dict[str, float]:
        """Start the evaluation of `step` if it is due, once the one before it has ended.

        Returns what an evaluation that ended scored, with its step as `eval/step`, or {}. Raises
        what it raised.
        """
        if is_due(step, self._every):
            self._start(step)
        if not self._started or not self._started[0][1].done():
            return {}
        evaluated, future = self._started.popleft()
        return {"eval/step": evaluated} | future.result()

    def finish(self, step: int) -> dict[str, float]:
        """Evaluate the last weights, and wait for all that was started; {}."""
        self._start(step)
        self._wait()
        return {}

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, step: int) -> None:
        if step in dict(self._started):  # a former attempt left it
            return
        self._wait()
        index, buffer = self._trained.weights
        assert index.version == step
        with atomic_folder(self._weights(step)) as folder:
            np.save(folder / BUFFER, ray.get(buffer))
            (folder / INDEX).write_bytes(pickle.dumps(index))
        self._submit(step)

    def _submit(self, step: int) -> None:
        self._started.append((step, self._thread.submit(self._run, step)))

    def _run(self, step: int) -> dict[str, float]:
        folder = self._weights(step)
        index = pickle.loads((folder / INDEX).read_bytes())
        self._pool.set_weights(index, ray.put(np.load(folder / BUFFER)))
        scores = self._evaluate(step, self._check)
        (folder / MANIFEST).unlink()  # first, so that a kill leaves no folder that seems whole
        shutil.rmtree(folder)
        return scores

    def _check(self) -> None:
        if self._closed.is_set():
            raise Interrupted
        self._interrupted()

    def _wait(self) -> None:
        for _, future in self._started:
            while not future.done():
                self._interrupted()
                time.sleep(POLL_S)
            future.result()

    def _weights(self, step: int) -> Path:
        return self._eval_dir / f"{WEIGHTS}-{step}"

    def _left(self) -> Iterator[int]:
        """Steps whose evaluation a former attempt at the run did not end."""
        for folder in self._eval_dir.glob(f"{WEIGHTS}-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdigit() and is_complete(folder):
                yield int(number)
