"""The pairs of tokens inside chunks whose decays leave the range of one exponent.

The other kernels leave out these pairs and mark the chunk; here each pair takes its own exponent,
e^(G_i - G_j) <= 1. dq and dk of steep channels come without their factors e^(G - r_q), e^(r_k - G),
which only this file can form. Programs of chunks that are not marked return at once.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_shapes import GlaShapes
from .triton_tiles import load_decays, load_rows, load_weights, references


def add_steep_outputs(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    steep: Tensor,
    shared: Tensor,
    sparse: Tensor,
    shapes: GlaShapes,
) -> None:
    """Add to both streams' outputs what chunks marked in `steep` [M, H] owe to their own tokens."""
    gla_steep_fwd_kernel[(len(plan[2]),)](
        *tokens, weights, plan[0], plan[2], steep, shared, sparse,
        shapes.tokens, shapes.sequences,
        H=shapes.h, HP=triton.next_power_of_2(shapes.h), HV=shapes.hv,
        DK=shapes.dk, DV=shapes.dv, K=shapes.k, C=shapes.chunk,
        BV=triton.next_power_of_2(shapes.dv), SCALE=shapes.dk**-0.5, num_warps=8,
    )  # fmt: skip


def add_steep_gradients(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    gradients: tuple[Tensor, ...],
    steep: Tensor,
    shapes: GlaShapes,
) -> None:
    """The same for the slots of dq, dk, dv, dg and dweights, as `gla_dqk_kernel` lays them out."""
    gla_steep_bwd_kernel[(len(plan[2]),)](
        *tokens, weights, plan[0], plan[2], do, *gradients, steep,
        shapes.tokens, shapes.sequences,
        H=shapes.h, HP=triton.next_power_of_2(shapes.h), HV=shapes.hv,
        DK=shapes.dk, DV=shapes.dv, K=shapes.k, C=shapes.chunk,
        BV=triton.next_power_of_2(shapes.dv), SCALE=shapes.dk**-0.5,
        DW=gradients[-1].shape[-1], num_warps=8,
    )  # fmt: skip


@triton.jit
def gla_steep_fwd_kernel(
    q1, k1, q2, k2, v, g1, g2, weights, rows, chunks, steep, shared, sparse,
    T, B,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    i_q = tl.arange(0, HP)
    if tl.max(tl.load(steep + i_m * H + i_q, mask=i_q < H, other=0), axis=0) == 0:
        return
    q, k, g = q1, k1, g1
    if i_s >= B:
        q, k, g = q2, k2, g2
    mask, token, row = load_rows(rows, i_m, T, C)
    weight, _, _ = load_weights(weights, token, row, mask, T, K)
    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), tl.arange(0, BV)
    for i_h in range(HV):
        if tl.load(steep + i_m * H + i_h // (HV // H)) != 0:
            qk_tile = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
            b_sum = tl.cumsum(load_decays(g, qk_tile, mask[:, None]), axis=0)
            b_q = tl.load(q + qk_tile, mask=mask[:, None], other=0.0).to(tl.float32)
            b_k = tl.load(k + qk_tile, mask=mask[:, None], other=0.0).to(tl.float32)
            b_q *= (weight * SCALE)[:, None]
            b_k *= weight[:, None]
            v_mask = mask[:, None] & (i_vd < DV)[None, :]
            v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
            b_v = tl.load(v + v_at, mask=v_mask, other=0.0).to(tl.float32)
            o = tl.zeros([C, BV], tl.float32)
            for j in range(0, tl.sum(mask.to(tl.int32), axis=0)):
                at_j = (i_c == j)[:, None]
                sum_j = tl.sum(tl.where(at_j, b_sum, 0.0), axis=0)
                k_j = tl.sum(tl.where(at_j, b_k, 0.0), axis=0)
                v_j = tl.sum(tl.where(at_j, b_v, 0.0), axis=0)
                decay = tl.exp(tl.minimum(b_sum - sum_j[None, :], 0.0))
                a_j = tl.sum(b_q * k_j[None, :] * decay, axis=1)
                o += tl.where(i_c >= j, a_j, 0.0)[:, None] * v_j[None, :]
            if i_s < B:
                _add(shared + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :], o, v_mask)
            else:
                sparse_row = (row - T) * HV + i_h
                _add(sparse + (sparse_row * DV)[:, None] + i_vd[None, :], o, v_mask)


@triton.jit
def gla_steep_bwd_kernel(
    q1, k1, q2, k2, v, g1, g2, weights, rows, chunks, do,
    dq1, dk1, dq2, dk2, dv, dg1, dg2, dw, steep,
    T, B,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    i_q = tl.arange(0, HP)
    if tl.max(tl.load(steep + i_m * H + i_q, mask=i_q < H, other=0), axis=0) == 0:
        return
    q, k, g, dq, dk, dg = q1, k1, g1, dq1, dk1, dg1
    if i_s >= B:
        q, k, g, dq, dk, dg = q2, k2, g2, dq2, dk2, dg2
    mask, token, row = load_rows(rows, i_m, T, C)
    weight, choice, sparse = load_weights(weights, token, row, mask, T, K)
    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), tl.arange(0, BV)
    qk_mask = mask[:, None]
    for i_h in range(HV):
        if tl.load(steep + i_m * H + i_h // (HV // H)) != 0:
            qk_tile = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
            b_g = load_decays(g, qk_tile, qk_mask)
            _, r_q, r_k = references(tl.sum(b_g, axis=0), 80.0)
            b_sum = tl.cumsum(b_g, axis=0)
            b_q = tl.load(q + qk_tile, mask=qk_mask, other=0.0).to(tl.float32) * SCALE
            b_k = tl.load(k + qk_tile, mask=qk_mask, other=0.0).to(tl.float32)
            v_mask = mask[:, None] & (i_vd < DV)[None, :]
            v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
            b_v = tl.load(v + v_at, mask=v_mask, other=0.0).to(tl.float32)
            b_do = tl.load(do + v_at, mask=v_mask, other=0.0).to(tl.float32)
            b_dq = tl.zeros([C, DK], tl.float32)
            b_dk = tl.zeros([C, DK], tl.float32)
            b_dv = tl.zeros([C, BV], tl.float32)
            for j in range(0, tl.sum(mask.to(tl.int32), axis=0)):
                at_j = (i_c == j)[:, None]
                sum_j = tl.sum(tl.where(at_j, b_sum, 0.0), axis=0)
                k_j = tl.sum(tl.where(at_j, b_k * weight[:, None], 0.0), axis=0)
                v_j = tl.sum(tl.where(at_j, b_v, 0.0), axis=0)
                decay = tl.exp(tl.minimum(b_sum - sum_j[None, :], 0.0))
                decay = tl.where((i_c >= j)[:, None], decay, 0.0)
                b_qd = b_q * weight[:, None] * decay
                a_j = tl.sum(b_qd * k_j[None, :], axis=1)
                da_j = tl.sum(b_do * v_j[None, :], axis=1)
                b_dq += da_j[:, None] * k_j[None, :] * decay
                b_dk += tl.where(at_j, tl.sum(da_j[:, None] * b_qd, axis=0)[None, :], 0.0)
                b_dv += tl.where(at_j, tl.sum(a_j[:, None] * b_do, axis=0)[None, :], 0.0)
            b_dw = tl.sum(b_q * b_dq + b_k * b_dk, axis=1)
            b_dq *= weight[:, None]
            b_dk *= weight[:, None]
            b_dg = tl.cumsum(b_q * b_dq - b_k * b_dk, axis=0, reverse=True)

            qk_row = tl.where(i_s >= B, row - T, row)
            qk_out = ((qk_row * HV + i_h) * DK)[:, None] + i_k[None, :]
            in_steep = (r_q != r_k)[None, :]
            to_q = tl.where(in_steep, tl.exp(b_sum - r_q[None, :]), 1.0)
            to_k = tl.where(in_steep, tl.exp(r_k[None, :] - b_sum), 1.0)
            _scale_and_add(dq + qk_out, to_q, b_dq * SCALE, qk_mask)
            _scale_and_add(dk + qk_out, to_k, b_dk, qk_mask)
            _add(dg + qk_out, b_dg, qk_mask)
            _add(dv + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :], b_dv, v_mask)
            _add(dw + (choice * HV + i_h) * (DW // HV), b_dw, sparse)


@triton.jit
def _add(at, x, mask):
    _scale_and_add(at, 1.0, x, mask)


@triton.jit
def _scale_and_add(at, factor, x, mask):
    x += factor * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, x.to(at.dtype.element_ty), mask)
