"""SSE-GLA backward inside the chunks, each by itself, once the states around it are known.

With the notation of triton_prepare, h the state before a chunk, dh the gradient of the state after
it, and D = tril(do v^T):
    dq' = D k' + e^r_q do h^T               dq = scale w e^(G - r_q) dq'
    dk' = D^T q' + e^(G_C - r_k) v dh^T     dk = w e^(r_k - G) dk'
    dw  = sum_d (q' dq' + k' dk') / w
    dg_i = sum_{j >= i} (q' dq' - k' dk')_j + sum_v (state after the chunk) dh
The sum of dg is taken from the state at every chunk's end, so that rounding does not run along the
sequence. The products of a token with itself are rounded alike in dq and dk and cancel exactly.

Of raw projections the gradients go on through the activations: dq silu'(q), dg sigmoid(-g) / 16
and, with k the softmax, k (dk - sum_d k dk). A key meets its value in one product alone, so that
sum_d k dk = sum_v v dv, and no program needs more than its own channels.
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
from .triton_activate import decay_slope, load_decays, load_keys, load_limits, silu_slope
from .triton_prepare import Prepared
from .triton_shapes import GlaShapes, dot_precision
from .triton_tiles import fast_exp, load_rows, load_weights


def chunk_gradients(
    tokens: tuple[Tensor, ...],
    v: Tensor,
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    swept: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    shapes: GlaShapes,
) -> tuple[Tensor, ...]:
    """Slots of dq1, dk1, dq2, dk2, dg1, dg2 [1 or K, T, Hv, Dk] and dweights [T, K, Hv, parts].

    v: activated; swept: h, dh [M, Hv, Dk, Dv] and the slots of dv. Pairs inside steep chunks are
    left to triton_steep.
    """
    q1, k1, q2, k2, _, g1, g2 = tokens
    rows, _, chunks = plan
    h, dh, dv = swept
    t, k, heads, dk = shapes.tokens, shapes.k, shapes.hv, shapes.dk
    blocks = block_sizes("gla_dqk", v, shapes.width)
    block_k = min(blocks.k, dk)
    dq1, dk1 = (q1.new_empty(1, t, heads, dk) for _ in range(2))
    dq2, dk2 = (q1.new_empty(k, t, heads, dk) for _ in range(2))
    dtype = g1.dtype if shapes.raw else torch.float32
    dg1, dg2 = (g1.new_empty(s, t, heads, dk, dtype=dtype) for s in (1, k))
    dw = weights.new_empty(t, k, heads, dk // block_k, dtype=torch.float32)
    gla_dqk_kernel[(len(chunks) * heads * (dk // block_k),)](
        q1, k1, q2, k2, g1, g2, weights, *prepared, v, do, dv, h, dh, rows, chunks,
        dq1, dk1, dq2, dk2, dg1, dg2, dw, t, shapes.sequences,
        H=shapes.h, HV=heads, DK=dk, DV=shapes.dv, K=k, C=shapes.chunk,
        BK=block_k, BV=min(blocks.v, triton.next_power_of_2(shapes.dv)),
        SCALE=dk**-0.5, RAW=shapes.raw, TOPK=shapes.row_topk, PRECISION=dot_precision(v),
        **blocks.options,
    )  # fmt: skip
    return dq1, dk1, dq2, dk2, dg1, dg2, dw


@triton.jit(do_not_specialize=["T", "B"])
def gla_dqk_kernel(
    q1, k1, q2, k2, g1, g2, weights, q_in, k_in, scales, steep, norms, lowest,
    v, do, dv, states, dstates, rows, chunks, dq1, dk1, dq2, dk2, dg1, dg2, dw, T, B,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    RAW: tl.constexpr, TOPK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = DK // BK
    i_part = tl.program_id(0) % NK
    i_h = tl.program_id(0) // NK % HV
    i_m = tl.program_id(0) // (NK * HV)
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    q, k, g, dq, dk, dg = q1, k1, g1, dq1, dk1, dg1
    if i_s >= B:
        q, k, g, dq, dk, dg = q2, k2, g2, dq2, dk2, dg2
    row_mask, token, row = load_rows(rows, i_m, T, C)
    i_c, i_k, i_vd = tl.arange(0, C), i_part * BK + tl.arange(0, BK), tl.arange(0, BV)
    i_head = i_h // (HV // H)
    head = i_m.to(tl.int64) * H + i_head
    v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
    state_at = (i_m.to(tl.int64) * HV + i_h) * DK * DV + i_k[:, None] * DV + i_vd[None, :]
    dtype = states.dtype.element_ty
    b_d = tl.zeros([C, C], tl.float32)
    b_dt = tl.zeros([C, C], tl.float32)
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)
    h_dh = tl.zeros([BK], tl.float32)
    for first in range(0, DV, BV):
        v_mask = (first + i_vd < DV)[None, :]
        mask = row_mask[:, None] & v_mask
        b_v = tl.load(v + v_at + first, mask=mask, other=0.0).to(dtype)
        b_do = tl.load(do + v_at + first, mask=mask, other=0.0).to(dtype)
        b_h = tl.load(states + state_at + first, mask=v_mask, other=0.0)
        b_dh = tl.load(dstates + state_at + first, mask=v_mask, other=0.0)
        b_dq = tl.dot(b_do, tl.trans(b_h), b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_dh), b_dk, input_precision=PRECISION)
        # D^T is a product of its own: triton may not transpose one.
        b_d = tl.dot(b_do, tl.trans(b_v), b_d, input_precision=PRECISION)
        b_dt = tl.dot(b_v, tl.trans(b_do), b_dt, input_precision=PRECISION)
        h_dh += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=1)
    flat = tl.load(steep + head) == 0
    b_d = tl.where((i_c[:, None] >= i_c[None, :]) & flat, b_d, 0.0).to(dtype)
    b_dt = tl.where((i_c[:, None] <= i_c[None, :]) & flat, b_dt, 0.0).to(dtype)

    tile = head * C * DK + i_c[:, None] * DK + i_k[None, :]
    b_q = tl.load(q_in + tile)
    b_k = tl.load(k_in + tile)
    scales_at = scales + head * 3 * DK + i_k
    into, out = tl.load(scales_at), tl.load(scales_at + 2 * DK)
    b_dk *= out[None, :]
    dg_end = into * tl.load(scales_at + DK) * out * h_dh
    dg_end += tl.sum(b_k.to(tl.float32) * b_dk, axis=0)
    b_dk = tl.dot(b_dt, b_q, b_dk, input_precision=PRECISION)
    b_dq = tl.dot(b_d, b_k, b_dq * into[None, :], input_precision=PRECISION)
    b_qdq, b_kdk = b_q.to(tl.float32) * b_dq, b_k.to(tl.float32) * b_dk

    # Read again behind a barrier, for there are no registers to keep it in.
    tl.debug_barrier()
    row_mask, token, row = load_rows(rows, i_m, T, C)
    mask = row_mask[:, None]
    weight, choice, sparse = load_weights(weights, token, row, row_mask, T, K)
    b_dw = tl.sum(b_qdq + b_kdk, axis=1)
    # A weight that underflowed to 0 has no gradient behind its softmax either.
    b_dw = tl.where(weight > 0, b_dw / tl.where(weight > 0, weight, 1.0), 0.0)
    tl.store(dw + (choice * HV + i_h) * NK + i_part, b_dw, mask=sparse)

    qk_at = ((token * H + i_head) * DK)[:, None] + i_k[None, :]
    out_row = tl.where(i_s >= B, row - T, row)
    out_at = ((out_row * HV + i_h) * DK)[:, None] + i_k[None, :]
    b_dg = tl.cumsum(b_qdq - b_kdk, axis=0, reverse=True) + dg_end[None, :]
    if RAW:
        k_dk = tl.zeros([C], tl.float32)
        for first in range(0, DV, BV):
            v_mask = mask & (first + i_vd < DV)[None, :]
            v_at = ((token * HV + i_h) * DV)[:, None] + first + i_vd[None, :]
            dv_at = ((row * HV + i_h) * DV)[:, None] + first + i_vd[None, :]
            b_v = tl.load(v + v_at, mask=v_mask, other=0.0).to(tl.float32)
            b_dv = tl.load(dv + dv_at, mask=v_mask, other=0.0).to(tl.float32)
            k_dk += tl.sum(b_v * b_dv, axis=1)
        norm, low = load_limits(norms, lowest, head * C + i_c, RAW, TOPK)
        b_dk = b_kdk - load_keys(k, qk_at, mask, i_k, norm, low, RAW, TOPK) * k_dk[:, None]
        tl.store(dk + out_at, b_dk.to(dk.dtype.element_ty), mask=mask)
        b_dg *= decay_slope(tl.load(g + qk_at, mask=mask, other=0.0).to(tl.float32))
        b_dq *= silu_slope(tl.load(q + qk_at, mask=mask, other=0.0).to(tl.float32))
    tl.store(dg + out_at, b_dg.to(dg.dtype.element_ty), mask=mask)

    b_g = load_decays(g, qk_at, mask, RAW)
    total, b_sum = tl.sum(b_g, axis=0), tl.cumsum(b_g, axis=0)
    through = tl.load(scales_at + DK)
    # 1 in all but steep channels: which those are, triton_prepare decides (`references`).
    half = tl.where(through == 1.0, 0.5 * total, 0.0)
    b_dq *= (weight * SCALE)[:, None] * fast_exp(b_sum - half[None, :])
    tl.store(dq + out_at, b_dq.to(dq.dtype.element_ty), mask=mask)
    if not RAW:
        b_dk *= weight[:, None] * fast_exp(tl.where(through == 1.0, half, total)[None, :] - b_sum)
        tl.store(dk + out_at, b_dk.to(dk.dtype.element_ty), mask=mask)
