"""The rollout engine: continuous batching of one model.

It knows nothing of Ray, of rewards, or of tokenization beyond a `decode` callable for stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.model import SSEForCausalLM
from sse_rl.rollout.arrival import Arrival
from sse_rl.rollout.lanes import Lanes
from sse_rl.rollout.runner import Runner
from sse_rl.rollout.sampler import check, stream_key
from sse_rl.rollout.scheduler import CHUNK, Piece, Scheduler
from sse_rl.rollout.sequence import Job, Sequence
from sse_rl.rollout.stops import Decode, ended_by
from sse_rl.types import Completion, FinishReason, Request, SamplingParams


@dataclass(slots=True)
class Stats:
    """Sums since the engine was built."""

    slots: int
    tokens: int = 0
    """Sampled."""
    prefills: int = 0
    """Calls of the model with prompt tokens."""
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    """Fed one at a time: rows of all decode steps."""
    seconds: float = 0.0
    """Inside `step`."""
    waited: float = 0.0
    """Of these, for the device."""

    @property
    def slot_use(self) -> float:
        """Mean share of the slots that a decode step fed."""
        return self.decode_tokens / (self.decode_steps * self.slots) if self.decode_steps else 0.0


class _Flight(NamedTuple):
    """One token for each of some slots, on its way from the device."""

    slots: np.ndarray
    tickets: np.ndarray
    """The slots' samples; one that ended meanwhile wants no more."""
    versions: np.ndarray
    """Of the weights, for each slot."""
    arrival: Arrival
    """Tokens and log-probs [B]; of a decode step also the routing [B, L_sse, K]."""


class Engine:
    """Samples completions of many prompts together, one token a step.

    A prompt is prefilled once and its state forked into n samples. What a request gets depends on
    the weights, its prompt and its parameters only: random numbers are counted, not drawn from a
    shared generator, and on the CPU results are equal to the bit whatever runs beside it.

    Args:
        max_num_seqs: samples that run together.
        num_pages, page_size: KV pages (page 0 is scratch) and tokens in each, a multiple of 16.
        max_num_batched_tokens: prompt tokens fed in a step at most, at least 64.
        eos_token_ids: end a completion unless its request has `ignore_eos`.
        max_model_len: prompt and completion together.
        decode: token ids to text, for stop strings.
        state_dtype: of the recurrent state.
        seed: mixed into the seed of every request.
    """

    def __init__(
        self,
        model: SSEForCausalLM,
        *,
        max_num_seqs: int,
        num_pages: int,
        page_size: int,
        max_num_batched_tokens: int,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        decode: Decode | None = None,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        _require(max_num_seqs >= 1, f"max_num_seqs = {max_num_seqs}: must be at least 1")
        _require(num_pages >= 2, f"num_pages = {num_pages}: must be at least 2, page 0 is scratch")
        _require(
            page_size >= 16 and page_size % 16 == 0,
            f"page_size = {page_size}: must be a multiple of 16",
        )
        _require(
            max_num_batched_tokens >= CHUNK,
            f"max_num_batched_tokens = {max_num_batched_tokens}: must be at least {CHUNK}",
        )
        _require(max_model_len >= 2, f"max_model_len = {max_model_len}: must be at least 2")
        self._scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            num_pages=num_pages,
            page_size=page_size if model.config.attention_layers else None,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        slots = max_num_seqs + 2  # scratch, and the prompt that waits for its next wave
        self._runner = Runner(
            model,
            slots=slots,
            pages=num_pages,
            page_size=page_size,
            max_model_len=max_model_len,
            state_dtype=state_dtype,
        )
        self._lanes = Lanes(slots)
        self._running: dict[int, Sequence] = {}
        self._flights: deque[_Flight] = deque()
        self._ahead = 0 if self._runner.graphs is None else 1
        self._vocab_size: int = model.config.vocab_size
        self._eos = tuple(eos_token_ids)
        self._max_model_len = max_model_len
        self._decode_text = decode
        self._seed = seed
        self.version = 0
        self.stats = Stats(slots=max_num_seqs)

    @property
    def busy(self) -> bool:
        """Some request is not finished."""
        return bool(self._scheduler.jobs)

    def add(self, request: Request) -> None:
        """Queues a request. ValueError, naming the numbers, for one that can never be served."""
        prompt, params = request.prompt_token_ids, request.params
        name = f"request {request.request_id!r}"
        check(params)
        _require(len(prompt) > 0, f"{name} has an empty prompt")
        _require(
            len(prompt) < self._max_model_len,
            f"{name} has a prompt of {len(prompt)} tokens, which leaves no room for a completion "
            f"in max_model_len = {self._max_model_len}",
        )
        _require(
            min(prompt) >= 0 and max(prompt) < self._vocab_size,
            f"{name} has token ids from {min(prompt)} to {max(prompt)}, the vocabulary has "
            f"{self._vocab_size}",
        )
        _require(
            not params.stop or self._decode_text is not None,
            f"{name} has stop strings {params.stop!r}, but the engine was given no decode callable",
        )
        limit = min(params.max_tokens, self._max_model_len - len(prompt))
        self._scheduler.add(Job(request, limit))

    def step(self) -> list[Completion]:
        """Feeds prompts up to the budget and one token to every running sample.

        Returns the completions that ended in this step, in no particular order.
        """
        began = perf_counter()
        with torch.inference_mode():
            finished = self._prefill(self._scheduler.schedule())
            self._start(self._scheduler.start())
            finished += self._land(0) if not self._ahead else []
            finished += self._land(self._ahead if self._decode() else 0)
        self.stats.seconds += perf_counter() - began
        return finished

    def generate(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Serves requests to their end: a list a request, in its samples' order. The engine must be
        idle; if a request is refused, none is served."""
        if self.busy:
            raise RuntimeError(
                "generate() needs an idle engine, use add() and step() beside others"
            )
        results: dict[str, list[Completion]] = {}
        try:
            for request in requests:
                self.add(request)
                results[request.request_id] = []
            while self.busy:
                for completion in self.step():
                    results[completion.request_id].append(completion)
        except BaseException:
            for name in list(self._scheduler.jobs):
                self.abort(name)
            raise
        return [sorted(samples, key=lambda sample: sample.index) for samples in results.values()]

    def abort(self, request_id: str) -> list[Completion]:
        """Drops a request. Returns what its unfinished samples have so far, reason "abort"; those
        that have no token yet are left out. KeyError for an unknown or finished request."""
        job = self._scheduler.jobs[request_id]
        partial = []
        for sequence in job.samples:
            if self._running.pop(sequence.slot, None):
                self._lanes.active[sequence.slot] = False
                if self._lanes.count[sequence.slot]:
                    partial.append(self._completion(sequence, "abort", None))
        self._scheduler.abort(job)
        return partial

    def set_weights(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """Swaps the weights between two steps. Running samples keep their state and go on; each of
        their tokens carries the version that computed its logits."""
        self._runner.load(state_dict)
        self.version = version

    def _prefill(self, pieces: list[Piece]) -> list[Completion]:
        """Feeds prompts. To launch a prefill takes the host as long as several steps take a GPU,
        however few the tokens are: the steps are launched between its layers."""
        finished: list[Completion] = []
        if not pieces:
            return finished

        failed: list[FloatingPointError] = []

        def step() -> None:
            if failed:
                return
            try:
                while self._flights and self._flights[0].arrival.here:
                    finished.extend(self._land(len(self._flights) - 1))
            except FloatingPointError as error:  # raised once the prefill's jobs are whole
                failed.append(error)
                return
            if len(self._flights) <= self._ahead:
                self._decode()

        fed = self._runner.prefill(pieces, step if self._ahead else None)
        row, done = 0, 0
        for job, start, stop in pieces:
            job.routing.append((fed.routing, slice(row, row + stop - start)))
            row += stop - start
            if stop == job.length:
                job.logits, job.version = fed.logits[done : done + 1], self.version
                done += 1
        if failed:
            raise failed[0]
        self.stats.prefills += 1
        self.stats.prefill_tokens += row
        return finished

    def _start(self, sequences: list[Sequence]) -> None:
        """Forks prompts into their placed samples and draws each one's first token."""
        if not sequences:
            return
        self._runner.fork(sequences)
        for sequence in sequences:
            request = sequence.job.request
            stop_ids = request.params.stop_token_ids
            if not request.params.ignore_eos:
                stop_ids = self._eos + stop_ids
            key = self._stream(request.params, sequence.index)
            self._lanes.open(sequence, key=key, stop_ids=stop_ids)
            self._running[sequence.slot] = sequence
        logits = torch.cat([_present(sequence.job.logits) for sequence in sequences])
        slots = np.array([sequence.slot for sequence in sequences])
        versions = np.array([sequence.job.version for sequence in sequences])
        self._launch(slots, versions, self._runner.first(slots, logits, self._lanes))

    def _stream(self, params: SamplingParams, index: int) -> int:
        seed, index = (params.seeds[index], 0) if params.seeds else (params.seed, index)
        return stream_key(self._seed, seed, index)

    def _decode(self) -> bool:
        """Launches a step of all running samples; whether there are any."""
        slots = self._lanes.rows()
        if not len(slots):
            return False
        arrival = self._runner.decode(slots, self._lanes)
        self._launch(slots, np.full(len(slots), self.version), arrival)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(slots)
        return True

    def _launch(self, slots: np.ndarray, versions: np.ndarray, arrival: Arrival) -> None:
        self._flights.append(_Flight(slots, self._lanes.ticket[slots], versions, arrival))
        self._lanes.launched[slots] += 1

    def _land(self, flying: int) -> list[Completion]:
        """Takes in what was launched, but for the last `flying`."""
        finished = []
        while len(self._flights) > flying:
            finished += self._take(self._flights.popleft())
        return finished

    def _take(self, flight: _Flight) -> list[Completion]:
        began = perf_counter()
        lanes, results = self._lanes, flight.arrival.wait()
        self.stats.waited += perf_counter() - began
        live = lanes.active[flight.slots] & (lanes.ticket[flight.slots] == flight.tickets)
        slots, versions = flight.slots[live], flight.versions[live]
        tokens, logprobs, *routing = (x[live] for x in results)
        if not len(slots):
            return []
        if routing:
            lanes.fed(slots, *routing)
        if np.isnan(logprobs).any():
            at = int(np.isnan(logprobs).argmax())
            sequence = self._running[int(slots[at])]
            raise FloatingPointError(
                f"request {sequence.job.request.request_id!r}, sample {sequence.index}: the logits "
                f"are not numbers (weights of version {versions[at]})"
            )
        stopped, full = self._lanes.sampled(slots, tokens, logprobs, versions)
        self.stats.tokens += len(slots)
        finished = []
        for at in np.flatnonzero(stopped | full | self._lanes.stop_strings[slots]):
            sequence = self._running[int(slots[at])]
            reason = None
            if stopped[at]:
                reason = self._stop_token(sequence, int(tokens[at]))
            elif (string := self._stop_string(sequence)) is not None:
                stopped[at], reason = True, string
            if stopped[at] or full[at]:
                finished.append(self._finish(sequence, "stop" if stopped[at] else "length", reason))
        return finished

    def _stop_token(self, sequence: Sequence, token: int) -> int | None:
        is_end = token in self._eos and not sequence.job.request.params.ignore_eos
        return None if is_end else token

    def _stop_string(self, sequence: Sequence) -> str | None:
        stops = sequence.job.request.params.stop
        if not stops or self._decode_text is None:
            return None
        tokens = self._lanes.tokens[sequence.slot, : self._lanes.count[sequence.slot]]
        return ended_by(tokens, stops, self._decode_text)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None
    ) -> Completion:
        completion = self._completion(sequence, reason, stop_reason)
        del self._running[sequence.slot]
        self._lanes.active[sequence.slot] = False
        self._scheduler.finish(sequence)
        return completion

    def _completion(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None
    ) -> Completion:
        lanes, slot = self._lanes, sequence.slot
        count = int(lanes.count[slot])
        pieces = [arrival.wait()[0][rows] for arrival, rows in sequence.job.routing]
        prompt = np.concatenate(pieces)
        own = lanes.routing[slot, : count - 1].reshape(count - 1, *prompt.shape[1:])
        return Completion(
            request_id=sequence.job.request.request_id,
            index=sequence.index,
            token_ids=lanes.tokens[slot, :count].copy(),
            logprobs=lanes.logprobs[slot, :count].copy(),
            routing=np.concatenate([prompt, own]),
            versions=lanes.versions[slot, :count].copy(),
            finish_reason=reason,
            stop_reason=stop_reason,
        )


def _present(logits: Tensor | None) -> Tensor:
    assert logits is not None, "a sample started before its prompt was fed"
    return logits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
