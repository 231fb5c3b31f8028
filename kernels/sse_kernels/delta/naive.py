"""SSE-GDN as the paper writes it, one token after the other: the definition of the operator."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..routing import Routing
from .gate import sparse_key, unit


def naive_sse_gdn(
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
    """See `sse_gdn`: same arguments, same results, no tricks."""
    dtype = compute_dtype(q1)
    group = v.shape[1] // q1.shape[1]
    q1, k1, q2, k2 = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q1, k1, q2, k2))
    values, weights = v.to(dtype), routing.weights.to(dtype)
    g1, beta1, g2, beta2 = (x.to(dtype) for x in (g1, beta1, g2, beta2))
    partitions, scale = routing.probs.shape[1], q1.shape[-1] ** -0.5
    zero = values.new_zeros(v.shape[1], v.shape[2], q1.shape[2])

    outputs, finals = [], []
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = [zero] * (1 + partitions)
        if initial_state is not None:
            state = list(initial_state[b].to(dtype).unbind())
        for t in range(start, end):
            state[0] = _write(state[0], unit(k1[t]), values[t], g1[t], beta1[t])
            o = _read(state[0], unit(q1[t]))
            for n, w in zip(routing.ids[t].tolist(), weights[t], strict=True):
                k = sparse_key(k2[t], w, gate_after_norm)
                q = sparse_key(q2[t], w, gate_after_norm)
                state[1 + n] = _write(state[1 + n], k, values[t], g2[t], beta2[t])
                o = o + _read(state[1 + n], q)
            outputs.append(scale * o)
        finals.append(torch.stack(state))
    o = torch.stack(outputs) if outputs else values * 0.0
    return o.to(v.dtype), torch.stack(finals) if output_final_state else None


def _write(state: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """S <- e^g S, then S <- S + beta k (v - S^T k)^T; the state is value-major, [Hv, Dv, Dk]."""
    state = state * g.exp()[:, None, None]
    error = beta[:, None] * (v - _read(state, k))
    return state + error[:, :, None] * k[:, None, :]


def _read(state: Tensor, q: Tensor) -> Tensor:
    """q^T S, [Hv, Dv]."""
    return (state * q[:, None, :]).sum(-1)
