"""SSE-GDN, one token of every sequence: the touched states are read and written once, in place."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sizes import block_sizes
from ..routing import Routing
from ..triton_state import load_slot, state_row
from .gate import NORM_EPS


def triton_sse_gdn_step(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    g1: Tensor,
    beta1: Tensor,
    g2: Tensor,
    beta2: Tensor,
    routing: Routing,
    *,
    state: Tensor,
    slots: Tensor,
    gate_after_norm: bool = False,
) -> Tensor:
    """See `sse_gdn_step`. One launch, which a CUDA graph can hold; `state` must be contiguous."""
    assert state.is_contiguous(), "the state is changed in place: it must be contiguous"
    tokens = [x.contiguous() for x in (q1, k1, q2, k2, v, g1, beta1, g2, beta2)]
    ids, weights = routing.ids.contiguous(), routing.weights.contiguous()
    return _gdn_step(*tokens, ids, weights, state, slots.contiguous(), gate_after_norm)


@torch.library.custom_op("sse_kernels::gdn_step", mutates_args={"state"})
def _gdn_step(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor,
    g1: Tensor, beta1: Tensor, g2: Tensor, beta2: Tensor,
    ids: Tensor, weights: Tensor, state: Tensor, slots: Tensor, gate_after_norm: bool,
) -> Tensor:  # fmt: skip
    o = torch.empty_like(v)
    if o.numel() == 0:
        return o
    (batch, h, dk), (_, hv, dv) = q1.shape, v.shape
    blocks = block_sizes("gdn_step", v, dk)
    block_v = min(blocks.v, triton.next_power_of_2(dv))
    gdn_step_kernel[(batch * hv * triton.cdiv(dv, block_v),)](
        q1, k1, q2, k2, v, g1, beta1, g2, beta2, ids, weights, state, slots, o, state.shape[0],
        H=h, HV=hv, DK=dk, DKP=triton.next_power_of_2(dk), DV=dv, K=ids.shape[1],
        N=state.shape[1] - 1, BV=block_v, SCALE=dk**-0.5, EPS=NORM_EPS, GATE_LAST=gate_after_norm,
        **blocks.options,
    )  # fmt: skip
    return o


@_gdn_step.register_fake
def _(
    q1, k1, q2, k2, v, g1, beta1, g2, beta2, ids, weights, state, slots, gate_after_norm
):  # fmt: skip
    return torch.empty_like(v)


@triton.jit
def _unit(at, mask, factor, EPS: tl.constexpr):
    x = factor * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + EPS)


@triton.jit(do_not_specialize=["S"])
def gdn_step_kernel(
    q1, k1, q2, k2, v, g1, beta1, g2, beta2, ids, weights, state, slots, o, S,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_b = (tl.program_id(0) // (NV * HV)).to(tl.int64)
    slot = load_slot(slots, i_b, S)
    i_k, i_vd = tl.arange(0, DKP), i_v * BV + tl.arange(0, BV)
    k_mask, v_mask = i_k < DK, i_vd < DV
    mask = v_mask[:, None] & k_mask[None, :]
    tile = (i_h * DV + i_vd[:, None]) * DK + i_k[None, :]
    qk_at = (i_b * H + i_h // (HV // H)) * DK + i_k
    head = i_b * HV + i_h
    b_v = tl.load(v + head * DV + i_vd, mask=v_mask, other=0.0).to(tl.float32)
    row = state_row(ids, i_b, slot, 0, K, N)
    b_next = tl.load(state + row * HV * DV * DK + tile, mask=mask, other=0.0)
    b_o = tl.zeros([BV], tl.float32)
    for s in tl.static_range(1 + K):
        b_state, this_row = b_next.to(tl.float32), row
        if s < K:
            row = state_row(ids, i_b, slot, s + 1, K, N)
            b_next = tl.load(state + row * HV * DV * DK + tile, mask=mask, other=0.0)
        if s == 0:
            b_q, b_k = _unit(q1 + qk_at, k_mask, 1.0, EPS), _unit(k1 + qk_at, k_mask, 1.0, EPS)
            b_g, b_beta = tl.load(g1 + head), tl.load(beta1 + head)
        else:
            w = tl.load(weights + i_b * K + s - 1).to(tl.float32)
            before = 1.0 if GATE_LAST else w
            b_q, b_k = (
                _unit(q2 + qk_at, k_mask, before, EPS),
                _unit(k2 + qk_at, k_mask, before, EPS),
            )
            if GATE_LAST:
                b_q *= w
                b_k *= w
            b_g, b_beta = tl.load(g2 + head), tl.load(beta2 + head)
        b_state *= tl.exp(b_g.to(tl.float32))
        error = b_beta.to(tl.float32) * (b_v - tl.sum(b_state * b_k[None, :], axis=1))
        b_state += error[:, None] * b_k[None, :]
        b_o += tl.sum(b_state * b_q[None, :], axis=1)
        out = state + this_row * HV * DV * DK + tile
        tl.store(out, b_state.to(state.dtype.element_ty), mask=mask)
    o_at = o + head * DV + i_vd
    tl.store(o_at, (b_o * SCALE).to(o.dtype.element_ty), mask=v_mask)
