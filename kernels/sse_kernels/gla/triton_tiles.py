"""What the sequence kernels of both operators read alike: segments, chunks, rows, exponents."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_segment(segments, i_s, B, M, N: tl.constexpr):
    """The first chunk of segment i_s, and how many it has of the plan's M."""
    count = tl.load(segments + i_s)
    first = tl.load(segments + B * (1 + N) + i_s) - count
    return first, tl.minimum(count, M - first)


@triton.jit
def load_rows(rows, i_m, T, C: tl.constexpr):
    """Of the C rows of chunk i_m: mask, token, output row (slot * T + token)."""
    row = tl.load(rows + i_m * C + tl.arange(0, C))
    mask = row >= 0
    row = tl.maximum(row, 0).to(tl.int64)
    return mask, row % T, row


@triton.jit
def load_weights(weights, token, row, mask, T, K: tl.constexpr):
    """Router weights of a chunk's rows, and where they stand in [T, K].

    1 in the shared stream, 0 in rows without a token.
    """
    choice = token * K + row // T - 1
    sparse = mask & (row >= T)
    weight = tl.load(weights + choice, mask=sparse, other=1.0).to(tl.float32)
    return tl.where(mask, weight, 0.0), choice, sparse


@triton.jit
def fast_exp(x):
    """e^x of fp32 in two instructions: what is below 1e-38 becomes 0, which `tl.exp` avoids."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def references(total, LIMIT: tl.constexpr):
    """Reference points of q and k, and if any channel is steep; `total` [D] sums the decays.

    q e^(G - r) and k e^(r - G) with r = total / 2 stay in range while |total| <= LIMIT. A steep
    channel takes r = 0 for q and r = total for k: right for all that crosses the chunk's border,
    while the pairs inside the chunk are left to the exact kernels of triton_steep.
    """
    steep = total < -LIMIT
    half = total * 0.5
    return tl.max(steep.to(tl.int32), 0), tl.where(steep, 0.0, half), tl.where(steep, total, half)
