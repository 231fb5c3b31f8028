"""Runs the model on what the scheduler chose: owns the cache, block tables and input buffers.

The number of rows is padded to a multiple of 8, at least 16 (slot 0 and page 0 are scratch): on the
CPU, matrix products of fewer rows round differently, and a request's result would depend on its
company. On a GPU a decode step is one CUDA graph for each padded number of rows and of pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, SSEForCausalLM
from sse_rl.model.mixer import SSEMixer
from sse_rl.model.projections import join_projections
from sse_rl.rollout.scheduler import Piece
from sse_rl.rollout.sequence import Job, Sequence

_GRAPH_ROWS = 32
"""Graphs are captured for multiples of this many rows."""


class Fed(NamedTuple):
    """What the model said about the tokens of a call."""

    logits: Tensor
    """[R, V] fp32: every row of a decode step; of a prefill the last rows of finished prompts."""
    routing: np.ndarray
    """[T, L_sse, K] uint8, for all tokens fed."""


class _Graph(NamedTuple):
    replay: torch.cuda.CUDAGraph
    logits: Tensor
    routing: Tensor


class Runner:
    """A model in evaluation mode, the state of `slots` sequences and `pages` of keys and values."""

    def __init__(
        self,
        model: SSEForCausalLM,
        *,
        slots: int,
        pages: int,
        page_size: int,
        max_model_len: int,
        state_dtype: torch.dtype,
    ) -> None:
        self.model = model.eval()
        parameter = next(model.parameters())
        self.device = parameter.device
        if self.device.type == "cuda":
            for layer in model.model.layers:
                if isinstance(layer.attn, SSEMixer):
                    join_projections(layer.attn)
        self.cache = SlotCache(
            model.config,
            slots=slots,
            pages=pages,
            page_size=page_size,
            dtype=parameter.dtype,
            state_dtype=state_dtype,
            device=self.device,
        )
        self._page_size = page_size
        self._width = -(-max_model_len // page_size)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        rows = _bucket(slots, _GRAPH_ROWS)
        self._tables = torch.zeros(slots, self._width, dtype=torch.int64, device=self.device)
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=self.device)
        self._cu_seqlens = torch.arange(rows + 1, device=self.device)

    def prefill(self, pieces: list[Piece]) -> Fed:
        """Feeds prompt tokens of several jobs, packed into one row."""
        if fresh := {piece.job.slot: piece.job.pages for piece in pieces if piece.start == 0}:
            self.cache.reset(list(fresh))
            self._map(fresh)
        lengths = [piece.stop - piece.start for piece in pieces]
        tokens = [np.asarray(p.job.request.prompt_token_ids[p.start : p.stop]) for p in pieces]
        positions = [np.arange(p.start, p.stop) for p in pieces]
        starts = [piece.start for piece in pieces]
        slots = [piece.job.slot for piece in pieces]
        fed = sum(lengths)
        padding = _bucket(fed) - fed
        if max(lengths) == 1 and padding < 2:
            padding += 8  # pieces of one token only would take the recurrent path
        if padding:
            tokens.append(np.zeros(padding, np.int64))
            positions.append(np.arange(padding))
            lengths.append(padding)
            starts.append(0)
            slots.append(0)
        ends = np.cumsum(lengths)
        context = max(start + length for start, length in zip(starts, lengths, strict=True))
        index = self._tensor(np.asarray(slots))
        output = self.model.packed(
            self._tensor(np.concatenate(tokens)),
            PackedInputs(
                cu_seqlens=self._tensor(np.concatenate([[0], ends])),
                positions=self._tensor(np.concatenate(positions)),
                max_seqlen=max(lengths),
                cache=self.cache,
                slots=index,
                block_table=self._tables[index, : -(-context // self._page_size)],
                context_lens=self._tensor(np.asarray(starts)),
                max_context=context,
            ),
        )
        last = [
            end - 1
            for piece, end in zip(pieces, ends, strict=False)
            if piece.stop == piece.job.length
        ]
        rows = np.zeros(_bucket(len(last)), np.int64)
        rows[: len(last)] = last
        logits = self.model.logits(output.hidden[self._tensor(rows)])[: len(last)]
        return Fed(logits, output.routing_ids[:fed].cpu().numpy())

    def decode(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> Fed:
        """Feeds one token to each slot, [B] each; `positions` counts what the cache holds."""
        count, context = len(slots), int(positions.max()) + 1
        if self.device.type == "cuda":
            logits, routing = self._replay(slots, tokens, positions, context)
        else:
            rows = _bucket(count)
            self._fill(rows, slots, tokens, positions)
            logits, routing = self._step(rows, context)
        return Fed(logits[:count], routing[:count].cpu().numpy())

    def fork(self, job: Job, sequences: list[Sequence]) -> None:
        """Gives samples their prompt's state and a copy of its last page where that is not full."""
        copies = [sequence for sequence in sequences if not sequence.inherits]
        if copies:
            self.cache.fork(job.slot, [sequence.slot for sequence in copies])
        full, rest = divmod(job.length, self._page_size)
        for sequence in sequences:
            if rest and job.pages and not sequence.inherits:
                self.cache.copy_page(job.pages[full], sequence.pages[full])
        self._map({sequence.slot: sequence.pages for sequence in sequences})

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies weights into the model in place; all of them, or none and a ValueError."""
        own = self.model.state_dict()
        missing, unknown = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
        if missing or unknown:
            raise ValueError(f"weights: missing {sorted(missing)}, unknown {sorted(unknown)}")
        for name, tensor in own.items():
            if tensor.shape != state_dict[name].shape:
                shapes = f"{tuple(state_dict[name].shape)}, the model has {tuple(tensor.shape)}"
                raise ValueError(f"weights: {name} has shape {shapes}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])

    def _fill(
        self, rows: int, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray
    ) -> None:
        inputs = np.zeros((3, rows), np.int64)
        inputs[:, : len(slots)] = tokens, positions, slots
        self._inputs[:, :rows].copy_(torch.from_numpy(inputs))

    def _replay(
        self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray, context: int
    ) -> tuple[Tensor, Tensor]:
        """The decode step as a graph, captured on first use. What it returns is overwritten by the
        next step, of any size."""
        rows = _bucket(len(slots), _GRAPH_ROWS)
        pages = min(1 << (-(-context // self._page_size) - 1).bit_length(), self._width)
        if (rows, pages) not in self._graphs:
            self._graphs[rows, pages] = self._capture(rows, pages * self._page_size)
        graph = self._graphs[rows, pages]
        self._fill(rows, slots, tokens, positions)
        graph.replay.replay()
        return graph.logits, graph.routing

    def _capture(self, rows: int, context: int) -> _Graph:
        self._inputs.zero_()  # the runs before the capture touch scratch alone
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(rows, context)
        torch.cuda.current_stream().wait_stream(stream)
        pool = next((graph.replay.pool() for graph in self._graphs.values()), None)
        replay = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replay, pool=pool):
            logits, routing = self._step(rows, context)
        return _Graph(replay, logits, routing)

    def _step(self, rows: int, context: int) -> tuple[Tensor, Tensor]:
        tokens, positions, slots = self._inputs[:, :rows]
        output = self.model.packed(
            tokens,
            PackedInputs(
                cu_seqlens=self._cu_seqlens[: rows + 1],
                positions=positions,
                max_seqlen=1,
                cache=self.cache,
                slots=slots,
                block_table=self._tables[slots, : -(-context // self._page_size)],
                context_lens=positions,
                max_context=context,
            ),
        )
        return self.model.logits(output.hidden), output.routing_ids

    def _map(self, pages: Mapping[int, list[int]]) -> None:
        """Sets the block tables of slots."""
        rows = np.zeros((len(pages), self._width), np.int64)
        for row, mine in zip(rows, pages.values(), strict=True):
            row[: len(mine)] = mine
        self._tables[list(pages)] = self._tensor(rows)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _bucket(rows: int, multiple: int = 8) -> int:
    return max(16, -(-rows // multiple) * multiple)
