"""SSE-GLA as the paper writes it, one token after the other: the definition of the operator."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..routing import Routing


def naive_sse_gla(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    g1: Tensor,
    g2: Tensor,
    routing: Routing,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `sse_gla`: same arguments, same results, no tricks."""
    dtype = compute_dtype(q1)
    group = v.shape[1] // q1.shape[1]
    q1, k1, q2, k2, g1, g2 = (
        x.to(dtype).repeat_interleave(group, dim=1) for x in (q1, k1, q2, k2, g1, g2)
    )
    values, weights = v.to(dtype), routing.weights.to(dtype)
    partitions, scale = routing.probs.shape[1], q1.shape[-1] ** -0.5
    zero = values.new_zeros(v.shape[1], v.shape[2], q1.shape[2])

    outputs, finals = [], []
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = [zero] * (1 + partitions)
        if initial_state is not None:
            state = list(initial_state[b].to(dtype).unbind())
        for t in range(start, end):
            state[0] = _write(state[0], k1[t], values[t], g1[t])
            o = _read(state[0], q1[t])
            for n, w in zip(routing.ids[t].tolist(), weights[t], strict=True):
                state[1 + n] = _write(state[1 + n], w * k2[t], values[t], g2[t])
                o = o + _read(state[1 + n], w * q2[t])
            outputs.append(scale * o)
        finals.append(torch.stack(state))
    o = torch.stack(outputs) if outputs else values * 0.0
    return o.to(v.dtype), torch.stack(finals) if output_final_state else None


def _write(state: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """S <- diag(e^g) S + k v^T; the state is kept value-major, [Hv, Dv, Dk]."""
    return state * g.exp()[:, None, :] + v[:, :, None] * k[:, None, :]


def _read(state: Tensor, q: Tensor) -> Tensor:
    """q^T S, [Hv, Dv]."""
    return (state * q[:, None, :]).sum(-1)
