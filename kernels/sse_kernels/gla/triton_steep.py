"""The pairs of tokens inside chunks whose decays leave the range of one exponent.

The other kernels leave out these pairs and mark the chunk; here each pair takes its own exponent,
e^(G_i - G_j) <= 1, and adds to what they wrote. Programs of chunks that are not marked return at
once.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_activate import (
    decay_slope,
    load_decays,
    load_keys,
    load_limits,
    load_silu,
    silu_slope,
)
from .triton_prepare import Prepared
from .triton_shapes import GlaShapes
from .triton_tiles import load_rows, load_weights


def add_steep_outputs(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    shared: Tensor,
    sparse: Tensor,
    shapes: GlaShapes,
) -> None:
    """Add to the outputs of every stream what chunks marked as steep owe to their own tokens."""
    gla_steep_fwd_kernel[(len(plan[2]),)](
        *tokens, weights, plan[0], plan[2], prepared.steep, prepared.norms, prepared.lowest,
        shared, sparse, shapes.tokens, shapes.sequences, **_constants(shapes), num_warps=8,
    )  # fmt: skip


def add_steep_gradients(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    do: Tensor,
    dv: Tensor,
    gradients: tuple[Tensor, ...],
    shapes: GlaShapes,
) -> None:
    """The same for the slots of dv and of what `chunk_gradients` returned, dweights' first part."""
    gla_steep_bwd_kernel[(len(plan[2]),)](
        *tokens, weights, plan[0], plan[2], prepared.steep, prepared.norms, prepared.lowest,
        do, dv, *gradients, shapes.tokens, shapes.sequences, PARTS=gradients[-1].shape[-1],
        **_constants(shapes), num_warps=8,
    )  # fmt: skip


def _constants(shapes: GlaShapes) -> dict[str, int | float | bool]:
    return dict(
        H=shapes.h, HP=triton.next_power_of_2(shapes.h), HV=shapes.hv, DK=shapes.dk, DV=shapes.dv,
        K=shapes.k, C=shapes.chunk, BV=triton.next_power_of_2(shapes.dv), SCALE=shapes.dk**-0.5,
        RAW=shapes.raw, TOPK=shapes.row_topk,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B"])
def gla_steep_fwd_kernel(
    q1, k1, q2, k2, v, g1, g2, weights, rows, chunks, steep, norms, lowest,
    shared, sparse, T, B,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    RAW: tl.constexpr, TOPK: tl.constexpr,
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
            i_head = i_h // (HV // H)
            norm, low = load_limits(
                norms, lowest, (i_m.to(tl.int64) * H + i_head) * C + i_c, RAW, TOPK
            )
            qk_tile = ((token * H + i_head) * DK)[:, None] + i_k[None, :]
            b_sum = tl.cumsum(load_decays(g, qk_tile, mask[:, None], RAW), axis=0)
            b_q = load_silu(q, qk_tile, mask[:, None], RAW) * (weight * SCALE)[:, None]
            b_k = load_keys(k, qk_tile, mask[:, None], i_k, norm, low, RAW, TOPK)
            b_k *= weight[:, None]
            v_mask = mask[:, None] & (i_vd < DV)[None, :]
            v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
            b_v = load_silu(v, v_at, v_mask, RAW)
            o = tl.zeros([C, BV], tl.float32)
            for j in range(0, tl.sum(mask.to(tl.int32), axis=0)):
                at_j = (i_c == j)[:, None]
                sum_j = tl.sum(tl.where(at_j, b_sum, 0.0), axis=0)
                k_j = tl.sum(tl.where(at_j, b_k, 0.0), axis=0)
                v_j = tl.sum(tl.where(at_j, b_v, 0.0), axis=0)
                decay = tl.exp(tl.minimum(b_sum - sum_j[None, :], 0.0))
                a_j = tl.sum(b_q * k_j[None, :] * decay, axis=1)
                o += tl.where(i_c >= j, a_j, 0.0)[:, None] * v_j[None, :]
            tile = ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
            if i_s < B:
                _add(shared + tile, o, v_mask)
            else:
                _add(sparse + tile - T.to(tl.int64) * HV * DV, o, v_mask)


@triton.jit(do_not_specialize=["T", "B"])
def gla_steep_bwd_kernel(
    q1, k1, q2, k2, v, g1, g2, weights, rows, chunks, steep, norms, lowest,
    do, dv, dq1, dk1, dq2, dk2, dg1, dg2, dw, T, B,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    RAW: tl.constexpr, TOPK: tl.constexpr, PARTS: tl.constexpr,
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
            i_head = i_h // (HV // H)
            norm, low = load_limits(
                norms, lowest, (i_m.to(tl.int64) * H + i_head) * C + i_c, RAW, TOPK
            )
            qk_tile = ((token * H + i_head) * DK)[:, None] + i_k[None, :]
            b_sum = tl.cumsum(load_decays(g, qk_tile, qk_mask, RAW), axis=0)
            b_q = load_silu(q, qk_tile, qk_mask, RAW) * SCALE
            b_k = load_keys(k, qk_tile, qk_mask, i_k, norm, low, RAW, TOPK)
            v_mask = mask[:, None] & (i_vd < DV)[None, :]
            v_at = ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
            b_v = load_silu(v, v_at, v_mask, RAW)
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
            b_dq *= SCALE
            if RAW:
                b_dq *= silu_slope(tl.load(q + qk_tile, mask=qk_mask, other=0.0).to(tl.float32))
                b_dk = b_k * (b_dk - tl.sum(b_k * b_dk, axis=1)[:, None])
                b_dg *= decay_slope(tl.load(g + qk_tile, mask=qk_mask, other=0.0).to(tl.float32))

            qk_row = tl.where(i_s >= B, row - T, row)
            qk_out = ((qk_row * HV + i_h) * DK)[:, None] + i_k[None, :]
            _add(dq + qk_out, b_dq, qk_mask)
            _add(dk + qk_out, b_dk, qk_mask)
            _add(dg + qk_out, b_dg, qk_mask)
            _add(dv + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :], b_dv, v_mask)
            _add(dw + (choice * HV + i_h) * PARTS, b_dw, sparse)


@triton.jit
def _add(at, x, mask):
    x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, x.to(at.dtype.element_ty), mask)
