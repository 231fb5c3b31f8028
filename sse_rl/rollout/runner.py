"""Runs the model on what the scheduler chose: owns the cache, block tables and input buffers.

The number of rows is padded as `padded_rows` says (slot 0 and page 0 are scratch). On a GPU a
decode step, sampling included, is one CUDA graph, see `graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, SSEForCausalLM
from sse_rl.model.cache import padded_rows, prefill_padding
from sse_rl.model.modeling import SSEBlock
from sse_rl.model.projections import join_block
from sse_rl.rollout.arrival import Arrival, send
from sse_rl.rollout.lanes import Lanes
from sse_rl.rollout.sampler import sample
from sse_rl.rollout.scheduler import Piece
from sse_rl.rollout.sequence import Sequence

if TYPE_CHECKING:
    from sse_rl.rollout.graphs import StepGraphs


class Fed(NamedTuple):
    """What the model said about prompt tokens."""

    logits: Tensor
    """[R, V] fp32, of the last tokens of finished prompts."""
    routing: Arrival
    """[T, L_sse, K] uint8, for all tokens fed."""


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
            for block in model.model.layers:
                assert isinstance(block, SSEBlock)
                join_block(block)
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
        self._tables = torch.zeros(slots, self._width, dtype=torch.int64, device=self.device)
        self.graphs: StepGraphs | None = None
        if self.device.type == "cuda":
            from sse_rl.rollout.graphs import StepGraphs

            self.graphs = StepGraphs(
                self._step,
                slots=slots,
                pages=self._width,
                page_size=page_size,
                device=self.device,
            )

    def prefill(self, pieces: list[Piece], between: Callable[[], None] | None = None) -> Fed:
        """Feeds prompt tokens of several jobs, packed into one row. `between` is called after each
        layer is launched, and may launch steps of other slots."""
        if fresh := {piece.job.slot: piece.job.pages for piece in pieces if piece.start == 0}:
            self.cache.reset(self._tensor(np.fromiter(fresh, np.int64)))
            self._map(fresh)
        lengths = [piece.stop - piece.start for piece in pieces]
        tokens = [np.asarray(p.job.request.prompt_token_ids[p.start : p.stop]) for p in pieces]
        positions = [np.arange(p.start, p.stop) for p in pieces]
        starts = [piece.start for piece in pieces]
        slots = [piece.job.slot for piece in pieces]
        fed, padding = sum(lengths), prefill_padding(lengths)
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
            between=between,
        )
        last = [
            end - 1
            for piece, end in zip(pieces, ends, strict=False)
            if piece.stop == piece.job.length
        ]
        rows = np.zeros(padded_rows(len(last)), np.int64)
        rows[: len(last)] = last
        logits = self.model.logits(output.hidden[self._tensor(rows)])[: len(last)]
        return Fed(logits, Arrival(output.routing_ids[:fed]))

    def first(self, slots: np.ndarray, logits: Tensor, lanes: Lanes) -> Arrival:
        """Samples the first token of each slot from the prompts' logits [B, V]: tokens [B] and
        log-probs [B]."""
        if self.graphs is not None:
            return self.graphs.first(slots, logits, lanes)
        return Arrival(*sample(logits, lanes.knobs(slots)))

    def decode(self, slots: np.ndarray, lanes: Lanes) -> Arrival:
        """Feeds each slot's last token and samples the next: tokens [B], log-probs [B] and the fed
        tokens' routing [B, L_sse, K] uint8. On a GPU the last token may still be on its way."""
        positions = lanes.positions(slots)
        longest = int(positions.max()) + 1
        if self.graphs is not None:
            return self.graphs.step(slots, longest)
        inputs = np.zeros((3, padded_rows(len(slots))), np.int64)
        inputs[:, : len(slots)] = lanes.token[slots], positions, slots
        fed, at, index = torch.from_numpy(inputs)
        logits, routing = self._step(fed, at, index, -(-longest // self._page_size))
        tokens, logprobs = sample(logits[: len(slots)], lanes.knobs(slots))
        return Arrival(tokens, logprobs, routing[: len(slots)])

    def fork(self, sequences: list[Sequence]) -> None:
        """Gives samples their prompt's state and a copy of its last page where that is not full."""
        states, pages = [], []
        for sequence in sequences:
            if sequence.inherits:
                continue
            job = sequence.job
            states.append((job.slot, sequence.slot))
            full, rest = divmod(job.length, self._page_size)
            if rest and job.pages:
                pages.append((job.pages[full], sequence.pages[full]))
        for pairs, copy in ((states, self.cache.fork), (pages, self.cache.copy_pages)):
            if pairs:
                copy(*self._tensor(np.array(pairs).T.copy()))
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

    def _step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, pages: int
    ) -> tuple[Tensor, Tensor]:
        """One token [R] of each slot [R] -> logits [R, V] fp32 and routing [R, L_sse, K] uint8."""
        output = self.model.packed(
            tokens,
            PackedInputs(
                cu_seqlens=torch.arange(len(tokens) + 1, device=self.device),
                positions=positions,
                max_seqlen=1,
                cache=self.cache,
                slots=slots,
                block_table=self._tables[slots, :pages],
                context_lens=positions,
                max_context=pages * self._page_size,
            ),
        )
        return self.model.logits(output.hidden), output.routing_ids

    def _map(self, pages: Mapping[int, list[int]]) -> None:
        """Sets the block tables of slots."""
        rows = np.zeros((len(pages), self._width), np.int64)
        for row, mine in zip(rows, pages.values(), strict=True):
            row[: len(mine)] = mine
        slots = self._tensor(np.fromiter(pages, np.int64))
        self._tables.index_copy_(0, slots, self._tensor(rows))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return send(array, self.device)
