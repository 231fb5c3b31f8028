"""One token of every sequence through an SSE layer's mixer core, in one launch.

A program owns one value head of one sequence: it routes, activates, reads and writes the states
that the token touches, sums over them, and applies the output norm and gate.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import DECAY_TEMPERATURE
from .block_sizes import block_sizes
from .delta.gate import NORM_EPS
from .routing import Routing
from .triton_state import load_slot


def triton_layer_step(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    decays: tuple[Tensor, Tensor],
    rates: tuple[Tensor, Tensor] | None,
    logits: Tensor,
    *,
    k: int,
    ids: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor | None,
    eps: float,
    state: Tensor,
    slots: Tensor,
    row_topk: int | None = None,
    allow_neg_eigval: bool = False,
    gate_after_norm: bool = False,
) -> tuple[Tensor, Routing]:
    """See `sse_gla_layer_step`; the routing's ids are uint8, as a replay takes them.

    An id outside 0..N-1 or given twice is skipped, and recorded as partition 0 of weight 0.
    decays: (gk1, gk2) of SSE-GLA; with `rates` (A_log, dt_bias), (a, b) of SSE-GDN. Rows of the
    inputs may lie apart, as slices of one projection do.
    """
    (batch, h, dk), (_, hv, dv) = q1.shape, v.shape
    n = logits.shape[1]
    o = torch.empty(batch, hv, dv, dtype=v.dtype, device=v.device)
    routing = Routing(
        torch.empty(batch, k, dtype=torch.uint8, device=v.device),
        torch.empty(batch, k, dtype=torch.float32, device=v.device),
        torch.empty(batch, n, dtype=torch.float32, device=v.device),
    )
    if o.numel() == 0:
        return o, routing
    d1, d2 = decays
    rows = [_rows(x) for x in (q1, k1, q2, k2, v, d1, d2)]
    replay = None if ids is None else _rows(ids)
    gate = None if gate is None else _rows(gate)
    a_log, dt_bias = (None, None) if rates is None else (x.contiguous() for x in rates)
    narrow = "" if state.dtype == torch.float32 else "_half"
    blocks = block_sizes(f"layer_step{narrow}", v, dk)
    width = triton.next_power_of_2(dv)
    layer_step_kernel[(batch * hv,)](
        *rows, gate, a_log, dt_bias, norm_weight.contiguous(), logits.contiguous(), replay,
        state, slots.contiguous(), o, *routing, state.shape[0], eps,
        *(x.stride(0) for x in rows), *(0 if x is None else x.stride(0) for x in (gate, replay)),
        H=h, HV=hv, DK=dk, DKP=triton.next_power_of_2(dk), DV=dv, DVP=width,
        K=k, N=n, NP=max(triton.next_power_of_2(n), 2), BV=min(blocks.v, width),
        ROW_TOPK=None if row_topk is None or row_topk >= dk else row_topk,
        BETA_SCALE=2.0 if allow_neg_eigval else 1.0, GATE_LAST=gate_after_norm,
        SCALE=dk**-0.5, TEMPERATURE=DECAY_TEMPERATURE, UNIT_EPS=NORM_EPS, STAGES=blocks.stages,
        num_warps=blocks.warps,
    )  # fmt: skip
    return o, routing


def _rows(x: Tensor) -> Tensor:
    """x [B, ...] with every row contiguous."""
    return x if x[0].is_contiguous() else x.contiguous()


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _largest(x, n, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """Marks [NP] the K largest of x, ties to the lowest index, as `top_partitions`."""
    x = tl.where(x != x, float("inf"), x)
    chosen = tl.zeros([NP], tl.int32)
    for _ in tl.static_range(K):
        open_ = (n < N) & (chosen == 0)
        largest = tl.max(tl.where(open_, x, float("-inf")), axis=0)
        chosen += (n == tl.min(tl.where(open_ & (x == largest), n, NP), axis=0)).to(tl.int32)
    return chosen


@triton.jit
def _classify(at, i_k, DK: tl.constexpr, ROW_TOPK: tl.constexpr):
    """Softmax over the key's rows, or over its ROW_TOPK largest, ties to the lowest row."""
    x = tl.load(at + i_k, mask=i_k < DK, other=float("-inf")).to(tl.float32)
    if ROW_TOPK is not None:
        rank = tl.zeros(x.shape, tl.int32)
        for start in range(0, DK, 16):
            j = start + tl.arange(0, 16)
            other = tl.load(at + j, mask=j < DK, other=float("-inf")).to(tl.float32)[:, None]
            ahead = (other > x[None, :]) | ((other == x[None, :]) & (j[:, None] < i_k[None, :]))
            rank += tl.sum(ahead.to(tl.int32), axis=0)
        x = tl.where(rank < ROW_TOPK, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _keep(at, mask, TEMPERATURE: tl.constexpr):
    """SSE-GLA's decay factor of every channel."""
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.exp((tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))) / TEMPERATURE)


@triton.jit
def _rate(a, b, a_log, dt_bias, i, BETA_SCALE: tl.constexpr):
    """SSE-GDN's decay factor and beta of a head."""
    x = tl.load(a).to(tl.float32) + tl.load(dt_bias + i).to(tl.float32)
    softplus = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))
    keep = tl.exp(-tl.exp(tl.load(a_log + i).to(tl.float32)) * softplus)
    return keep, BETA_SCALE / (1 + tl.exp(-tl.load(b).to(tl.float32)))


@triton.jit
def _inverse_norm(x, weight, UNIT_EPS: tl.constexpr, GATE_LAST: tl.constexpr):
    """What makes x the unit query or key of a stream with this router weight."""
    square = tl.sum(x * x, axis=0)
    if GATE_LAST:
        return weight * tl.rsqrt(square + UNIT_EPS)
    return weight * tl.rsqrt(weight * weight * square + UNIT_EPS)


@triton.jit
def _sweep(
    state, v, b_o, b_q, b_k, keep, beta, rows,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BV: tl.constexpr,
    GDN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Moves one state [Dv, Dk] a token on and adds its read to b_o [DVP / BV, BV].

    rows: Dv, or 0 to leave everything as it is.
    """
    i_k = tl.arange(0, DKP)
    chunk = tl.arange(0, DVP // BV)
    for c in tl.range(0, (DV + BV - 1) // BV, num_stages=STAGES):
        i_v = c * BV + tl.arange(0, BV)
        mask = (i_v < rows)[:, None] & (i_k < DK)[None, :]
        at = state + i_v[:, None] * DK + i_k[None, :]
        b_state = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b_v = _silu(tl.load(v + i_v, mask=i_v < rows, other=0.0).to(tl.float32))
        if GDN:
            b_state *= keep
            b_v = beta * (b_v - tl.sum(b_state * b_k[None, :], axis=1))
        else:
            b_state *= keep[None, :]
        b_state += b_v[:, None] * b_k[None, :]
        tl.store(at, b_state.to(state.dtype.element_ty), mask=mask)
        read = tl.sum(b_state * b_q[None, :], axis=1)
        b_o += tl.where((chunk == c)[:, None], read[None, :], 0.0)
    return b_o


@triton.jit
def layer_step_kernel(
    q1, k1, q2, k2, v, d1, d2, gate, a_log, dt_bias, norm_weight, logits, ids, state, slots,
    o, out_ids, out_weights, out_probs, S, eps,
    s_q1, s_k1, s_q2, s_k2, s_v, s_d1, s_d2, s_gate, s_ids,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BV: tl.constexpr,
    ROW_TOPK: tl.constexpr, BETA_SCALE: tl.constexpr, GATE_LAST: tl.constexpr,
    SCALE: tl.constexpr, TEMPERATURE: tl.constexpr, UNIT_EPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GDN: tl.constexpr = a_log is not None
    i_h, i_b = tl.program_id(0) % HV, (tl.program_id(0) // HV).to(tl.int64)
    row = load_slot(slots, i_b, S) * (1 + N)
    i_k, i_n = tl.arange(0, DKP), tl.arange(0, NP)
    k_mask, head = i_k < DK, i_h // (HV // H) * DK
    b_logits = tl.load(logits + i_b * N + i_n, mask=i_n < N, other=float("-inf")).to(tl.float32)
    v_at, tile = v + i_b * s_v + i_h * DV, i_h * DV * DK
    b_o = tl.zeros([DVP // BV, BV], tl.float32)

    # The shared stream's state does not wait for the router.
    b_q = _silu(tl.load(q1 + i_b * s_q1 + head + i_k, mask=k_mask, other=0.0).to(tl.float32))
    if GDN:
        b_k = _silu(tl.load(k1 + i_b * s_k1 + head + i_k, mask=k_mask, other=0.0).to(tl.float32))
        b_q *= _inverse_norm(b_q, 1.0, UNIT_EPS, GATE_LAST)
        b_k *= _inverse_norm(b_k, 1.0, UNIT_EPS, GATE_LAST)
        keep, beta = _rate(
            d1 + i_b * s_d1 + i_h, d2 + i_b * s_d2 + i_h, a_log, dt_bias, i_h, BETA_SCALE
        )
    else:
        b_k = _classify(k1 + i_b * s_k1 + head, i_k, DK, ROW_TOPK)
        keep, beta = _keep(d1 + i_b * s_d1 + head + i_k, k_mask, TEMPERATURE), 1.0
    b_o = _sweep(
        state + row * HV * DV * DK + tile, v_at, b_o, b_q, b_k, keep, beta, DV,
        DK, DKP, DV, DVP, BV, GDN, STAGES,
    )  # fmt: skip

    e = tl.exp(b_logits - tl.max(b_logits, axis=0))
    probs = e / tl.sum(e, axis=0)
    if ids is None:
        chosen = _largest(b_logits, i_n, K, N, NP)
    else:
        chosen = tl.zeros([NP], tl.int32)
        for s in tl.static_range(K):
            chosen |= (i_n == tl.load(ids + i_b * s_ids + s).to(tl.int32)).to(tl.int32)
        chosen = tl.where(i_n < N, chosen, 0)
    place = tl.cumsum(chosen, axis=0)
    if i_h == 0:
        at = i_b * K + place - 1
        tl.store(out_ids + at, i_n.to(tl.uint8), mask=chosen > 0)
        tl.store(out_weights + at, probs, mask=chosen > 0)
        tl.store(out_probs + i_b * N + i_n, probs, mask=i_n < N)
        if ids is not None:
            skipped = (i_n >= tl.sum(chosen, axis=0)) & (i_n < K)
            tl.store(out_ids + i_b * K + i_n, tl.zeros([NP], tl.uint8), mask=skipped)
            tl.store(out_weights + i_b * K + i_n, tl.zeros([NP], tl.float32), mask=skipped)

    b_q = _silu(tl.load(q2 + i_b * s_q2 + head + i_k, mask=k_mask, other=0.0).to(tl.float32))
    if GDN:
        b_k = _silu(tl.load(k2 + i_b * s_k2 + head + i_k, mask=k_mask, other=0.0).to(tl.float32))
        keep, beta = _rate(
            d1 + i_b * s_d1 + HV + i_h, d2 + i_b * s_d2 + HV + i_h, a_log, dt_bias, HV + i_h,
            BETA_SCALE,
        )  # fmt: skip
    else:
        b_k = _classify(k2 + i_b * s_k2 + head, i_k, DK, ROW_TOPK)
        keep, beta = _keep(d2 + i_b * s_d2 + head + i_k, k_mask, TEMPERATURE), 1.0
    for s in tl.static_range(1, 1 + K):
        this = (chosen > 0) & (place == s)
        partition = tl.sum(tl.where(this, i_n, 0), axis=0)
        w = tl.sum(tl.where(this, probs, 0.0), axis=0)
        rows = DV
        if ids is not None:
            rows = tl.sum(tl.where(this, DV, 0), axis=0)
        if GDN:
            w_q = _inverse_norm(b_q, w, UNIT_EPS, GATE_LAST)
            w_k = _inverse_norm(b_k, w, UNIT_EPS, GATE_LAST)
        else:
            w_q, w_k = w, w
        b_o = _sweep(
            state + (row + 1 + partition) * HV * DV * DK + tile, v_at, b_o, b_q * w_q, b_k * w_k,
            keep, beta, rows, DK, DKP, DV, DVP, BV, GDN, STAGES,
        )  # fmt: skip

    i_v = tl.arange(0, DVP // BV)[:, None] * BV + tl.arange(0, BV)[None, :]
    v_mask = i_v < DV
    b_o *= SCALE
    mean = tl.sum(tl.sum(b_o * b_o, axis=1), axis=0) / DV
    y = b_o * tl.rsqrt(mean + eps) * tl.load(norm_weight + i_v, mask=v_mask, other=0.0)
    if gate is not None:
        b_gate = tl.load(gate + i_b * s_gate + i_h * DV + i_v, mask=v_mask, other=0.0)
        y *= _silu(b_gate.to(tl.float32))
    tl.store(o + (i_b * HV + i_h) * DV + i_v, y.to(o.dtype.element_ty), mask=v_mask)
