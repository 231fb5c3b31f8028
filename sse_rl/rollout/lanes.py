"""The running samples as arrays indexed by state slot, so that a decode step is few numpy calls."""

from __future__ import annotations

import numpy as np

from sse_rl.rollout.sampler import Knobs, uniforms
from sse_rl.rollout.sequence import Sequence
from sse_rl.types import SamplingParams


class Lanes:
    """What is fed next, how to sample, when to stop, and what was sampled so far, for S slots.

    `token` [S] is the last one sampled, not yet fed; `prompt` [S] the prompt's length; `count` [S]
    counts the sampled tokens, `launched` [S] also those still on their way from the device;
    `ticket` [S] tells a slot's samples apart. The record (`tokens`, `logprobs`, `versions`,
    `routing`) is [S, capacity, ...] and grows with the longest completion.
    """

    def __init__(self, slots: int) -> None:
        self.active = np.zeros(slots, bool)
        self.token = np.zeros(slots, np.int64)
        self.prompt = np.zeros(slots, np.int64)
        self.count = np.zeros(slots, np.int64)
        self.launched = np.zeros(slots, np.int64)
        self.ticket = np.zeros(slots, np.int64)
        self.limit = np.zeros(slots, np.int64)
        self.stop_ids = np.full((slots, 1), -1, np.int64)
        self.stop_strings = np.zeros(slots, bool)
        self.tokens = np.zeros((slots, 32), np.int32)
        self.logprobs = np.zeros((slots, 32), np.float32)
        self.versions = np.zeros((slots, 32), np.int32)
        self.routing = np.zeros((slots, 32, 0, 0), np.uint8)
        self._temperature = np.ones(slots, np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self.key = np.zeros(slots, np.uint64)

    def open(self, sequence: Sequence, *, key: int, stop_ids: tuple[int, ...]) -> None:
        """A sample begins in its slot: the prompt is in the cache, nothing is sampled."""
        slot, params = sequence.slot, sequence.job.request.params
        self.active[slot] = True
        self.count[slot] = self.launched[slot] = 0
        self.ticket[slot] += 1
        self.prompt[slot] = sequence.job.length
        self.limit[slot] = sequence.job.limit
        self._set_knobs(slot, params, key)
        self._set_stops(slot, params, stop_ids)

    def rows(self) -> np.ndarray:
        """Slots of the samples that want another token, ascending."""
        return np.flatnonzero(self.active & (self.launched < self.limit))

    def positions(self, slots: np.ndarray) -> np.ndarray:
        """Where each slot's last token stands: so many of its sequence are in the cache."""
        return self.prompt[slots] + self.launched[slots] - 1

    def knobs(self, slots: np.ndarray) -> Knobs:
        """How to sample the next token of each slot."""
        return Knobs(
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
            uniforms(self.key[slots], self.count[slots]),
        )

    def fed(self, slots: np.ndarray, routing: np.ndarray) -> None:
        """`token` went through the model, which chose `routing` [B, L_sse, K] for it."""
        if self.routing.shape[2:] != routing.shape[1:]:
            self.routing = np.zeros(self.tokens.shape + routing.shape[1:], np.uint8)
        self.routing[slots, self.count[slots] - 1] = routing

    def sampled(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        versions: np.ndarray | int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Appends a token to each slot. Returns [B] bool: hit a stop id, reached the limit."""
        at = self.count[slots]
        if at.max() == self.tokens.shape[1]:
            self._grow()
        self.tokens[slots, at] = tokens
        self.logprobs[slots, at] = logprobs
        self.versions[slots, at] = versions
        self.token[slots] = tokens
        self.count[slots] = at + 1
        return (self.stop_ids[slots] == tokens[:, None]).any(1), at + 1 >= self.limit[slots]

    def _grow(self) -> None:
        for name in ("tokens", "logprobs", "versions", "routing"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)], axis=1))

    def _set_knobs(self, slot: int, params: SamplingParams, key: int) -> None:
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self.key[slot] = key

    def _set_stops(self, slot: int, params: SamplingParams, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            wider = ((0, 0), (0, missing))
            self.stop_ids = np.pad(self.stop_ids, wider, constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.stop_strings[slot] = bool(params.stop)
