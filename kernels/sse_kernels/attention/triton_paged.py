"""Paged attention in Triton: tiles of queries meet their keys page by page, with a running softmax.

The query heads of a group are rows of one tile and share every load. A decode step cuts the keys at
multiples of `split` tokens and joins the parts in ascending order, so that a row's bits depend on
its own keys alone: neither on its company nor on the width of the block table.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import load_pages, sequence_of

_JOIN = 16
"""Parts that are joined at once."""
_SPAN = 512
"""Keys of a prefill whose page numbers are read at once."""


class Tile(NamedTuple):
    """Launch parameters."""

    rows: int
    """Queries times heads of a group."""
    keys: int
    warps: int
    stages: int


def decode_tile(width: int, dtype: torch.dtype) -> Tile:
    """For one query a sequence; the rows are those of a group, at least the 16 of a product."""
    if dtype == torch.float32:
        return Tile(16, 32 if width > 64 else 64, 4 if width > 32 else 2, 2)
    return Tile(16, 64, 4 if width > 32 else 2, 3 if width <= 128 else 2)


def prefill_tile(width: int, dtype: torch.dtype) -> Tile:
    """For several queries a sequence.

    Under a width of 64 there are 2 warps: on 4, triton 3.6 compiles products with 32 bf16 columns
    into warpgroup instructions that read shared memory out of bounds.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 4 if width > 32 else 2, 1)
    if width > 128:
        return Tile(64, 64, 8, 1)
    return Tile(64, 64, 8 if width > 64 else 4 if width > 32 else 2, 3)


def triton_paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    *,
    context_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    split: int,
    tile: Tile | None = None,
) -> Tensor:
    """See `paged_attention`. One launch, and for long block tables of a decode step a second.

    A sequence that its block table has no room for gives NaN: lengths are not known on the host.
    """
    (tokens, heads, width), (pages, page, kv_heads) = q.shape, k_pages.shape[:3]
    q = q.contiguous()
    o = torch.empty_like(q)
    if tokens == 0:
        return o
    decode, group = cu_seqlens is None, triton.next_power_of_2(heads // kv_heads)
    tile = tile or (decode_tile if decode else prefill_tile)(width, q.dtype)
    room, span = block_table.shape[1] * page, split if decode else max(_SPAN, tile.keys)
    assert span % tile.keys == 0, f"{span} keys are no multiple of {tile.keys}"
    queries = 1 if decode else max(tile.rows // group, 1)
    tiles = tokens if decode else tokens // queries + len(context_lens)
    parts = _parts(room, window, split) if decode else 1
    several = parts > 1
    part = q.new_empty((tokens, heads, parts, width) if several else 0, dtype=torch.float32)
    norm = q.new_empty((tokens, heads, parts, 2) if several else 0, dtype=torch.float32)
    columns = triton.next_power_of_2(-(-span // page) + (span % page != 0))
    width_pow2 = max(triton.next_power_of_2(width), 16)
    paged_attention_kernel[(tiles * kv_heads, parts)](
        q, k_pages, v_pages, o, part, norm, block_table, context_lens, cu_seqlens,
        width**-0.5 * math.log2(math.e), block_table.stride(0), tokens, len(context_lens), pages,
        room, parts,
        G=heads // kv_heads, GP=group, HKV=kv_heads, D=width, DP=width_pow2, PAGE=page,
        BQ=queries, BM=max(queries * group, tile.rows), BN=tile.keys, NP=columns, SPAN=span,
        WINDOW=window or 0, SPLIT=split if decode else 0, SEVERAL=several,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if several:
        join_parts_kernel[(tokens * heads,)](
            part, norm, o, context_lens, room, parts, H=heads, D=width, DP=width_pow2,
            WINDOW=window or 0, SPLIT=split, BS=_JOIN, num_warps=2,
        )  # fmt: skip
    return o


def _parts(keys: int, window: int | None, split: int) -> int:
    """The most parts that the keys of one query can touch."""
    most = -(-keys // split)
    return most if window is None else min(most, -(-(window - 1) // split) + 1)


@triton.jit(do_not_specialize=["stride", "T", "B", "P", "room", "parts"])
def paged_attention_kernel(
    q, k_pages, v_pages, o, part, norm, block_table, context_lens, cu_seqlens,
    scale, stride, T, B, P, room, parts,
    G: tl.constexpr, GP: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NP: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, SEVERAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_tile = tl.program_id(0) % HKV, tl.program_id(0) // HKV
    if SPLIT:
        i_b, start, begin, length = i_tile, i_tile, 0, 1
    else:
        i_b = sequence_of(cu_seqlens, i_tile, B, BQ)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_b), 0), T).to(tl.int32)
        length = tl.minimum(tl.load(cu_seqlens + i_b + 1), T).to(tl.int32) - start
        begin = (i_tile - start // BQ - i_b) * BQ
        if begin >= length:
            return
    context = tl.load(context_lens + i_b)
    fits = (context >= 0) & (context <= room - length)
    context = tl.where(fits, context, 0).to(tl.int32)
    low, high = 0, tl.minimum(context + tl.minimum(begin + BQ, length), room)
    if WINDOW:
        low = tl.maximum(context + begin - WINDOW + 1, 0)
    if SPLIT:
        i_s = low // SPLIT + tl.program_id(1)
        low = tl.maximum(low, i_s * SPLIT)
        high = tl.minimum(high, (i_s + 1) * SPLIT)
        if low >= high:
            return

    i_m, i_d = tl.arange(0, BM), tl.arange(0, DP)
    row, i_g = begin + i_m // GP, i_m % GP
    live = (row < length) & (i_g < G) & (i_m < BQ * GP)
    head = (start + row).to(tl.int64) * (HKV * G) + i_h * G + i_g
    mask = live[:, None] & (i_d < D)[None, :]
    b_q = tl.load(q + head[:, None] * D + i_d[None, :], mask=mask, other=0.0)
    position = (context + row)[:, None]
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DP], tl.float32)
    # Page numbers come before the loop over them: loads that wait for loads are not pipelined.
    i_p = tl.arange(0, NP)
    for span in range(low // SPAN * SPAN, high, SPAN):
        pages = load_pages(block_table, i_b, stride, span // PAGE + i_p, tl.cdiv(high, PAGE), P)
        for j in range(tl.maximum(low // BN * BN, span), tl.minimum(high, span + SPAN), BN):
            n = j + tl.arange(0, BN)
            if PAGE % BN == 0:
                page = tl.sum(tl.where(i_p == j // PAGE - span // PAGE, pages, 0), axis=0)
            else:  # not tl.gather: in this loop triton 3.6 reads beyond its shared memory
                mine = i_p[None, :] == (n // PAGE - span // PAGE)[:, None]
                page = tl.sum(tl.where(mine, pages[None, :], 0), axis=1)
            inside = n < high
            at = ((page.to(tl.int64) * PAGE + n % PAGE) * HKV + i_h) * D
            inner = inside[None, :] & (i_d < D)[:, None]
            b_k = tl.load(k_pages + at[None, :] + i_d[:, None], mask=inner, other=0.0)
            scores = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
            seen = n[None, :] <= position
            if WINDOW:
                seen = seen & (n[None, :] > position - WINDOW)
            scores = tl.where(seen, scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
            kept = tl.exp2(top - new_top)
            total = total * kept + tl.sum(weights, axis=1)
            inner = inside[:, None] & (i_d < D)[None, :]
            b_v = tl.load(v_pages + at[:, None] + i_d[None, :], mask=inner, other=0.0)
            b_o = b_o * kept[:, None]
            b_o = tl.dot(weights.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
            top = new_top

    total = tl.where(fits, total, float("nan"))
    if SEVERAL:
        place = head * parts + tl.program_id(1)
        tl.store(norm + place * 2, top, mask=live)
        tl.store(norm + place * 2 + 1, total, mask=live)
        tl.store(part + place[:, None] * D + i_d[None, :], b_o, mask=mask)
    else:
        b_o = b_o / total[:, None]
        tl.store(o + head[:, None] * D + i_d[None, :], b_o.to(o.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["room", "parts"])
def join_parts_kernel(
    part, norm, o, context_lens, room, parts,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    last = tl.load(context_lens + head // H)
    last = tl.where((last >= 0) & (last < room), last, 0).to(tl.int32)
    count = last // SPLIT + 1
    if WINDOW:
        count -= tl.maximum(last - WINDOW + 1, 0) // SPLIT
    i_d = tl.arange(0, DP)
    top, total = -1e30, 0.0
    b_o = tl.zeros([DP], tl.float32)
    for s in range(0, count, BS):
        i_s = s + tl.arange(0, BS)
        place = head * parts + i_s
        tops = tl.load(norm + place * 2, mask=i_s < count, other=-1e30)
        totals = tl.load(norm + place * 2 + 1, mask=i_s < count, other=0.0)
        mask = (i_s < count)[:, None] & (i_d < D)[None, :]
        b_part = tl.load(part + place[:, None] * D + i_d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top)
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights * totals, axis=0)
        b_o = b_o * kept + tl.sum(weights[:, None] * b_part, axis=0)
        top = new_top
    tl.store(o + head * D + i_d, (b_o / total).to(o.dtype.element_ty), mask=i_d < D)
