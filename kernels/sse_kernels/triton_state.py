"""Where the states of a sequence stand in a pool of slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_slot(slots, i_b, S):
    """The slot of sequence i_b; a number outside the pool is clamped."""
    return tl.minimum(tl.maximum(tl.load(slots + i_b), 0), S - 1).to(tl.int64)


@triton.jit
def state_row(ids, i_b, slot, s: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """Row of the pool [S * (1 + N)] that stream s of sequence i_b uses."""
    row = slot * (1 + N)
    if s > 0:
        partition = tl.load(ids + i_b * K + s - 1).to(tl.int64)
        row += 1 + tl.minimum(tl.maximum(partition, 0), N - 1)
    return row
