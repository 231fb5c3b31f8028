"""What a call of the model takes besides tokens, and the tensors that live between calls.

The cache holds tensors only: who owns which slot and page is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sse_rl.model.configuration import SSEConfig

if TYPE_CHECKING:
    from sse_rl.model.fork import Fork

_COPIED = 64
"""Rows copied at once: what they need between is the size of so many states."""


class SlotCache:
    """Recurrent states by slot, keys and values by page.

    Slot 0 and page 0 are scratch: rows that only pad a batch read and write there.

    Attributes:
        state: one a SSE layer, [slots, 1+N, Hv, Dv, Dk], index 0 of axis 1 the shared partition.
        conv: one pair (q, k) a SSE layer, [slots, H*Dk, W-1], the last W-1 inputs of the short
            convolution; empty without `use_short_conv`.
        k, v: one a softmax layer, [pages, page_size, Hkv, D]; k already rotated.
    """

    def __init__(
        self,
        config: SSEConfig,
        *,
        slots: int,
        pages: int,
        page_size: int = 64,
        dtype: torch.dtype,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        heads, key_width, value_width = config.value_heads, config.head_dim, config.value_dim
        state = (slots, 1 + config.num_sparse_partition, heads, value_width, key_width)
        window = (slots, config.num_heads * key_width, config.conv_size - 1)
        recurrent = len(config.sse_layers)
        convolved = recurrent if config.use_short_conv else 0

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = [zeros(state, state_dtype) for _ in range(recurrent)]
        self.conv = [(zeros(window, dtype), zeros(window, dtype)) for _ in range(convolved)]
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        if config.attn is not None:
            page = (pages, page_size, config.attn["num_kv_heads"], config.attn["head_dim"])
            self.k = [zeros(page, dtype) for _ in config.attention_layers]
            self.v = [zeros(page, dtype) for _ in config.attention_layers]

    def slotted(self) -> list[Tensor]:
        """Every tensor whose first axis is the slot."""
        return [*self.state, *(window for pair in self.conv for window in pair)]

    def paged(self) -> list[Tensor]:
        """Every tensor whose first axis is the page."""
        return [*self.k, *self.v]

    def reset(self, slots: Tensor | list[int]) -> None:
        """Zero the states of `slots`, in place. Pages need none: unwritten tokens are masked."""
        index = self._index(slots)
        for tensor in self.slotted():
            tensor.index_fill_(0, index, 0)

    def fork(self, src: Tensor | list[int], dst: Tensor | list[int]) -> None:
        """Copy the state of slot src[i] to slot dst[i], in place; no slot is in both."""
        _copy_rows(self.slotted(), self._index(src), self._index(dst))

    def copy_pages(self, src: Tensor | list[int], dst: Tensor | list[int]) -> None:
        """Copy page src[i] to page dst[i] in every softmax layer, in place."""
        _copy_rows(self.paged(), self._index(src), self._index(dst))

    def _index(self, rows: Tensor | list[int]) -> Tensor:
        device = (self.state or self.k)[0].device
        return torch.as_tensor(rows, dtype=torch.int64, device=device)


def _copy_rows(tensors: list[Tensor], src: Tensor, dst: Tensor) -> None:
    for tensor in tensors:
        for a, b in zip(src.split(_COPIED), dst.split(_COPIED), strict=True):
            tensor.index_copy_(0, b, tensor.index_select(0, a))


@dataclass(slots=True)
class PackedInputs:
    """How the T tokens of a call divide into sequences, and where their past lies.

    Example: two prompts of 3 and 2 tokens, nothing cached:
    `cu_seqlens = [0, 3, 5]`, `positions = [0, 1, 2, 0, 1]`, `max_seqlen = 3`.
    """

    cu_seqlens: Tensor
    """[B+1] int64, where each sequence's piece begins; no piece is empty."""
    positions: Tensor
    """[T] int64, position of each token in its own sequence."""
    max_seqlen: int
    """The longest of this call's pieces."""
    replay: Tensor | None = None
    """[T, L_sse, K] uint8, recorded partitions to use instead of the router's choice."""
    cache: SlotCache | None = None
    """Read and written in place; the next four go with it."""
    slots: Tensor | None = None
    """[B] int64, state slot of each sequence."""
    block_table: Tensor | None = None
    """[B, P] int64, page ids of each sequence, 0-padded, this call's tokens included."""
    context_lens: Tensor | None = None
    """[B] int64, tokens in the cache before this call."""
    max_context: int = 0
    """Largest of context_lens + this call's lengths."""
    fork: Fork | None = None
    """Some pieces continue others of this call; without a cache."""

    @property
    def is_step(self) -> bool:
        """One token a sequence on top of a cache: the recurrent forms apply."""
        return self.cache is not None and self.max_seqlen == 1

    def sequence_of_token(self) -> Tensor:
        """[T] int64, which of the B sequences each token belongs to."""
        tokens = torch.arange(self.positions.shape[0], device=self.positions.device)
        return torch.searchsorted(self.cu_seqlens, tokens, right=True) - 1


def packed_inputs(lengths: list[int], *, device: torch.device | str = "cpu") -> PackedInputs:
    """Whole sequences of these lengths in one row, nothing cached."""
    sizes = torch.tensor([0, *lengths], device=device)
    cu_seqlens = sizes.cumsum(0)
    total = sum(lengths)
    starts = torch.repeat_interleave(cu_seqlens[:-1], sizes[1:], output_size=total)
    positions = torch.arange(total, device=device) - starts
    return PackedInputs(cu_seqlens, positions, max(lengths))


def padded_rows(rows: int) -> int:
    """Rows that a call with a cache is padded to: a multiple of 8, at least 16.

    On the CPU matrix products of fewer rows round differently, and a row's result would depend on
    its company.
    """
    return max(16, -(-rows // 8) * 8)


def prefill_padding(lengths: Sequence[int]) -> int:
    """Tokens of a sequence that pads a prefill of pieces of these lengths.

    Pieces of one token only would take the recurrent path: they get a longer one beside them.
    """
    fed = sum(lengths)
    padding = padded_rows(fed) - fed
    return padding + 8 if max(lengths) == 1 and padding < 2 else padding
