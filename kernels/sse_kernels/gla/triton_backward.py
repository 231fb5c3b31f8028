"""SSE-GLA backward: two sweeps rebuild the chunks' states h and dh, then every chunk stands alone.

With the notation of triton_prepare, h is the state before a chunk, dh the gradient of the state
after it, and dv = triu(k' q'^T) do + (e^(G_C - r_k) k') dh; triton_gradients has the others.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sizes import block_sizes
from .triton_activate import silu_values
from .triton_forward import sum_slots
from .triton_gradients import chunk_gradients
from .triton_prepare import prepare
from .triton_shapes import GlaShapes, dot_precision
from .triton_steep import add_steep_gradients
from .triton_tiles import load_rows, load_segment


def gla_backward(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    shapes: GlaShapes,
) -> tuple[Tensor, ...]:
    """Gradients of q1, k1, q2, k2, v, g1, g2, the weights [T, K] and, if given, `initial_state`.

    do [T, Hv, Dv] and dfinal, if any, contiguous.
    """
    q1, k1, q2, k2, raw_v, g1, g2 = tokens
    v = silu_values(raw_v) if shapes.raw else raw_v
    rows, segments, chunks = plan
    t, k, heads, dk = shapes.tokens, shapes.k, shapes.hv, shapes.dk
    prepared = prepare(tokens, weights, plan, shapes)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dv = v.new_empty(1 + k, *v.shape)
    h, dh = (prepared.q.new_empty(len(chunks), heads, dk, shapes.dv) for _ in range(2))
    common = dict(H=shapes.h, HV=heads, DK=dk, DV=shapes.dv, C=shapes.chunk)
    common["PRECISION"] = dot_precision(v)

    blocks = block_sizes("gla_states", v, shapes.width)
    block_k, block_v = min(blocks.k, dk), min(blocks.v, triton.next_power_of_2(shapes.dv))
    tiles = dk // block_k * triton.cdiv(shapes.dv, block_v)
    gla_states_kernel[(tiles * heads * shapes.segments,)](
        prepared.k, prepared.scales, v, rows, segments, initial_state, h,
        t, shapes.sequences, len(chunks), N=shapes.n, BK=block_k, BV=block_v,
        **blocks.options, **common,
    )  # fmt: skip
    blocks = block_sizes("gla_dstates", v, shapes.width)
    block_v = min(blocks.v, triton.next_power_of_2(shapes.dv))
    gla_dstates_kernel[(triton.cdiv(shapes.dv, block_v) * heads * shapes.segments,)](
        *prepared[:4], do, rows, segments, dfinal, dh, dinitial, dv,
        t, shapes.sequences, len(chunks), N=shapes.n, BV=block_v,
        **blocks.options, **common,
    )  # fmt: skip

    slots = chunk_gradients(tokens, v, weights, plan, prepared, (h, dh, dv), do, shapes)
    add_steep_gradients(tokens, weights, plan, prepared, do, dv, slots, shapes)
    dq1, dk1, dq2, dk2, dg1, dg2, dw = slots
    group = heads // shapes.h
    gradients = (
        sum_slots(dq1, q1.dtype, group=group),
        sum_slots(dk1, k1.dtype, group=group),
        sum_slots(dq2, q2.dtype, group=group),
        sum_slots(dk2, k2.dtype, group=group),
        sum_slots(dv, v.dtype, silu_of=raw_v if shapes.raw else None),
        sum_slots(dg1, g1.dtype, group=group),
        sum_slots(dg2, g2.dtype, group=group),
        dw.flatten(2).sum(-1).to(weights.dtype),
    )
    return gradients if dinitial is None else (*gradients, dinitial)


@triton.jit(do_not_specialize=["T", "B", "M"])
def gla_states_kernel(
    k, scales, v, rows, segments, initial_state, states,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states [M, Hv, Dk, Dv]: the state before every chunk."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    TILES: tl.constexpr = DK // BK * NV
    i_tile = tl.program_id(0) % TILES
    i_h = tl.program_id(0) // TILES % HV
    i_s = tl.program_id(0) // (TILES * HV)
    chunk, chunk_count = load_segment(segments, i_s, B, M, N)

    i_c, i_k = tl.arange(0, C), i_tile // NV * BK + tl.arange(0, BK)
    i_vd = i_tile % NV * BV + tl.arange(0, BV)
    v_mask = (i_vd < DV)[None, :]
    h = tl.zeros([BK, BV], tl.float32)
    if initial_state is not None:
        edge_at = ((i_s % B * (1 + N) + i_s // B).to(tl.int64) * HV + i_h) * DK * DV
        edge_tile = edge_at + i_k[:, None] + i_vd[None, :] * DK
        h += tl.load(initial_state + edge_tile, mask=v_mask, other=0.0).to(tl.float32)
    dtype = k.dtype.element_ty
    for c in range(0, chunk_count):
        head = (chunk + c).to(tl.int64) * H + i_h // (HV // H)
        b_k = tl.load(k + head * C * DK + i_c[:, None] * DK + i_k[None, :])
        mask, token, _ = load_rows(rows, chunk + c, T, C)
        v_at = v + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
        b_v = tl.load(v_at, mask=mask[:, None] & v_mask, other=0.0).to(dtype)
        scales_at = scales + head * 3 * DK + i_k
        into, out = tl.load(scales_at) * tl.load(scales_at + DK), tl.load(scales_at + 2 * DK)
        state_at = states + ((chunk + c).to(tl.int64) * HV + i_h) * DK * DV
        tl.store(state_at + i_k[:, None] * DV + i_vd[None, :], h.to(dtype), mask=v_mask)
        h = tl.dot(tl.trans(b_k), b_v, h * into[:, None], input_precision=PRECISION)
        h *= out[:, None]


@triton.jit(do_not_specialize=["T", "B", "M"])
def gla_dstates_kernel(
    q, k, scales, steep, do, rows, segments, dfinal, dstates, dinitial, dv,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dstates [M, Hv, Dk, Dv]: the gradient of the state after every chunk; and the slots of dv."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_s = tl.program_id(0) // (NV * HV)
    chunk, chunk_count = load_segment(segments, i_s, B, M, N)

    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    v_mask = (i_vd < DV)[None, :]
    edge_at = ((i_s % B * (1 + N) + i_s // B).to(tl.int64) * HV + i_h) * DK * DV
    edge_tile = edge_at + i_k[:, None] + i_vd[None, :] * DK
    dh = tl.zeros([DK, BV], tl.float32)
    if dfinal is not None:
        dh += tl.load(dfinal + edge_tile, mask=v_mask, other=0.0).to(tl.float32)
    dtype = q.dtype.element_ty
    for step in range(0, chunk_count):
        i_m = chunk + chunk_count - 1 - step
        head = i_m.to(tl.int64) * H + i_h // (HV // H)
        tile = head * C * DK + i_c[:, None] * DK + i_k[None, :]
        b_q = tl.load(q + tile)
        b_k = tl.load(k + tile)
        b_at = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        flat = tl.load(steep + head) == 0
        b_at = tl.where((i_c[:, None] <= i_c[None, :]) & flat, b_at, 0.0).to(dtype)
        mask, token, row = load_rows(rows, i_m, T, C)
        mask = mask[:, None] & v_mask
        do_at = do + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
        b_do = tl.load(do_at, mask=mask, other=0.0).to(dtype)
        scales_at = scales + head * 3 * DK + i_k
        state_at = dstates + (i_m.to(tl.int64) * HV + i_h) * DK * DV
        tl.store(state_at + i_k[:, None] * DV + i_vd[None, :], dh.to(dtype), mask=v_mask)
        dh *= tl.load(scales_at + 2 * DK)[:, None]
        b_dv = tl.dot(b_k, dh.to(dtype), input_precision=PRECISION)
        b_dv = tl.dot(b_at, b_do, b_dv, input_precision=PRECISION)
        dh *= tl.load(scales_at + DK)[:, None]
        dh = tl.dot(tl.trans(b_q), b_do, dh, input_precision=PRECISION)
        dh *= tl.load(scales_at)[:, None]
        dv_at = dv + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
        tl.store(dv_at, b_dv.to(dv.dtype.element_ty), mask=mask)
    if dinitial is not None:
        tl.store(dinitial + edge_tile, dh, mask=v_mask)
