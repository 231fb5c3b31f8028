"""SSE-GDN one token at a time for many sequences at once: decoding, and the oracle of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..routing import Routing
from ..streams import scan_tokens, stack_streams, state_rows, sum_streams
from .gate import sparse_key, unit


@torch.no_grad()
def recurrent_sse_gdn_step(
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
    """See `sse_gdn_step`."""
    rows, index = state_rows(state, slots, routing.ids)
    old = rows.index_select(0, index.flatten()).unflatten(0, index.shape).to(compute_dtype(q1))
    args = q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing.weights
    new, o = _step(old, *args, gate_after_norm=gate_after_norm)
    rows.index_copy_(0, index.flatten(), new.flatten(0, 1).to(state.dtype))
    return o.to(v.dtype)


def recurrent_sse_gdn(
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
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    gate_after_norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `sse_gdn`: same arguments; on CPU equal to the bit to `sse_gdn_step` token by token."""
    args = q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing.weights

    def step(state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return _step(state, *(x[rows] for x in args), gate_after_norm=gate_after_norm)

    return scan_tokens(step, q1, v, routing, cu_seqlens, initial_state, output_final_state)


def _step(
    state: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    g1: Tensor,
    beta1: Tensor,
    g2: Tensor,
    beta2: Tensor,
    weights: Tensor,
    *,
    gate_after_norm: bool,
) -> tuple[Tensor, Tensor]:
    """New states [B, 1+K, Hv, Dv, Dk] and outputs [B, Hv, Dv] of one token a sequence.

    Elementwise products and sums over one axis only, so that no row depends on its neighbours.
    """
    dtype, group = state.dtype, v.shape[1] // q1.shape[1]
    q1, k1, q2, k2, v = (x.to(dtype) for x in (q1, k1, q2, k2, v))
    w = weights.to(dtype)[:, :, None, None]
    q = stack_streams(unit(q1), sparse_key(q2[:, None], w, gate_after_norm), group)
    k = stack_streams(unit(k1), sparse_key(k2[:, None], w, gate_after_norm), group)
    copies = -1, weights.shape[1], -1
    g = stack_streams(g1, g2[:, None].expand(copies)).to(dtype)
    beta = stack_streams(beta1, beta2[:, None].expand(copies)).to(dtype)

    state = state * g.exp()[..., None, None]
    error = beta[..., None] * (v[:, None] - (state * k[..., None, :]).sum(-1))
    state = state + error[..., None] * k[..., None, :]
    return state, q1.shape[-1] ** -0.5 * sum_streams((state * q[..., None, :]).sum(-1))
