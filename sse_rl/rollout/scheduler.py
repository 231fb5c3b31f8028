"""Who is fed next: plain Python over counts of slots and pages, the scheduler touches no tensor.

First come, first served, without preemption. A sample is placed only when a slot and the pages of
its whole life are free, so what runs always ends. Only the oldest waiting job may be placed in
part, and what it lacks is there at the latest when all others have ended: nothing deadlocks,
nothing starves.

A prefill is launched as long for one prompt as for sixty, and holds up all that runs. So once the
engine is full, those who wait are placed together: when the places that became free have stood
empty for as long, all steps added up, as a prefill would keep the running samples waiting, which
is the fewest steps lost at any length of the answers; at the latest when a quarter is free.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sse_rl.rollout.pools import PagePool, SlotPool
from sse_rl.rollout.sequence import Job, Sequence

CHUNK = 64
"""Prompts are cut at multiples of the kernels' chunk: the cut then changes no bit of the result."""

_PREFILL_STEPS = 4
"""Decode steps that a prefill delays the running samples by."""
_LARGEST_SHARE = 4
"""One in so many places is empty at most while others wait."""


class Piece(NamedTuple):
    """Prompt tokens start..stop-1 of a job, fed in one step."""

    job: Job
    start: int
    stop: int


class Scheduler:
    """Places jobs into `max_num_seqs` samples' slots, and one more that keeps a prompt for its next
    wave of samples. `page_size` is None for a model without attention, which needs no pages."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        num_pages: int,
        page_size: int | None,
        max_num_batched_tokens: int,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.num_pages = num_pages
        self.page_size = page_size
        self.budget = max_num_batched_tokens
        self.slots = SlotPool(max_num_seqs + 2)
        self.pages = PagePool(num_pages)
        self.jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._starting: list[Sequence] = []
        self._samples = 0
        self._full = 0
        """Samples that ran when the last one was placed, if others had to wait, else 0."""
        self._ended = 0
        """Samples since then."""
        self._empty = 0
        """Sum of `_ended` over the steps since."""

    def add(self, job: Job) -> None:
        """Queues a job. ValueError if its id is in use or if it could never be placed."""
        name = job.request.request_id
        if name in self.jobs:
            raise ValueError(f"request id {name!r} is already in the engine")
        pages, usable = self._first_need(job), self.num_pages - 1
        if pages > usable:
            raise ValueError(
                f"request {name!r} needs {pages} KV pages of {self.page_size} tokens ({job.length} "
                f"of prompt, {job.limit} of completion), the engine has {usable} (num_pages - 1)"
            )
        self.jobs[name] = job
        self._waiting.append(job)

    def schedule(self) -> list[Piece]:
        """Places what fits, if it is time, then deals this step's prompt tokens, oldest first."""
        if self._waiting and self._is_time():
            self._place()
            self._full = self._samples if self._waiting else 0
            self._ended = self._empty = 0
        pieces, budget = [], self.budget
        while self._prefilling and budget > 0:
            job = self._prefilling[0]
            start, left = job.prefilled, job.length - job.prefilled
            take = left if left <= budget else budget // CHUNK * CHUNK
            if take == 0:
                break
            budget -= take
            job.prefilled += take
            pieces.append(Piece(job, start, job.prefilled))
            if job.ready:
                self._prefilling.popleft()
        return pieces

    def start(self) -> list[Sequence]:
        """Samples that are placed and whose prompt is in the cache; they run from now on."""
        ready = [sequence for sequence in self._starting if sequence.job.ready]
        self._starting = [sequence for sequence in self._starting if not sequence.job.ready]
        return ready

    def finish(self, sequence: Sequence) -> None:
        """Frees what a sample held, and forgets its job after the last one."""
        job = sequence.job
        job.samples.remove(sequence)
        self.slots.give(sequence.slot)
        self.pages.give(sequence.pages)
        self._samples -= 1
        self._ended += 1
        if not job.samples and not job.pending:
            del self.jobs[job.request.request_id]

    def abort(self, job: Job) -> None:
        """Frees everything a job holds, its prompt included."""
        for sequence in list(job.samples):
            if sequence in self._starting:
                self._starting.remove(sequence)
            self.finish(sequence)
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._prefilling:
            self._prefilling.remove(job)
        if job.kept:
            self.slots.give(job.slot)
            self.pages.give(job.pages)
        self.jobs.pop(job.request.request_id, None)

    def _is_time(self) -> bool:
        self._empty += self._ended
        return (
            self._empty >= _PREFILL_STEPS * self._full or self._ended >= self._full / _LARGEST_SHARE
        )

    def _place(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if not job.slot and not self._admit(job):
                return
            while job.pending:
                if not self._place_sample(job):
                    return
            self._waiting.popleft()

    def _admit(self, job: Job) -> bool:
        """Takes slot and pages for the prompt, if a first sample fits beside it."""
        slots = 1 if job.request.params.n == 1 else 2
        if (
            self.slots.free < slots
            or self.pages.free < self._first_need(job)
            or self._samples == self.max_num_seqs
        ):
            return False
        job.slot, job.kept = self.slots.take(), True
        job.pages = self.pages.take(self._pages(job.length))
        self._prefilling.append(job)
        return True

    def _place_sample(self, job: Job) -> bool:
        last = job.pending == 1
        need = self._life(job) - (len(job.pages) if last else self._full_pages(job))
        if (
            self._samples == self.max_num_seqs
            or self.pages.free < need
            or (not last and self.slots.free == 0)
        ):
            return False
        if last:
            sequence = Sequence(job, job.placed, job.slot, job.pages + self.pages.take(need), True)
            job.kept = False
        else:
            shared = self.pages.share(job.pages[: self._full_pages(job)])
            own = self.pages.take(need)
            sequence = Sequence(job, job.placed, self.slots.take(), shared + own, False)
        job.placed += 1
        job.samples.append(sequence)
        self._starting.append(sequence)
        self._samples += 1
        return True

    def _first_need(self, job: Job) -> int:
        """Pages for the prompt and one sample of it."""
        if job.request.params.n == 1:
            return self._life(job)
        return self._pages(job.length) + self._life(job) - self._full_pages(job)

    def _life(self, job: Job) -> int:
        return self._pages(job.length + job.limit - 1)  # the last sampled token is never fed

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size) if self.page_size else 0

    def _full_pages(self, job: Job) -> int:
        return job.length // self.page_size if self.page_size else 0
