"""The authors' sorted form of SSE, rebuilt on flash-linear-attention's chunk kernels: a baseline.

Gather the tokens of every (sequence, partition), append them to the packed sequences, run one
variable-length call over all streams, add the sparse outputs back. As there, it waits for the GPU
(`unique`, `repeat_interleave`). Needs `pip install fla-core`, whose first calls tune for minutes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sse_kernels import Routing, classify, gated_rms_norm, gla_log_decay, sse_gla
from torch import Tensor


def reference_sse_gla(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, g1: Tensor, g2: Tensor,
    routing: Routing, *, cu_seqlens: Tensor,
) -> tuple[Tensor, None]:  # fmt: skip
    """See `sse_gla`."""
    from fla.ops.gla import chunk_gla  # pyright: ignore

    token, bounds, w = _streams(routing, cu_seqlens, v.dtype)
    q, k = torch.cat([q1, q2[token] * w]), torch.cat([k1, k2[token] * w])
    values, g = torch.cat([v, v[token]]), torch.cat([g1, g2[token]])
    o = chunk_gla(*(x[None] for x in (q, k, values, g)), cu_seqlens=bounds)[0][0]
    return _summed(o, token, len(v)), None


def reference_sse_gdn(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor,
    g1: Tensor, beta1: Tensor, g2: Tensor, beta2: Tensor,
    routing: Routing, *, cu_seqlens: Tensor,
) -> tuple[Tensor, None]:  # fmt: skip
    """See `sse_gdn`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore

    token, bounds, w = _streams(routing, cu_seqlens, v.dtype)
    q, k = torch.cat([q1, q2[token] * w]), torch.cat([k1, k2[token] * w])
    values = torch.cat([v, v[token]])
    g, beta = torch.cat([g1, g2[token]]), torch.cat([beta1, beta2[token]])
    streams = (x[None] for x in (q, k, values, g, beta))
    o = chunk_gated_delta_rule(*streams, cu_seqlens=bounds, use_qk_l2norm_in_kernel=True)[0][0]
    return _summed(o, token, len(v)), None


def one_stream(q1: Tensor, k1: Tensor, v: Tensor, g1: Tensor, *, cu_seqlens: Tensor) -> Tensor:
    """`chunk_gla` of the shared stream alone: what linear attention without partitions costs."""
    from fla.ops.gla import chunk_gla  # pyright: ignore

    return chunk_gla(*(x[None] for x in (q1, k1, v, g1)), cu_seqlens=cu_seqlens)[0][0]


def composed_sse_gla_layer(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gk1: Tensor, gk2: Tensor,
    routing: Routing, *, norm_weight: Tensor, gate: Tensor, eps: float, cu_seqlens: Tensor,
) -> tuple[Tensor, None]:  # fmt: skip
    """`sse_gla_layer` with its activations in torch, around `sse_gla` and `gated_rms_norm`."""
    k1, k2, g1, g2 = classify(k1), classify(k2), gla_log_decay(gk1), gla_log_decay(gk2)
    q1, q2, v = F.silu(q1), F.silu(q2), F.silu(v)
    o, _ = sse_gla(q1, k1, q2, k2, v, g1, g2, routing, cu_seqlens=cu_seqlens)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), None


def _streams(
    routing: Routing, cu_seqlens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the sparse rows [T K], bounds of all streams, router weights [T K, 1, 1]."""
    n, k = routing.probs.shape[1], routing.ids.shape[1]
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    segment = (sequence[:, None] * n + routing.ids).flatten()
    order = segment.sort(stable=True).indices
    counts = torch.unique(segment, return_counts=True)[1]
    bounds = F.pad(torch.cat([lengths, counts]).cumsum(0), (1, 0))
    return order // k, bounds, routing.weights.flatten()[order, None, None].to(dtype)


def _summed(o: Tensor, token: Tensor, tokens: int) -> Tensor:
    return o[:tokens].index_add(0, token, o[tokens:])
