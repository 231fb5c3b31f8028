"""SSE-GDN in chunks: the delta rule of a chunk as one triangular system (WY form).

With D_ij the decay from row j to row i and S the state before the chunk, the corrections u solve
(I + tril(beta_i D_ij k_i^T k_j, -1)) u = beta (v - e^G k^T S); o and the new state are then those
of gated linear attention that writes u for v; kernels/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunks, cut_streams
from ..dtypes import compute_dtype
from ..routing import Routing
from ..streams import join_streams, per_pair, split_state
from .gate import sparse_key, unit

CHUNK = 16


def chunk_sse_gdn(
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
    """See `sse_gdn`: same arguments, no loop over tokens."""
    dtype, k = compute_dtype(q1), routing.ids.shape[1]
    shared, sparse = cut_streams(routing, cu_seqlens, CHUNK)
    state1, state2 = split_state(initial_state, dtype)

    q1, k1, q2, k2, values, g1, beta1, g2, beta2 = (
        x.to(dtype) for x in (q1, k1, q2, k2, v, g1, beta1, g2, beta2)
    )
    weights = routing.weights.to(dtype)[:, :, None, None]
    scale, group = q1.shape[-1] ** -0.5, v.shape[1] // q1.shape[1]
    rows1 = _Rows(unit(q1) * scale, unit(k1), values, g1, beta1)
    rows2 = _Rows(
        q=sparse_key(q2[:, None], weights, gate_after_norm).flatten(0, 1) * scale,
        k=sparse_key(k2[:, None], weights, gate_after_norm).flatten(0, 1),
        v=per_pair(values, k),
        g=per_pair(g2, k),
        beta=per_pair(beta2, k),
    )
    o1, state1 = _scan(shared, rows1, group, state1, output_final_state)
    o2, state2 = _scan(sparse, rows2, group, state2, output_final_state)
    return join_streams(o1, o2, state1, state2, v, routing)


class _Rows(NamedTuple):
    """What one kind of stream reads and writes, a row per token or per (token, partition)."""

    q: Tensor
    """[P, H, Dk], normalised, scaled and weighted, as k."""
    k: Tensor
    v: Tensor
    """[P, Hv, Dv]."""
    g: Tensor
    """[P, Hv], as beta."""
    beta: Tensor


def _scan(
    chunks: Chunks, rows: _Rows, group: int, state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs [P, Hv, Dv] and final states; state [V, Hv, Dv, Dk], one a stream."""
    q, k = (chunks.pad(x.repeat_interleave(group, dim=1) if group > 1 else x) for x in rows[:2])
    v, g, beta = chunks.pad(rows.v), chunks.pad(rows.g[..., None]), chunks.pad(rows.beta[..., None])
    lower = torch.ones(CHUNK, CHUNK, dtype=g.dtype, device=g.device).tril()
    strict = lower.tril(-1)
    between = (lower @ (g * strict)).exp() * lower  # e^(g_(j+1) + ... + g_i) for j <= i
    down = (lower @ g).exp()

    keys = k.mT
    solve = _UnitInverse.apply((k @ keys) * between * (beta * strict))
    u = solve @ (beta * v)
    scores = (q @ keys) * between
    k_out = k * ((1 - lower) @ g).exp()
    decay = g.sum(2, keepdim=True).exp()

    # The first chunk of a stream that starts from nothing has nothing to read or to correct.
    skipped = sum(chunks.levels[:1]) if state is None else 0
    if state is None:
        state = v.new_zeros(len(chunks.order), v.shape[1], v.shape[3], q.shape[3])
    w = solve[skipped:] @ ((beta * down)[skipped:] * k[skipped:])
    us, ks, decays = (x.split(chunks.levels) for x in (u, k_out, decay))
    first = 1 if skipped else 0
    ws = dict(enumerate(w.split(chunks.levels[first:]), first))

    def step(level: int, live: int, state: Tensor) -> Tensor:
        written = us[level][:live].mT
        if level >= first:
            written = written - state @ ws[level][:live].mT
        return state * decays[level][:live] + written @ ks[level][:live]

    before, final = chunks.sweep(step, state, output_final_state)
    if skipped == len(v):
        return chunks.unpad(scores @ u), final
    entering = torch.cat(before)[skipped:].mT
    u = torch.cat([u[:skipped], u[skipped:] - w @ entering])
    o = scores @ u
    o = torch.cat([o[:skipped], o[skipped:] + (q[skipped:] * down[skipped:]) @ entering])
    return chunks.unpad(o), final


class _UnitInverse(torch.autograd.Function):
    """(I + m)^-1 for strictly lower triangular m [..., C, C], by forward substitution."""

    @staticmethod
    def forward(ctx, m: Tensor) -> Tensor:
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
        inverse = torch.linalg.solve_triangular(m, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT)
