"""The walk of the head over blocks of logits, tokens by vocabulary, of which one is alive.

Blocks are sized by the device alone, never by T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import total_dtype
from .torch_rows import Rows

VOCAB_BLOCK = 4096
TOKEN_BLOCK, TOKEN_BLOCK_CUDA = 4096, 32768
"""With VOCAB_BLOCK, 64 MB of fp32 logits, and 512 MB on a GPU."""


class Operands(NamedTuple):
    """What defines the logits, and the tokens that were sampled from them."""

    hidden: Tensor
    """[T, d]."""
    weight: Tensor
    """[V, d]."""
    targets: Tensor
    """[T] int64."""
    temperature: float
    dtype: torch.dtype
    """What products multiply; sums are fp32, fp64 if this is."""

    @property
    def parts(self) -> list[slice]:
        """Blocks of tokens."""
        return _cut(len(self.hidden), TOKEN_BLOCK_CUDA if self.hidden.is_cuda else TOKEN_BLOCK)

    @property
    def blocks(self) -> list[slice]:
        """Blocks of the vocabulary."""
        return _cut(len(self.weight), VOCAB_BLOCK)

    def storage(self, dtype: torch.dtype) -> Tensor:
        """Room for any block of logits."""
        largest = max((part.stop - part.start for part in self.parts), default=0)
        return self.hidden.new_empty(largest * self.blocks[0].stop, dtype=dtype)


def head_forward(x: Operands, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and logarithms of the softmax's denominators, [T] each."""
    logits = x.storage(total_dtype(x.dtype))
    logprobs, entropy, lse = (logits.new_empty(len(x.hidden)) for _ in range(3))
    for part in x.parts:
        hidden, targets = x.hidden[part].to(x.dtype), x.targets[part]
        stats = logits.new_empty(len(x.blocks), 3, len(hidden))
        chosen = torch.full_like(stats[0, 0], torch.nan)
        for block, stat in zip(x.blocks, stats, strict=True):
            weight = x.weight[block].to(x.dtype)
            z = multiply(hidden, weight.t(), _matrix(logits, hidden, weight))
            rows.reduce(z, targets - block.start, x.temperature, stat, chosen)
        logprobs[part], entropy[part], lse[part] = _combine(stats, chosen)
    return logprobs, entropy, lse


def head_backward(
    x: Operands,
    rows: Rows,
    entropy: Tensor,
    lse: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight in their dtypes, empty where they are not wanted.

    A block of the vocabulary goes over all tokens: its part of the weight's gradient is complete
    when it ends, and only the hidden states' gradient [T, d] is kept in fp32 from block to block.
    """
    wants_hidden, wants_weight = wanted
    total = total_dtype(x.dtype)
    logits = x.storage(total)
    dlogits = logits if x.dtype == total else x.storage(x.dtype)
    dhidden = x.hidden.new_zeros(x.hidden.shape if wants_hidden else 0, dtype=total)
    dweight = x.weight.new_empty(x.weight.shape if wants_weight else 0)
    sums = x.weight.new_empty(VOCAB_BLOCK if wants_weight else 0, x.weight.shape[1], dtype=total)
    for block in x.blocks:
        weight = x.weight[block].to(x.dtype)
        dblock = sums[: len(weight)].zero_()
        for part in x.parts:
            hidden = x.hidden[part].to(x.dtype)
            z = multiply(hidden, weight.t(), _matrix(logits, hidden, weight))
            dz = _matrix(dlogits, hidden, weight)
            per_row = (lse[part], entropy[part], dlogprobs[part], dentropy[part])
            rows.differentiate(z, x.targets[part] - block.start, x.temperature, per_row, dz)
            if wants_hidden:
                multiply(dz, weight, dhidden[part], add=True)
            if wants_weight:
                multiply(dz.t(), hidden, dblock, add=True)
        if wants_weight:
            dweight[block] = dblock
    return dhidden.to(x.hidden.dtype), dweight


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b, with sums of out's dtype; on CPU all dtypes are one."""
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        return torch.addmm(out, a, b, out=out, **mixed)
    return torch.mm(a, b, out=out, **mixed)


def _combine(stats: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reductions of all blocks [blocks, 3, T] and the targets' logits [T] -> the results."""
    top, sums, moments = stats.unbind(1)
    best = top.amax(0)
    shift = top - best
    scale = shift.exp()
    denominator = (sums * scale).sum(0)
    log = denominator.log()
    moment = ((moments + sums * shift) * scale).sum(0)
    return chosen - best - log, log - moment / denominator, best + log


def _matrix(storage: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """[len(hidden), len(weight)] without gaps."""
    return storage[: len(hidden) * len(weight)].view(len(hidden), len(weight))


def _cut(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
