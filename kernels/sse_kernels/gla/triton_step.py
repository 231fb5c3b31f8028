"""SSE-GLA, one token of every sequence: the touched states are read and written once, in place."""

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


def triton_sse_gla_step(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    g1: Tensor,
    g2: Tensor,
    routing: Routing,
    *,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    """See `sse_gla_step`. One launch, which a CUDA graph can hold; `state` must be contiguous."""
    assert state.is_contiguous(), "the state is changed in place: it must be contiguous"
    tokens = [x.contiguous() for x in (q1, k1, q2, k2, v, g1, g2)]
    ids, weights = routing.ids.contiguous(), routing.weights.contiguous()
    return _gla_step(*tokens, ids, weights, state, slots.contiguous())


@torch.library.custom_op("sse_kernels::gla_step", mutates_args={"state"})
def _gla_step(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, g1: Tensor, g2: Tensor,
    ids: Tensor, weights: Tensor, state: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    o = torch.empty_like(v)
    if o.numel() == 0:
        return o
    (batch, h, dk), (_, hv, dv) = q1.shape, v.shape
    blocks = block_sizes("gla_step", v, dk)
    block_v = min(blocks.v, triton.next_power_of_2(dv))
    gla_step_kernel[(batch * hv * triton.cdiv(dv, block_v),)](
        q1, k1, q2, k2, v, g1, g2, ids, weights, state, slots, o, state.shape[0],
        H=h, HV=hv, DK=dk, DKP=triton.next_power_of_2(dk), DV=dv, K=ids.shape[1],
        N=state.shape[1] - 1, BV=block_v, SCALE=dk**-0.5,
        **blocks.options,
    )  # fmt: skip
    return o


@_gla_step.register_fake
def _(q1, k1, q2, k2, v, g1, g2, ids, weights, state, slots):
    return torch.empty_like(v)


@triton.jit(do_not_specialize=["S"])
def gla_step_kernel(
    q1, k1, q2, k2, v, g1, g2, ids, weights, state, slots, o, S,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BV: tl.constexpr, SCALE: tl.constexpr,
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
    b_v = tl.load(v + (i_b * HV + i_h) * DV + i_vd, mask=v_mask, other=0.0).to(tl.float32)
    row = state_row(ids, i_b, slot, 0, K, N)
    b_next = tl.load(state + row * HV * DV * DK + tile, mask=mask, other=0.0)
    b_o = tl.zeros([BV], tl.float32)
    for s in tl.static_range(1 + K):
        b_state, this_row = b_next.to(tl.float32), row
        if s < K:
            row = state_row(ids, i_b, slot, s + 1, K, N)
            b_next = tl.load(state + row * HV * DV * DK + tile, mask=mask, other=0.0)
        if s == 0:
            b_q = tl.load(q1 + qk_at, mask=k_mask, other=0.0).to(tl.float32)
            b_k = tl.load(k1 + qk_at, mask=k_mask, other=0.0).to(tl.float32)
            b_g = tl.load(g1 + qk_at, mask=k_mask, other=0.0).to(tl.float32)
        else:
            w = tl.load(weights + i_b * K + s - 1).to(tl.float32)
            b_q = tl.load(q2 + qk_at, mask=k_mask, other=0.0).to(tl.float32) * w
            b_k = tl.load(k2 + qk_at, mask=k_mask, other=0.0).to(tl.float32) * w
            b_g = tl.load(g2 + qk_at, mask=k_mask, other=0.0).to(tl.float32)
        b_state = b_state * tl.exp(b_g)[None, :] + b_v[:, None] * b_k[None, :]
        b_o += tl.sum(b_state * b_q[None, :], axis=1)
        out = state + this_row * HV * DV * DK + tile
        tl.store(out, b_state.to(state.dtype.element_ty), mask=mask)
    o_at = o + (i_b * HV + i_h) * DV + i_vd
    tl.store(o_at, (b_o * SCALE).to(o.dtype.element_ty), mask=v_mask)
