"""Log-probs by the forms that sampled: prompts in chunks, answers token by token.

On the CPU they are the engine's to the bit: there a row's bits depend neither on its company nor on
how a prompt is cut, only on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sse_rl.model.cache import PackedInputs, SlotCache, padded_rows, prefill_padding
from sse_rl.model.modeling import SSEForCausalLM
from sse_rl.types import PackedBatch


@torch.no_grad()
def rescore(
    model: SSEForCausalLM,
    batch: PackedBatch,
    *,
    temperature: float,
    replay: bool,
    page_size: int,
    state_dtype: torch.dtype,
) -> Tensor:
    """log_softmax(logits / temperature) [M] fp32 at the batch's targets, in their order.

    `page_size` and `state_dtype` are the engine's.
    """
    training = model.training
    model.eval()
    try:
        return _Tape(model, batch, page_size, state_dtype, replay=replay).play(temperature)
    finally:
        model.train(training)


class _Tape:
    """One slot for each of the batch's B sequences; slot and page 0 are scratch."""

    def __init__(
        self,
        model: SSEForCausalLM,
        batch: PackedBatch,
        page_size: int,
        state_dtype: torch.dtype,
        *,
        replay: bool,
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.batch, self.device = model, batch, parameter.device
        sizes = np.diff(batch.cu_seqlens)
        self.starts = batch.cu_seqlens[:-1]
        self.prompts = sizes - batch.lengths + 1
        pages = -(-sizes // page_size)
        ends = np.cumsum(pages)
        column = np.arange(pages.max())
        tables = np.where(column < pages[:, None], 1 + (ends - pages)[:, None] + column, 0)
        self.tables = self._tensor(np.concatenate([np.zeros_like(tables[:1]), tables]))
        self.routing = batch.routing if replay else None
        self.cache = SlotCache(
            model.config,
            slots=len(sizes) + 1,
            pages=int(ends[-1]) + 1,
            page_size=page_size,
            dtype=parameter.dtype,
            state_dtype=state_dtype,
            device=self.device,
        )

    def play(self, temperature: float) -> Tensor:
        batch, first = self.batch, np.cumsum(self.batch.lengths) - self.batch.lengths
        targets = self._tensor(batch.targets)
        out = torch.empty(len(batch.targets), device=self.device)

        def score(logits: Tensor, places: np.ndarray) -> None:
            at = self._tensor(places)
            logprobs = (logits[: len(places)].float() / temperature).log_softmax(-1)
            out[at] = logprobs.gather(1, targets[at][:, None])[:, 0]

        score(self._prefill(), first)
        for step in range(1, int(batch.lengths.max())):
            live = np.flatnonzero(batch.lengths > step)
            score(self._step(live, self.prompts[live] + step - 1), first[live] + step)
        return out

    def _prefill(self) -> Tensor:
        """Logits after every prompt."""
        sequence = np.repeat(np.arange(len(self.prompts)), self.prompts)
        ends = np.cumsum(self.prompts)
        offset = np.arange(ends[-1]) - (ends - self.prompts)[sequence]
        places = self.starts[sequence] + offset
        lengths, padding = self.prompts, prefill_padding(self.prompts.tolist())
        slots = np.arange(1, len(lengths) + 1)
        if padding:
            lengths, slots = np.append(lengths, padding), np.append(slots, 0)
            offset = np.append(offset, np.arange(padding))
        last = np.zeros(padded_rows(len(ends)), np.int64)
        last[: len(ends)] = ends - 1
        return self._feed(places, offset, slots, lengths, np.zeros_like(slots), last)

    def _step(self, live: np.ndarray, positions: np.ndarray) -> Tensor:
        """Logits after the token at `positions` of each live sequence."""
        rows = padded_rows(len(live))
        slots, offset = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        slots[: len(live)], offset[: len(live)] = live + 1, positions
        places = self.starts[live] + positions
        return self._feed(places, offset, slots, np.ones(rows, np.int64), offset, np.arange(rows))

    def _feed(
        self,
        places: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        context: np.ndarray,
        read: np.ndarray,
    ) -> Tensor:
        """Feeds the batch's tokens at `places`, then padding; logits of the rows `read`."""
        tokens = np.zeros(len(positions), np.int64)
        tokens[: len(places)] = self.batch.input_ids[places]
        replay = None
        if self.routing is not None:
            replay = np.zeros((len(positions), *self.routing.shape[1:]), np.uint8)
            replay[:] = np.arange(replay.shape[-1], dtype=np.uint8)
            replay[: len(places)] = self.routing[places]
        longest, index = int((context + lengths).max()), self._tensor(slots)
        out = self.model.packed(
            self._tensor(tokens),
            PackedInputs(
                cu_seqlens=self._tensor(np.concatenate([[0], np.cumsum(lengths)])),
                positions=self._tensor(positions),
                max_seqlen=int(lengths.max()),
                replay=None if replay is None else self._tensor(replay),
                cache=self.cache,
                slots=index,
                block_table=self.tables[index, : -(-longest // self.cache.page_size)],
                context_lens=self._tensor(context),
                max_context=longest,
            ),
        )
        return self.model.logits(out.hidden[self._tensor(read)])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
