"""SSE-GLA backward: two sweeps rebuild the chunks' states h and dh, then every chunk stands alone.

With the notation of triton_prepare, h the state before a chunk, dh the gradient of the state after
it, and D = tril(do v^T):
    dq' = D k' + e^r_q do h^T               dq = scale w e^(G - r_q) dq'
    dk' = D^T q' + e^(G_C - r_k) v dh^T     dk = w e^(r_k - G) dk'
    dv  = A^T do + (e^(G_C - r_k) k') dh    dw = sum_d (q' dq' + k' dk') / w
    dg_i = sum_{j >= i} (q' dq' - k' dk')_j + sum_v (state after the chunk) dh
The sum of dg is taken from the state at every chunk's end, so that rounding does not run along the
sequence. k' and q' of one token multiply the same rounded products in dq and dk and cancel exactly.
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
from .triton_forward import sum_slots
from .triton_prepare import prepare
from .triton_shapes import GlaShapes, dot_precision
from .triton_steep import add_steep_gradients
from .triton_tiles import load_rows, load_weights


def gla_backward(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    shapes: GlaShapes,
) -> tuple[Tensor, ...]:
    """Gradients of q1, k1, q2, k2, v, g1, g2, the weights [T, K] and, if given, `initial_state`."""
    q1, k1, q2, k2, v, g1, g2 = tokens
    rows, segments, chunks = plan
    t, k, heads, dk = shapes.tokens, shapes.k, shapes.hv, shapes.dk
    prepared = prepare(tokens, weights, plan, shapes, backward=True)
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
        num_warps=blocks.warps, num_stages=blocks.stages, **common,
    )  # fmt: skip
    blocks = block_sizes("gla_dstates", v, shapes.width)
    block_v = min(blocks.v, triton.next_power_of_2(shapes.dv))
    gla_dstates_kernel[(triton.cdiv(shapes.dv, block_v) * heads * shapes.segments,)](
        *prepared[:4], do, rows, segments, dfinal, dh, dinitial, dv,
        t, shapes.sequences, len(chunks), N=shapes.n, BV=block_v,
        num_warps=blocks.warps, num_stages=blocks.stages, **common,
    )  # fmt: skip

    dscores = prepared.scores.new_empty(len(chunks), heads, shapes.chunk, shapes.chunk)
    blocks = block_sizes("gla_dscores", v, shapes.width)
    gla_dscores_kernel[(len(chunks) * heads,)](
        v, do, prepared.steep, rows, chunks, dscores, t,
        BV=min(blocks.v, triton.next_power_of_2(shapes.dv)),
        num_warps=blocks.warps, num_stages=blocks.stages, **common,
    )  # fmt: skip
    dq1, dk1 = (q1.new_empty(1, t, heads, dk) for _ in range(2))
    dq2, dk2 = (q1.new_empty(k, t, heads, dk) for _ in range(2))
    dg1, dg2 = (g1.new_empty(s, t, heads, dk, dtype=torch.float32) for s in (1, k))
    blocks = block_sizes("gla_dqk", v, shapes.width)
    block_k = min(blocks.k, dk)
    dw = weights.new_empty(t, k, heads * (dk // block_k), dtype=torch.float32)
    gla_dqk_kernel[(len(chunks) * heads * (dk // block_k),)](
        prepared.q, prepared.k, prepared.decays, prepared.scales, dscores, v, do, h, dh,
        weights, rows, chunks, dq1, dk1, dq2, dk2, dg1, dg2, dw, t, shapes.sequences,
        K=k, BK=block_k, BV=min(blocks.v, triton.next_power_of_2(shapes.dv)), SCALE=dk**-0.5,
        num_warps=blocks.warps, num_stages=blocks.stages, **common,
    )  # fmt: skip
    slots = (dq1, dk1, dq2, dk2, dv, dg1, dg2, dw)
    add_steep_gradients(tokens, weights, plan, do, slots, prepared.steep, shapes)
    group = heads // shapes.h
    gradients = (
        sum_slots(dq1, q1.dtype, group=group),
        sum_slots(dk1, k1.dtype, group=group),
        sum_slots(dq2, q2.dtype, group=group),
        sum_slots(dk2, k2.dtype, group=group),
        sum_slots(dv, v.dtype),
        sum_slots(dg1, g1.dtype, group=group),
        sum_slots(dg2, g2.dtype, group=group),
        dw.sum(-1).to(weights.dtype),
    )
    return gradients if dinitial is None else (*gradients, dinitial)


@triton.jit
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
    chunk_count = tl.load(segments + i_s)
    chunk = tl.load(segments + B * (1 + N) + i_s) - chunk_count
    chunk_count = tl.minimum(chunk_count, M - chunk)

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


@triton.jit
def gla_dstates_kernel(
    q, k, scores, scales, do, rows, segments, dfinal, dstates, dinitial, dv,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dstates [M, Hv, Dk, Dv]: the gradient of the state after every chunk; and the slots of dv."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_s = tl.program_id(0) // (NV * HV)
    chunk_count = tl.load(segments + i_s)
    chunk = tl.load(segments + B * (1 + N) + i_s) - chunk_count
    chunk_count = tl.minimum(chunk_count, M - chunk)

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
        b_at = tl.load(scores + head * C * C + i_c[:, None] * C + i_c[None, :])
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


@triton.jit
def gla_dscores_kernel(
    v, do, steep, rows, chunks, dscores, T,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dscores [M, Hv, C, C]: D, zero in steep chunks."""
    i_h, i_m = tl.program_id(0) % HV, tl.program_id(0) // HV
    if tl.load(chunks + i_m) < 0:
        return
    mask, token, _ = load_rows(rows, i_m, T, C)
    i_c, i_vd = tl.arange(0, C), tl.arange(0, BV)
    tile = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
    dtype = dscores.dtype.element_ty
    d = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, DV, BV):
        v_mask = mask[:, None] & (first + i_vd < DV)[None, :]
        b_v = tl.load(v + tile + first, mask=v_mask, other=0.0).to(dtype)
        b_do = tl.load(do + tile + first, mask=v_mask, other=0.0).to(dtype)
        d = tl.dot(b_do, tl.trans(b_v), d, input_precision=PRECISION)
    flat = tl.load(steep + i_m.to(tl.int64) * H + i_h // (HV // H)) == 0
    d = tl.where((i_c[:, None] >= i_c[None, :]) & flat, d, 0.0)
    out = dscores + tl.program_id(0).to(tl.int64) * C * C
    tl.store(out + i_c[:, None] * C + i_c[None, :], d.to(dtype))


@triton.jit
def gla_dqk_kernel(
    q, k, decays, scales, dscores, v, do, states, dstates, weights, rows, chunks,
    dq1, dk1, dq2, dk2, dg1, dg2, dw, T, B,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The slots of dq, dk, dg [1 or K, T, Hv, Dk] and the parts of dw [T, K, Hv * Dk // BK]."""
    NK: tl.constexpr = DK // BK
    i_b = tl.program_id(0) % NK
    i_h = tl.program_id(0) // NK % HV
    i_m = tl.program_id(0) // (NK * HV)
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    dq, dk, dg = dq1, dk1, dg1
    if i_s >= B:
        dq, dk, dg = dq2, dk2, dg2
    row_mask, token, row = load_rows(rows, i_m, T, C)
    i_c, i_k, i_vd = tl.arange(0, C), i_b * BK + tl.arange(0, BK), tl.arange(0, BV)
    state_at = (i_m.to(tl.int64) * HV + i_h) * DK * DV + i_k[:, None] * DV + i_vd[None, :]
    v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
    dtype = q.dtype.element_ty
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)
    h_dh = tl.zeros([BK], tl.float32)
    for first in range(0, DV, BV):
        v_mask = (first + i_vd < DV)[None, :]
        rows_v_mask = row_mask[:, None] & v_mask
        b_v = tl.load(v + v_at + first, mask=rows_v_mask, other=0.0).to(dtype)
        b_do = tl.load(do + v_at + first, mask=rows_v_mask, other=0.0).to(dtype)
        b_h = tl.load(states + state_at + first, mask=v_mask, other=0.0)
        b_dh = tl.load(dstates + state_at + first, mask=v_mask, other=0.0)
        b_dq = tl.dot(b_do, tl.trans(b_h), b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_dh), b_dk, input_precision=PRECISION)
        h_dh += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=1)

    head = i_m.to(tl.int64) * H + i_h // (HV // H)
    tile = head * C * DK + i_c[:, None] * DK + i_k[None, :]
    b_q = tl.load(q + tile)
    b_k = tl.load(k + tile)
    d_at = dscores + (i_m.to(tl.int64) * HV + i_h) * C * C
    b_d = tl.load(d_at + i_c[:, None] * C + i_c[None, :])
    b_dt = tl.load(d_at + i_c[:, None] + i_c[None, :] * C)
    scales_at = scales + head * 3 * DK + i_k
    into, through, out = (
        tl.load(scales_at), tl.load(scales_at + DK), tl.load(scales_at + 2 * DK)
    )  # fmt: skip
    b_dk *= out[None, :]
    dg_end = into * through * out * h_dh + tl.sum(b_k.to(tl.float32) * b_dk, axis=0)
    b_dk = tl.dot(b_dt, b_q, b_dk, input_precision=PRECISION)
    b_dq = tl.dot(b_d, b_k, b_dq * into[None, :], input_precision=PRECISION)

    b_qdq, b_kdk = b_q.to(tl.float32) * b_dq, b_k.to(tl.float32) * b_dk
    weight, choice, sparse = load_weights(weights, token, row, row_mask, T, K)
    # A weight that underflowed to 0 has no gradient behind its softmax either.
    b_dw = tl.where(weight > 0, tl.sum(b_qdq + b_kdk, axis=1) / weight, 0.0)
    tl.store(dw + (choice * HV + i_h) * NK + i_b, b_dw, mask=sparse)
    b_dg = tl.cumsum(b_qdq - b_kdk, axis=0, reverse=True) + dg_end[None, :]
    out_row = tl.where(i_s >= B, row - T, row)
    out_tile = ((out_row * HV + i_h) * DK)[:, None] + i_k[None, :]
    mask = row_mask[:, None]
    tl.store(dg + out_tile, b_dg, mask=mask)
    b_decay = tl.load(decays + tile).to(tl.float32)
    b_dq *= b_decay * (weight * SCALE)[:, None]
    tl.store(dq + out_tile, b_dq.to(dq.dtype.element_ty), mask=mask)
    b_dk *= weight[:, None] / b_decay
    tl.store(dk + out_tile, b_dk.to(dk.dtype.element_ty), mask=mask)
