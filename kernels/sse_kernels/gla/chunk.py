"""SSE-GLA in chunks: matrix products inside a chunk, one state handed from chunk to chunk.

With G_i the log-decays summed over a chunk's rows up to i, and S the state before the chunk,
o_i = (q_i e^G_i)^T S + sum over j <= i of ((q_i e^G_i)^T (k_j e^-G_j)) v_j; kernels/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunks, cut_streams
from ..dtypes import compute_dtype
from ..routing import Routing
from ..streams import join_streams, per_pair, split_state

CHUNK = 16
MAX_DECAY = 16.0
"""Log-decay of a chunk beyond which e^-G would cost precision: the exact factors are used."""


def chunk_sse_gla(
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
    """See `sse_gla`: same arguments, no loop over tokens."""
    dtype = compute_dtype(q1)
    (tokens, k), (heads, dk) = routing.ids.shape, q1.shape[1:]
    shared, sparse = cut_streams(routing, cu_seqlens, CHUNK)
    # Value heads that read the same key head act as one wider head.
    width = v.shape[1] // heads * v.shape[2]
    values = v.to(dtype).reshape(tokens, heads, width)
    state1, state2 = split_state(initial_state, dtype)
    if state1 is not None and state2 is not None:
        state1, state2 = (x.reshape(-1, heads, width, dk) for x in (state1, state2))

    q1, k1, q2, k2, g1, g2 = (x.to(dtype) for x in (q1, k1, q2, k2, g1, g2))
    weights, scale = routing.weights.to(dtype)[:, :, None, None], dk**-0.5
    rows1 = _Rows(q1 * scale, k1, values, g1)
    rows2 = _Rows(
        q=(weights * scale * q2[:, None]).flatten(0, 1),
        k=(weights * k2[:, None]).flatten(0, 1),
        v=per_pair(values, k),
        g=per_pair(g2, k),
    )
    o1, state1 = _scan(shared, rows1, state1, output_final_state)
    o2, state2 = _scan(sparse, rows2, state2, output_final_state)
    if state1 is not None and state2 is not None:
        state1, state2 = (x.reshape(-1, *v.shape[1:], dk) for x in (state1, state2))
    return join_streams(o1, o2, state1, state2, v, routing)


class _Rows(NamedTuple):
    """What one kind of stream reads and writes, a row per token or per (token, partition)."""

    q: Tensor
    """[P, H, Dk], scaled and weighted, as k."""
    k: Tensor
    v: Tensor
    """[P, H, Dv]."""
    g: Tensor
    """[P, H, Dk]."""


def _scan(
    chunks: Chunks, rows: _Rows, state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs [P, H, Dv] and final states; state [V, H, Dv, Dk], one a stream."""
    q, k, v, g = (chunks.pad(x) for x in rows)
    f = _factors(q, k, g)
    o = f.scores @ v
    # The first chunk of a stream that starts from nothing has nothing to read.
    skipped = sum(chunks.levels[:1]) if state is None else 0
    if state is None:
        state = v.new_zeros(len(chunks.order), v.shape[1], v.shape[3], q.shape[3])

    values, keys, decay = (x.split(chunks.levels) for x in (v, f.k_out, f.decay))

    def step(level: int, live: int, state: Tensor) -> Tensor:
        kept = state * decay[level][:live, :, None]
        return kept + values[level][:live].mT @ keys[level][:live]

    before, final = chunks.sweep(step, state, output_final_state)
    if skipped < len(v):
        carried = f.q_in[skipped:] @ torch.cat(before)[skipped:].mT
        o = torch.cat([o[:skipped], o[skipped:] + carried])
    return chunks.unpad(o), final


class _Factors(NamedTuple):
    scores: Tensor
    """[n, H, C, C], q_i^T diag(e^(G_i - G_j)) k_j for j <= i, else 0."""
    q_in: Tensor
    """[n, H, C, Dk], queries of the state before the chunk."""
    k_out: Tensor
    """[n, H, C, Dk], keys decayed to the end of the chunk."""
    decay: Tensor
    """[n, H, Dk], decay of the state over the whole chunk."""


def _factors(q: Tensor, k: Tensor, g: Tensor) -> _Factors:
    """The fast factors where decays are moderate, chunk by chunk, the exact ones elsewhere."""
    if g.is_cuda:  # choosing would wait for the device
        return _exact(q, k, g)
    strong = (g.detach().sum(2) < -MAX_DECAY).flatten(1).any(1).nonzero()[:, 0]
    if not len(strong):
        return _fast(q, k, g)
    fast = _fast(q, k, g.index_fill(0, strong, 0.0))
    exact = _exact(q[strong], k[strong], g[strong])
    return _Factors(*(f.index_copy(0, strong, e) for f, e in zip(fast, exact, strict=True)))


def _fast(q: Tensor, k: Tensor, g: Tensor) -> _Factors:
    """Every decay measured from the start of the chunk."""
    lower = _lower(g)
    down = (lower @ g).exp()
    decay = g.sum(2).exp()
    q_in, k_in = q * down, k * down.reciprocal()
    return _Factors((q_in @ k_in.mT) * lower, q_in, k_in * decay[:, :, None], decay)


def _exact(q: Tensor, k: Tensor, g: Tensor) -> _Factors:
    """No exponent above 0 and no difference of sums, by halving.

    A later row i and an earlier row j meet at the boundary of their halves: e^(sum of g from there
    to i) times e^(sum of g after j up to there), both at most 1.
    """
    scores = (q * k).sum(-1)[..., None, None]
    size = 1
    while size < CHUNK:
        qs, ks, gs = (x.unflatten(2, (-1, 2, size)) for x in (q, k, g))
        lower = _lower(gs)
        upper_q = qs[:, :, :, 1] * (lower @ gs[:, :, :, 1]).exp()
        lower_k = ks[:, :, :, 0] * ((1 - lower) @ gs[:, :, :, 0]).exp()
        even, odd = scores[:, :, 0::2], scores[:, :, 1::2]
        top = torch.cat([even, torch.zeros_like(even)], dim=-1)
        scores = torch.cat([top, torch.cat([upper_q @ lower_k.mT, odd], dim=-1)], dim=-2)
        size *= 2
    lower = _lower(g)
    after = (1 - lower) @ g
    return _Factors(scores[:, :, 0], q * (lower @ g).exp(), k * after.exp(), g.sum(2).exp())


def _lower(x: Tensor) -> Tensor:
    """Ones on and below the diagonal: `lower @ x` sums rows up to each (torch's cumsum is slow)."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device).tril()
