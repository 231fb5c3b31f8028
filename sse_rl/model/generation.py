"""The cache behind `generate()`: a `SlotCache` whose slots are the rows of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sse_rl.model.cache import PackedInputs, SlotCache
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.padding import Unpadded


class GenerationCache:
    """Row b owns slot 1 + b and equally many pages as every other row; pages grow by doubling."""

    is_compileable = False

    def __init__(
        self, config: SSEConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.rows = rows
        self.pages_per_row = 1
        self.columns = 0
        """Columns of the padded batch seen so far."""
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        """[rows], tokens of each row seen so far, padding left out."""
        self.cache = SlotCache(config, slots=1 + rows, pages=1 + rows, dtype=dtype, device=device)

    def extend(self, batch: Unpadded) -> PackedInputs:
        """The inputs of a call that adds `batch`, one piece a row, to what is cached."""
        if batch.shape[0] != self.rows:
            raise ValueError(f"past_key_values: holds {self.rows} rows, input {batch.shape[0]}")
        added = batch.seqs.cu_seqlens.diff()
        context = self.lengths[batch.row]
        longest = int((context + added).max())
        while longest > self.pages_per_row * self.cache.page_size:
            self._double_pages()
        self.lengths[batch.row] += added
        self.columns += batch.shape[1]
        pages = 1 + torch.arange(self.rows * self.pages_per_row, device=context.device)
        return replace(
            batch.seqs,
            positions=batch.seqs.positions + torch.repeat_interleave(context, added),
            cache=self.cache,
            slots=1 + batch.row,
            block_table=pages.view(self.rows, self.pages_per_row)[batch.row],
            context_lens=context,
            max_context=longest,
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch that need no feeding again."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b continues what was row beam_idx[b]."""
        beam_idx = beam_idx.to(self.lengths.device)
        self.lengths = self.lengths[beam_idx]
        for tensor in self.cache.slotted():
            tensor[1:] = tensor[1 + beam_idx]
        for tensor in self.cache.paged():
            rows = tensor[1:].unflatten(0, (self.rows, self.pages_per_row))
            tensor[1:] = rows[beam_idx].flatten(0, 1)

    def _double_pages(self) -> None:
        for tensors in (self.cache.k, self.cache.v):
            for i, old in enumerate(tensors):
                rows = old[1:].unflatten(0, (self.rows, self.pages_per_row))
                grown = torch.cat((rows, torch.zeros_like(rows)), 1).flatten(0, 1)
                tensors[i] = torch.cat((old[:1], grown))
        self.pages_per_row *= 2
