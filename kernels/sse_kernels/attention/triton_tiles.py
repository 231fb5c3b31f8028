"""Which sequence a token or a tile of queries belongs to, found on the device."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_of(cu_seqlens, x, B, TILE: tl.constexpr):
    """The last sequence that begins at or before x, by bisection.

    TILE = 0: x is a token. Else x counts tiles of TILE tokens, and sequence b begins with tile
    cu_seqlens[b] // TILE + b, so that no two sequences share one: T // TILE + B tiles are enough
    for all, and those without tokens exit.
    """
    low, high = 0, B
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(cu_seqlens + middle)
        if TILE:
            begin = begin // TILE + middle
        low = tl.where(begin <= x, middle, low)
        high = tl.where(begin <= x, high, middle)
    return low


@triton.jit
def load_pages(block_table, i_b, stride, columns, end, P):
    """Page numbers of a sequence's table, 0 from column `end` on; those outside the pool are
    clamped."""
    row = block_table + i_b.to(tl.int64) * stride
    pages = tl.load(row + columns, mask=columns < end, other=0)
    return tl.minimum(tl.maximum(pages, 0), P - 1).to(tl.int32)
