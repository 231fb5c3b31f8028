"""Decode steps as CUDA graphs, from the last sampled tokens to the next ones, nothing on the host.

A graph serves up to so many rows and so many pages a row. Tokens, positions and sampling
parameters lie on the GPU by slot, so that a step takes nothing but the slots of its rows, and
those only when they change: the next step can be queued before the last one's tokens are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.rollout.arrival import Arrival, send
from sse_rl.rollout.lanes import Lanes
from sse_rl.rollout.triton_sampler import SamplerTables, triton_sample

_FEWEST_KEYS = 512
"""Graphs are captured for at least so many tokens a row."""

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(tokens [R], positions [R], slots [R], pages) -> logits [R, V], routing ids [R, L_sse, K]."""


class _Graph(NamedTuple):
    replay: torch.cuda.CUDAGraph
    tokens: Tensor
    logprobs: Tensor
    routing: Tensor


class StepGraphs:
    """Captures a graph for each bucket of rows and of pages when it is first needed.

    Args:
        forward: the model's step on `slots` slots with `pages` pages of `page_size` at most.
    """

    def __init__(
        self, forward: Forward, *, slots: int, pages: int, page_size: int, device: torch.device
    ) -> None:
        self._forward = forward
        self._pages, self._page_size, self._device = pages, page_size, device
        self._tables = SamplerTables(slots, device)
        self._slots = torch.zeros(row_bucket(slots), dtype=torch.int64, device=device)
        self._sent = np.zeros(len(self._slots), np.int64)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def largest(self) -> _Graph:
        """The graph for the most rows and pages so far."""
        return self._graphs[max(self._graphs)]

    def first(self, slots: np.ndarray, logits: Tensor, lanes: Lanes) -> Arrival:
        """Begins the samples of `slots`: their first tokens, from the prompts' logits [B, V]."""
        index = send(slots, self._device)
        self._tables.open(index, lanes, slots)
        return Arrival(*triton_sample(logits, index, self._tables))

    def step(self, slots: np.ndarray, longest: int) -> Arrival:
        """Feeds each slot's last token and samples the next: tokens, log-probs, routing.

        longest: tokens that the longest of the rows attends to.
        """
        rows = row_bucket(len(slots))
        keys = max(longest, _FEWEST_KEYS)
        pages = min(1 << (-(-keys // self._page_size) - 1).bit_length(), self._pages)
        if (rows, pages) not in self._graphs:
            self._graphs[rows, pages] = self._capture(rows, pages)
        graph = self._graphs[rows, pages]
        wanted = np.zeros(rows, np.int64)
        wanted[: len(slots)] = slots
        if not np.array_equal(self._sent[:rows], wanted):
            self._slots[:rows].copy_(send(wanted, self._device))
            self._sent[:rows] = wanted
        graph.replay.replay()
        return Arrival(*(x[: len(slots)] for x in graph[1:]))

    def _capture(self, rows: int, pages: int) -> _Graph:
        self._slots.zero_()  # the run before the capture touches scratch alone
        self._sent[:] = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(rows, pages)
        torch.cuda.current_stream().wait_stream(stream)
        pool = next((graph.replay.pool() for graph in self._graphs.values()), None)
        replay = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replay, pool=pool):
            outputs = self._run(rows, pages)
        return _Graph(replay, *outputs)

    def _run(self, rows: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
        slots, tables = self._slots[:rows], self._tables
        tokens, positions = tables.token[slots], tables.position[slots]
        logits, routing = self._forward(tokens, positions, slots, pages)
        return *triton_sample(logits, slots, tables), routing


def row_bucket(rows: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ...: about a third of a step is padding at most."""
    power = 1 << (max(rows, 16) - 1).bit_length()
    return power * 3 // 4 if power > 32 and rows <= power * 3 // 4 else power
