"""SSE-GDN backward: a sweep rebuilds the states h and x, one in reverse takes dh through the delta
rule, then every chunk stands alone (triton_dqk).

With dh the gradient of the state after a chunk:
    du = A^T do + e^(G_C - G) (K dh)        y = du - P^T (beta du)        dv = beta y
    dbeta = sum_v x y                       dh <- e^G_C dh + (e^G Q)^T do - (e^G K)^T dv
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
from ..gla.triton_forward import sum_slots
from ..gla.triton_shapes import GlaShapes, dot_precision
from ..gla.triton_tiles import load_rows, load_segment
from .triton_dqk import chunk_gradients
from .triton_prepare import Prepared, prepare
from .triton_sweep import rebuild_states


def gdn_backward(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    shapes: GlaShapes,
    *,
    gate_after_norm: bool,
    silu_of: tuple[Tensor | None, ...] = (None,) * 5,
) -> tuple[Tensor, ...]:
    """Gradients of q1 k1 q2 k2 v g1 beta1 g2 beta2, the weights and, if given, `initial_state`.

    silu_of: what q1 k1 q2 k2 v are silu of, if it is for these that gradients are wanted.
    """
    q1, k1, q2, k2, v, g1, beta1, g2, beta2 = tokens
    prepared = prepare(tokens, weights, plan, shapes, gate_after_norm=gate_after_norm)
    states, errors = rebuild_states(tokens, plan, prepared, initial_state, shapes)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dstates, dv, dbeta1, dbeta2 = _sweep_back(
        tokens, plan, prepared, errors, do, dfinal, dinitial, shapes
    )
    dq1, dk1, dq2, dk2, dg1, dg2, dw = chunk_gradients(
        tokens, weights, plan, prepared, (states, dstates, errors, dv), do, shapes, gate_after_norm
    )
    group = shapes.hv // shapes.h
    gradients = (
        sum_slots(dq1, q1.dtype, group=group, silu_of=silu_of[0]),
        sum_slots(dk1, k1.dtype, group=group, silu_of=silu_of[1]),
        sum_slots(dq2, q2.dtype, group=group, silu_of=silu_of[2]),
        sum_slots(dk2, k2.dtype, group=group, silu_of=silu_of[3]),
        sum_slots(dv, v.dtype, silu_of=silu_of[4]),
        _sum_scalars(dg1, g1.dtype),
        _sum_scalars(dbeta1, beta1.dtype),
        _sum_scalars(dg2, g2.dtype),
        _sum_scalars(dbeta2, beta2.dtype),
        sum_slots(dw.view(1, *dw.shape[:1], -1, 1), weights.dtype, group=shapes.hv)[..., 0],
    )
    return gradients if dinitial is None else (*gradients, dinitial)


def _sum_scalars(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, T, Hv] summed over its slots, always in the same order."""
    return sum_slots(slots[..., None], dtype)[..., 0]


def _sweep_back(
    tokens: tuple[Tensor, ...],
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    errors: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    shapes: GlaShapes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh after every chunk [M, Hv, Dk, Dv], the slots of dv [1+K, T, Hv, Dv], and those of dbeta1
    and dbeta2 [1 or K, each times the value blocks, T, Hv]; writes `dinitial` if given."""
    rows, segments, chunks = plan
    v = tokens[4]
    blocks = block_sizes("gdn_dstates", v, shapes.width)
    block_v = min(blocks.v, triton.next_power_of_2(shapes.dv))
    blocks_v = triton.cdiv(shapes.dv, block_v)
    dstates = errors.new_empty(len(chunks), shapes.hv, shapes.dk, shapes.dv)
    dv = v.new_empty(1 + shapes.k, *v.shape)
    dbeta1, dbeta2 = (
        v.new_empty(slots * blocks_v, *v.shape[:2], dtype=torch.float32) for slots in (1, shapes.k)
    )
    gdn_dstates_kernel[(blocks_v * shapes.hv * shapes.segments,)](
        *tokens[:4], *prepared, errors, do, rows, segments, dfinal, dstates, dinitial, dv,
        dbeta1, dbeta2, shapes.tokens, shapes.sequences, len(chunks),
        H=shapes.h, HV=shapes.hv, DK=shapes.dk, DV=shapes.dv, N=shapes.n,
        C=shapes.chunk, BV=block_v, PRECISION=dot_precision(v),
        **blocks.options,
    )  # fmt: skip
    return dstates, dv, dbeta1, dbeta2


@triton.jit(do_not_specialize=["T", "B", "M"])
def gdn_dstates_kernel(
    q1, k1, q2, k2, scores, solved, factors, decays, errors, do, rows, segments,
    dfinal, dstates, dinitial, dv, dbeta1, dbeta2,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_s = tl.program_id(0) // (NV * HV)
    chunk, chunk_count = load_segment(segments, i_s, B, M, N)
    q, k, dbeta, first_slot = q1, k1, dbeta1, 0
    if i_s >= B:
        q, k, dbeta, first_slot = q2, k2, dbeta2, 1

    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    v_mask = (i_vd < DV)[None, :]
    edge_at = ((i_s % B * (1 + N) + i_s // B).to(tl.int64) * HV + i_h) * DK * DV
    edge_tile = edge_at + i_k[:, None] + i_vd[None, :] * DK
    dh = tl.zeros([DK, BV], tl.float32)
    if dfinal is not None:
        dh += tl.load(dfinal + edge_tile, mask=v_mask, other=0.0).to(tl.float32)
    dtype = scores.dtype.element_ty
    for step in range(0, chunk_count):
        i_m = chunk + chunk_count - 1 - step
        head = i_m.to(tl.int64) * HV + i_h
        square = head * C * C + i_c[:, None] * C + i_c[None, :]
        row_mask, token, row = load_rows(rows, i_m, T, C)
        qk_at = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
        b_q = tl.load(q + qk_at, mask=row_mask[:, None], other=0.0).to(dtype)
        b_k = tl.load(k + qk_at, mask=row_mask[:, None], other=0.0).to(dtype)
        b_a = tl.load(scores + square)
        b_p = tl.load(solved + square)
        mask = row_mask[:, None] & v_mask
        do_at = do + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
        b_do = tl.load(do_at, mask=mask, other=0.0).to(dtype)
        x_at = errors + head * C * DV + i_c[:, None] * DV + i_vd[None, :]
        b_x = tl.load(x_at, mask=v_mask, other=0.0).to(tl.float32)
        at = factors + head * 10 * C + i_c
        b_beta = tl.load(at + 3 * C)[:, None]
        b_dh = dh.to(dtype)
        state_at = dstates + head * DK * DV + i_k[:, None] * DV + i_vd[None, :]
        tl.store(state_at, b_dh, mask=v_mask)

        du = tl.load(at + 2 * C)[:, None] * tl.dot(b_k, b_dh, input_precision=PRECISION)
        du = tl.dot(tl.trans(b_a), b_do, du, input_precision=PRECISION)
        y = du - tl.dot(tl.trans(b_p), (b_beta * du).to(dtype), input_precision=PRECISION)
        b_dv = b_beta * y
        dv_at = dv + ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
        tl.store(dv_at, b_dv.to(dv.dtype.element_ty), mask=mask)
        dbeta_at = (((row // T - first_slot) * NV + i_v) * T + token) * HV + i_h
        tl.store(dbeta + dbeta_at, tl.sum(b_x * y, axis=1), mask=row_mask)
        dh *= tl.load(decays + head)
        b_do = (tl.load(at)[:, None] * b_do.to(tl.float32)).to(dtype)
        dh = tl.dot(tl.trans(b_q), b_do, dh, input_precision=PRECISION)
        b_dv = (-tl.load(at + C)[:, None] * b_dv).to(dtype)
        dh = tl.dot(tl.trans(b_k), b_dv, dh, input_precision=PRECISION)
    if dinitial is not None:
        tl.store(dinitial + edge_tile, dh, mask=v_mask)
