"""What every chunk of SSE-GLA does alone: decays into queries and keys.

With G the decays summed inside a chunk, r_q and r_k reference points (see `references`):
    q' = scale w q e^(G - r_q)     k' = w k e^(r_k - G)
q, k and the decays are activated as they are read, if they are raw projections.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sizes import block_sizes
from .triton_activate import key_limits, load_decays, load_keys, load_silu
from .triton_shapes import GlaShapes
from .triton_tiles import fast_exp, load_rows, load_weights, references


class Prepared(NamedTuple):
    """Tiles of every chunk m and query head h, rows without a token zero."""

    q: Tensor
    """[M, H, C, Dk] q', bf16 (fp32 for fp32 inputs)."""
    k: Tensor
    """[M, H, C, Dk] k'."""
    scales: Tensor
    """[M, H, 3, Dk] fp32: e^r_q, e^(r_k - r_q), e^(G_C - r_k)."""
    steep: Tensor
    """[M, H] int8: 1 where the pairs inside the chunk are left to triton_steep."""
    norms: Tensor
    """[M, H, C] fp32: log of the sum of e^x over each raw key's kept entries; else empty."""
    lowest: Tensor
    """[M, H, C] int64: rank of each raw key's smallest kept entry, with `row_topk`; else empty."""


def prepare(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    shapes: GlaShapes,
) -> Prepared:
    """tokens: q1, k1, q2, k2, v, g1, g2, contiguous."""
    q1, k1, q2, k2, _, g1, g2 = tokens
    rows, _, chunks = plan
    m, h, c, dk = len(chunks), shapes.h, shapes.chunk, shapes.dk
    dtype = torch.float32 if q1.dtype == torch.float32 else torch.bfloat16
    out = Prepared(
        q1.new_empty(m, h, c, dk, dtype=dtype),
        q1.new_empty(m, h, c, dk, dtype=dtype),
        q1.new_empty(m, h, 3, dk, dtype=torch.float32),
        q1.new_empty(m, h, dtype=torch.int8),
        q1.new_empty((m, h, c) if shapes.raw else 0, dtype=torch.float32),
        q1.new_empty((m, h, c) if shapes.row_topk else 0, dtype=torch.int64),
    )
    blocks = block_sizes("gla_prepare_raw" if shapes.raw else "gla_prepare", q1, shapes.width)
    gla_prepare_kernel[(m * h,)](
        q1, k1, q2, k2, g1, g2, weights, rows, chunks, *out,
        shapes.tokens, shapes.sequences,
        H=h, DK=dk, K=shapes.k, C=c, BK=min(blocks.k, dk), SCALE=dk**-0.5,
        RAW=shapes.raw, TOPK=shapes.row_topk,
        **blocks.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T", "B"])
def gla_prepare_kernel(
    q1, k1, q2, k2, g1, g2, weights, rows, chunks,
    q_out, k_out, scales, steep_out, norms, lowest, T, B,
    H: tl.constexpr, DK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    SCALE: tl.constexpr, RAW: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(0) % H, tl.program_id(0) // H
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    q, k, g = q1, k1, g1
    if i_s >= B:
        q, k, g = q2, k2, g2
    row_mask, token, row = load_rows(rows, i_m, T, C)
    weight, _, _ = load_weights(weights, token, row, row_mask, T, K)
    mask = row_mask[:, None]
    i_c, i_k = tl.arange(0, C), tl.arange(0, BK)
    row_at = ((token * H + i_h) * DK)[:, None]
    head = tl.program_id(0).to(tl.int64)
    out_tile = head * C * DK + i_c[:, None] * DK + i_k[None, :]
    scales_at = scales + head * 3 * DK + i_k
    dtype = q_out.dtype.element_ty
    norm, low = weight, weight
    if RAW:
        i_row = tl.arange(0, DK)
        norm, low = key_limits(k, row_at + i_row[None, :], mask, i_row, TOPK)
    steep = 0
    for block in range(0, DK, BK):
        tile = row_at + block + i_k[None, :]
        b_g = load_decays(g, tile, mask, RAW)
        b_q = load_silu(q, tile, mask, RAW)
        b_k = load_keys(k, tile, mask, block + i_k, norm, low, RAW, TOPK)
        total = tl.sum(b_g, axis=0)
        block_steep, r_q, r_k = references(total, 80.0)
        steep |= block_steep
        b_sum = tl.cumsum(b_g, axis=0)
        b_q = (b_q * (weight * SCALE)[:, None] * fast_exp(b_sum - r_q[None, :])).to(dtype)
        b_k = (b_k * weight[:, None] * fast_exp(r_k[None, :] - b_sum)).to(dtype)
        tl.store(q_out + out_tile + block, b_q)
        tl.store(k_out + out_tile + block, b_k)
        tl.store(scales_at + block, tl.exp(r_q))
        tl.store(scales_at + DK + block, tl.exp(r_k - r_q))
        tl.store(scales_at + 2 * DK + block, tl.exp(total - r_k))
    tl.store(steep_out + head, steep.to(tl.int8))
    if RAW:
        tl.store(norms + head * C + i_c, norm)
        if TOPK > 0:
            tl.store(lowest + head * C + i_c, low)
