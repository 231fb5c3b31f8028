"""From the batches that Hugging Face callers pass to packed rows, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sse_rl.model.cache import PackedInputs


@dataclass(frozen=True, slots=True)
class Unpadded:
    """The real tokens of a batch [B, L], packed in one row."""

    tokens: Tensor
    """[T] ids or [T, d] embeddings."""
    seqs: PackedInputs
    row: Tensor
    """[n] int64, the batch row that each sequence came from."""
    index: Tensor
    """[T] int64, where each token lay in the flattened batch."""
    shape: tuple[int, int]
    """B, L."""

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one sequence."""
        return bool((self.row[1:] == self.row[:-1]).any())

    def repad(self, x: Tensor) -> Tensor:
        """x [T, ...] -> [B, L, ...], zero where the batch was padded."""
        batch, length = self.shape
        if x.shape[0] == batch * length:
            return x.unflatten(0, self.shape)
        flat = x.new_zeros(batch * length, *x.shape[1:])
        return flat.index_copy(0, self.index, x).unflatten(0, self.shape)


def unpad(
    tokens: Tensor,
    *,
    attention_mask: Tensor | None,
    starts: Tensor,
    routing: Tensor | None = None,
) -> Unpadded:
    """tokens [B, L] or [B, L, d], with the sequence starts that `sequence_starts` found.

    Raises:
        ValueError: nothing but padding, or a `routing` of another shape.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is None:
        index = torch.arange(batch * length, device=tokens.device)
    else:
        index = attention_mask.flatten().nonzero()[:, 0]
    total = index.shape[0]
    if total == 0:
        raise ValueError("attention_mask: no token is left")
    begin = starts.flatten()[index].nonzero()[:, 0]
    cu_seqlens = torch.cat((begin, begin.new_tensor([total])))
    lengths = cu_seqlens.diff()
    first = torch.repeat_interleave(begin, lengths, output_size=total)
    seqs = PackedInputs(
        cu_seqlens=cu_seqlens,
        positions=torch.arange(total, device=tokens.device) - first,
        max_seqlen=int(lengths.max()),
    )
    if routing is not None:
        if routing.dim() != 4 or routing.shape[:2] != (batch, length):
            raise ValueError(
                f"routing: shape {tuple(routing.shape)}, not [{batch}, {length}, L_sse, K]"
            )
        seqs.replay = routing.flatten(0, 1)[index]
    row = index[begin] // length
    return Unpadded(tokens.flatten(0, 1)[index], seqs, row, index, (batch, length))


def sequence_starts(
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """[B, L] bool, the first token of each sequence of a batch, padded or packed.

    The first of `cu_seqlens`, `seq_idx` and `position_ids` (0 begins a sequence) that is given
    divides the rows; without any, a row is one sequence.

    Raises:
        ValueError: arguments whose shapes do not fit `tokens` [B, L, ...].
    """
    batch, length = tokens.shape[:2]
    starts = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(tokens.device).long()
        if batch != 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != length:
            raise ValueError(
                f"cu_seq_lens_q: runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}, "
                f"input is [{batch}, {length}]; packed input is one row that it covers"
            )
        starts[0, cu_seqlens[:-1]] = True
    elif seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None:
        if position_ids.shape[-1] != length:
            raise ValueError(f"position_ids: length {position_ids.shape[-1]}, input {length}")
        starts |= position_ids == 0
    if attention_mask is None:
        starts[:, 0] = True
        return starts
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)}, input [{batch}, {length}]"
        )
    real = attention_mask.bool()
    return (starts | (real.cumsum(1) == 1)) & real
