"""Packed rows of ragged streams, cut into chunks of equal size that are computed side by side.

A stream is what one state sees: a whole sequence (shared), or the tokens of a sequence that chose
one partition (sparse). Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .routing import Routing
from .rows import gather_rows, scatter_rows

BLOCK = 64
"""No chunk crosses a multiple of this many tokens of its sequence: a prefill may be cut there
without moving any other cut."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where every row lies in [n, size], chunks ordered by their number in their stream.

    Example: streams of 3, 1 and 2 chunks have `levels` [3, 2, 1]; the six chunks are the first ones
    of the streams, longest stream first, then the two second ones, then the third one.
    """

    place: Tensor
    """[P] int64, chunk * size + position of each row; other places are padding."""
    size: int
    levels: list[int]
    """How many streams have a first, second, ... chunk; never rises."""
    order: Tensor
    """[V] int64, streams by falling number of chunks."""

    def pad(self, x: Tensor) -> Tensor:
        """Rows [P, H, D] as chunks [n, H, size, D], zero where padded."""
        shape = sum(self.levels), x.shape[1], self.size, x.shape[2]
        return scatter_rows(x, self._heads(x.shape[1]), shape)

    def unpad(self, x: Tensor) -> Tensor:
        """Chunks [n, H, size, D] as rows [P, H, D]."""
        return gather_rows(x, self._heads(x.shape[1]))

    def sweep(
        self,
        step: Callable[[int, int, Tensor], Tensor],
        state: Tensor,
        keep_final: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Carry the states [V, ...] of all streams through their chunks, one level at a time.

        `step(level, live, states)` moves the first `live` streams past their chunk of that level.
        Returns the states before the chunks of each level and, on request, after the last. A stream
        without rows keeps its state.
        """
        state = state[self.order]
        before, ended = [], []
        for level, live in enumerate(self.levels):
            ended.append(state[live:])
            before.append(state[:live])
            following = [*self.levels, 0][level + 1]
            carried = live if keep_final else following
            state = step(level, carried, state[:carried]) if carried else state[:0]
        if not keep_final:
            return before, None
        final = torch.cat([state, *reversed(ended)])
        return before, final[self.order.argsort()]

    def _heads(self, heads: int) -> Tensor:
        """[P, H] places in [n, H, size]."""
        chunk = self.place.div(self.size, rounding_mode="floor")
        start = self.place + chunk * (self.size * (heads - 1))
        return start[:, None] + torch.arange(heads, device=start.device) * self.size


def cut_streams(routing: Routing, cu_seqlens: Tensor, size: int) -> tuple[Chunks, Chunks]:
    """Chunks of the B shared streams, rows [T], and of the B * N sparse ones, rows [T * K].

    On a GPU this waits for the device: the number of chunks depends on the routing.
    """
    tokens, k = routing.ids.shape
    batch, partitions = len(cu_seqlens) - 1, routing.probs.shape[1]
    sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    block = (torch.arange(tokens, device=sequence.device) - cu_seqlens[sequence]) // BLOCK
    shared = _cut(sequence, block, batch, size)
    stream = (sequence[:, None] * partitions + routing.ids).flatten()
    return shared, _cut(stream, block.repeat_interleave(k), batch * partitions, size)


def _cut(stream: Tensor, block: Tensor, streams: int, size: int) -> Chunks:
    """Chunks of `size` consecutive rows of one stream and one block; rows are in order of time."""
    stream, order = stream.sort(stable=True)
    block = block[order]
    index = torch.arange(len(stream), device=stream.device)
    fresh = torch.ones_like(stream, dtype=torch.bool)
    fresh[1:] = (stream[1:] != stream[:-1]) | (block[1:] != block[:-1])
    offset = index - torch.where(fresh, index, 0).cummax(0).values
    first = offset % size == 0

    count = torch.bincount(stream[first], minlength=streams)
    level = first.cumsum(0) - 1 - (count.cumsum(0) - count)[stream]
    by_count = count.argsort(descending=True, stable=True)
    levels = torch.bincount(level[first])
    chunk = (levels.cumsum(0) - levels)[level] + by_count.argsort()[stream]
    place = torch.empty_like(index)
    place[order] = chunk * size + offset % size
    return Chunks(place, size, levels.tolist(), by_count)
