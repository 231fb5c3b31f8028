"""Runs the model on what the scheduler chose: owns the cache, block tables and input buffers.

On the CPU the number of rows is padded to a multiple of 8, at least 16 (slot 0 and page 0 are
scratch): matrix products of fewer rows round differently, and a request's result would depend on
its company.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.model import PackedInputs, SlotCache, SSEForCausalLM
from sse_rl.rollout.scheduler import Piece
from sse_rl.rollout.sequence import Job, Sequence


class Fed(NamedTuple):
    """What the model said about the tokens of a call."""

    logits: Tensor
    """[R, V] fp32: every row of a decode step; of a prefill the last rows of finished prompts."""
    routing: np.ndarray
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
        width = -(-max_model_len // page_size)
        self._tables = torch.zeros(slots, width, dtype=torch.int64, device=self.device)
        self._inputs = torch.zeros(3, _bucket(slots), dtype=torch.int64, device=self.device)
        self._cu_seqlens = torch.arange(_bucket(slots) + 1, device=self.device)

    def prefill(self, pieces: list[Piece]) -> Fed:
        """Feeds prompt tokens of several jobs, packed into one row."""
        for piece in pieces:
            if piece.start == 0:
                self.cache.reset([piece.job.slot])
                self._map(piece.job.slot, piece.job.pages)
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
        count, rows = len(slots), _bucket(len(slots))
        inputs = np.zeros((3, rows), np.int64)
        inputs[:, :count] = tokens, positions, slots
        self._inputs[:, :rows].copy_(torch.from_numpy(inputs))
        context = int(positions.max()) + 1
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
            self._map(sequence.slot, sequence.pages)

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

    def _map(self, slot: int, pages: list[int]) -> None:
        self._tables[slot] = 0
        self._tables[slot, : len(pages)] = self._tensor(np.asarray(pages, np.int64))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _bucket(rows: int) -> int:
    return max(16, -(-rows // 8) * 8)
