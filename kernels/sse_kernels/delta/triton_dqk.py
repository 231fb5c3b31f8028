"""What every chunk of SSE-GDN does alone in the backward pass: dq, dk, and dg, dweights.

With the notation of triton_prepare and triton_backward, u = beta x, and for j <= i (i: j < i)
    E_ij = D_ij (do_i . u_j)        F_ij = -D_ij (dv_i . u_j), strictly lower
the gradients of Q and K are
    dQ  = e^G (do h^T) + E K
    dK+ = F K - e^G (dv h^T)        dK- = e^(G_C - G) (u dh^T) + E^T Q + F^T K        dK = dK+ + dK-
What grows with G_i stands in dQ and dK+, what falls with it in dK-:
    dg_i = sum_{j >= i} (Q dQ + K dK+ - K dK-)_j + sum_j e^(G_C - G_j) K_j (u dh^T)_j + e^G_C h dh
Everything is kept as a dQ and b dK, of which the norms take back p x (x . dx) (`unit_factor`).
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
from ..gla.triton_shapes import GlaShapes, dot_precision
from ..gla.triton_tiles import load_rows, load_weights
from .gate import NORM_EPS
from .triton_prepare import Prepared


def chunk_gradients(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    swept: tuple[Tensor, Tensor, Tensor, Tensor],
    do: Tensor,
    shapes: GlaShapes,
    gate_after_norm: bool,
) -> tuple[Tensor, ...]:
    """The slots of dq1 dk1 [1, T, Hv, Dk], dq2 dk2 [K, T, Hv, Dk], dg1 dg2 [1 or K, T, Hv] and the
    parts of dweights [T, K, Hv]. swept: h, dh, x and the slots of dv."""
    q1, k1, q2, k2 = tokens[:4]
    states, dstates, errors, dv = swept
    rows, _, chunks = plan
    m, t, heads, dk = len(chunks), shapes.tokens, shapes.hv, shapes.dk
    common = dict(HV=heads, DV=shapes.dv, C=shapes.chunk, PRECISION=dot_precision(q1))
    blocks = block_sizes("gdn_dscores", q1, shapes.width)
    e, f = (torch.empty_like(prepared.scores) for _ in range(2))
    gdn_dscores_kernel[(m * heads,)](
        prepared.factors, errors, dv, do, rows, chunks, e, f, t,
        BV=min(blocks.v, triton.next_power_of_2(shapes.dv)),
        **blocks.options, **common,
    )  # fmt: skip
    dq1, dk1 = (q1.new_empty(1, t, heads, dk) for _ in range(2))
    dq2, dk2 = (q1.new_empty(shapes.k, t, heads, dk) for _ in range(2))
    dg1, dg2 = (q1.new_empty(s, t, heads, dtype=torch.float32) for s in (1, shapes.k))
    dw = q1.new_empty(t, shapes.k, heads, dtype=torch.float32)
    blocks = block_sizes("gdn_dqk", q1, shapes.width)
    gdn_dqk_kernel[(m * heads,)](
        q1, k1, q2, k2, prepared.factors, prepared.decays, e, f, states, dstates, errors, dv, do,
        weights, rows, chunks, dq1, dk1, dq2, dk2, dg1, dg2, dw, t, shapes.sequences,
        H=shapes.h, DK=dk, K=shapes.k, BK=min(blocks.k, dk),
        BV=min(blocks.v, triton.next_power_of_2(shapes.dv)), EPS=NORM_EPS,
        GATE_LAST=gate_after_norm, **blocks.options, **common,
    )  # fmt: skip
    return dq1, dk1, dq2, dk2, dg1, dg2, dw


@triton.jit(do_not_specialize=["T"])
def gdn_dscores_kernel(
    factors, errors, dv, do, rows, chunks, scores_e, scores_f, T,
    HV: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E and F [M, Hv, C, C], E with the factors a_i b_j, F with b_i b_j."""
    i_h, i_m = tl.program_id(0) % HV, tl.program_id(0) // HV
    if tl.load(chunks + i_m) < 0:
        return
    mask, token, row = load_rows(rows, i_m, T, C)
    head = tl.program_id(0).to(tl.int64)
    i_c, i_vd = tl.arange(0, C), tl.arange(0, BV)
    x_at = errors + head * C * DV + i_c[:, None] * DV + i_vd[None, :]
    do_at = do + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
    dv_at = dv + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
    dtype = scores_e.dtype.element_ty
    e = tl.zeros([C, C], tl.float32)
    f = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, DV, BV):
        v_mask = (first + i_vd < DV)[None, :]
        b_do = tl.load(do_at + first, mask=mask[:, None] & v_mask, other=0.0).to(dtype)
        b_dv = tl.load(dv_at + first, mask=mask[:, None] & v_mask, other=0.0).to(dtype)
        b_x = tl.load(x_at + first, mask=v_mask, other=0.0)
        e = tl.dot(b_do, tl.trans(b_x), e, input_precision=PRECISION)
        f = tl.dot(b_dv, tl.trans(b_x), f, input_precision=PRECISION)
    at = factors + head * 10 * C + i_c
    q_factor, k_factor = tl.load(at + 4 * C), tl.load(at + 5 * C)
    coarse, fine = tl.load(at + 6 * C), tl.load(at + 7 * C)
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    between = tl.exp(tl.where(i_c[:, None] >= i_c[None, :], between, float("-inf")))
    between *= (tl.load(at + 3 * C) * k_factor)[None, :]
    e *= between * q_factor[:, None]
    f = tl.where(i_c[:, None] > i_c[None, :], -f * between * k_factor[:, None], 0.0)
    square = head * C * C + i_c[:, None] * C + i_c[None, :]
    tl.store(scores_e + square, e.to(dtype))
    tl.store(scores_f + square, f.to(dtype))


@triton.jit(do_not_specialize=["T", "B"])
def gdn_dqk_kernel(
    q1, k1, q2, k2, factors, decays, scores_e, scores_f, states, dstates, errors, dv, do,
    weights, rows, chunks, dq1, dk1, dq2, dk2, dg1, dg2, dw, T, B,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EPS: tl.constexpr,
    GATE_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(0) % HV, tl.program_id(0) // HV
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    q, k, dq, dk, dg = q1, k1, dq1, dk1, dg1
    if i_s >= B:
        q, k, dq, dk, dg = q2, k2, dq2, dk2, dg2
    row_mask, token, row = load_rows(rows, i_m, T, C)
    head = tl.program_id(0).to(tl.int64)
    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    mask = row_mask[:, None]
    out_row = tl.where(i_s >= B, row - T, row)
    tile = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
    out_tile = ((out_row * HV + i_h) * DK)[:, None] + i_k[None, :]
    state_at = head * DK * DV + i_k[:, None] * DV + i_vd[None, :]
    x_at = head * C * DV + i_c[:, None] * DV + i_vd[None, :]
    do_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
    dv_at = ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
    square = head * C * C + i_c[:, None] * C + i_c[None, :]
    at = factors + head * 10 * C + i_c
    q_back, k_back = tl.load(at + 8 * C), tl.load(at + 9 * C)
    dtype = states.dtype.element_ty
    q_dq = tl.zeros([C], tl.float32)
    k_up = tl.zeros([C], tl.float32)
    k_down = tl.zeros([C], tl.float32)
    dg_end = 0.0
    for block in range(0, DK, BK):
        b_dq = tl.zeros([C, BK], tl.float32)
        b_up = tl.zeros([C, BK], tl.float32)
        b_down = tl.zeros([C, BK], tl.float32)
        h_dh = 0.0
        for first in range(0, DV, BV):
            v_mask = (first + i_vd < DV)[None, :]
            b_do = tl.load(do + do_at + first, mask=mask & v_mask, other=0.0).to(dtype)
            b_dv = tl.load(dv + dv_at + first, mask=mask & v_mask, other=0.0).to(dtype)
            b_x = tl.load(errors + x_at + first, mask=v_mask, other=0.0)
            b_h = tl.load(states + state_at + block * DV + first, mask=v_mask, other=0.0)
            b_dh = tl.load(dstates + state_at + block * DV + first, mask=v_mask, other=0.0)
            b_dq = tl.dot(b_do, tl.trans(b_h), b_dq, input_precision=PRECISION)
            b_up = tl.dot(b_dv, tl.trans(b_h), b_up, input_precision=PRECISION)
            b_down = tl.dot(b_x, tl.trans(b_dh), b_down, input_precision=PRECISION)
            h_dh += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32))
        b_q = tl.load(q + tile + block, mask=mask, other=0.0).to(dtype)
        b_k = tl.load(k + tile + block, mask=mask, other=0.0).to(dtype)
        b_e = tl.load(scores_e + square)
        b_f = tl.load(scores_f + square)
        b_dq *= tl.load(at)[:, None]
        b_up *= -tl.load(at + C)[:, None]
        b_down *= (tl.load(at + 2 * C) * tl.load(at + 3 * C))[:, None]
        dg_end += tl.sum(b_k.to(tl.float32) * b_down) + tl.load(decays + head) * h_dh
        b_dq = tl.dot(b_e, b_k, b_dq, input_precision=PRECISION)
        b_up = tl.dot(b_f, b_k, b_up, input_precision=PRECISION)
        b_down = tl.dot(tl.trans(b_e), b_q, b_down, input_precision=PRECISION)
        b_down = tl.dot(tl.trans(b_f), b_k, b_down, input_precision=PRECISION)
        q_dq += tl.sum(b_q.to(tl.float32) * b_dq, axis=1)
        k_up += tl.sum(b_k.to(tl.float32) * b_up, axis=1)
        k_down += tl.sum(b_k.to(tl.float32) * b_down, axis=1)
        b_down += b_up
        if BK == DK:
            b_dq -= (q_back * q_dq)[:, None] * b_q.to(tl.float32)
            b_down -= (k_back * (k_up + k_down))[:, None] * b_k.to(tl.float32)
        tl.store(dq + out_tile + block, b_dq.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + out_tile + block, b_down.to(dk.dtype.element_ty), mask=mask)

    b_dg = tl.cumsum(q_dq + k_up - k_down, axis=0, reverse=True) + dg_end
    tl.store(dg + out_row * HV + i_h, b_dg, mask=row_mask)
    weight, choice, sparse = load_weights(weights, token, row, row_mask, T, K)
    k_dk = k_up + k_down
    # A weight that underflowed to 0 has no gradient behind its softmax either.
    divisor = tl.where(weight > 1e-18, weight, float("inf"))
    b_dw = (q_dq + k_dk) / divisor
    if not GATE_LAST:
        b_dw = EPS * (q_back * q_dq + k_back * k_dk) / divisor / divisor / divisor
    tl.store(dw + choice * HV + i_h, b_dw, mask=sparse)
    if BK < DK:
        tl.debug_barrier()
        for block in range(0, DK, BK):
            _take_back(dq + out_tile + block, q + tile + block, q_back * q_dq, mask)
            _take_back(dk + out_tile + block, k + tile + block, k_back * k_dk, mask)


@triton.jit
def _take_back(gradient_at, x_at, factor, mask):
    """What the norm takes back of a gradient in memory: factor x."""
    gradient = tl.load(gradient_at, mask=mask, other=0.0).to(tl.float32)
    gradient -= factor[:, None] * tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(gradient_at, gradient.to(gradient_at.dtype.element_ty), mask=mask)
