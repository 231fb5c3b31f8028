"""An SSE layer between its projections over packed sequences: activations, states, norm, gate.

On CUDA one operator of few kernels; elsewhere the composition of this package's functions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .activations import classify, gdn_beta, gdn_log_decay, gla_log_decay
from .checks import (
    expect_count,
    expect_cu_seqlens,
    expect_initial_state,
    expect_streams,
    expect_tensor,
)
from .delta.op import sse_gdn
from .gla.op import sse_gla
from .norm import gated_rms_norm
from .routing import Routing


def sse_gla_layer(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    gk1: Tensor,
    gk2: Tensor,
    routing: Routing,
    *,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    gate: Tensor | None = None,
    row_topk: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """From an SSE-GLA layer's projections of packed sequences to what its o_proj takes.

    `sse_gla` of silu(q), classify(k, row_topk), silu(v) and gla_log_decay(gk), then
    `gated_rms_norm` over each head. arXiv 2507.16577, section 3.

    q1, k1, q2, k2, gk1, gk2 [T, H, Dk] and v [T, Hv, Dv] raw; norm_weight [Dv]; gate like v; all
    else as in `sse_gla`. Returns the output [T, Hv, Dv] in v's dtype and, on request, the final
    state. All floating inputs have gradients, for which 8 rows a token like v are kept on CUDA,
    inputs included, and the output. Raises ValueError or TypeError naming the argument.
    """
    op = "sse_gla_layer"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "gk1": gk1, "gk2": gk2}
    expect_streams(op, q, v, {}, routing)
    _expect_layer(op, q1, v, routing, cu_seqlens, initial_state, norm_weight, gate)
    dk = q1.shape[2]
    if row_topk is not None:
        expect_count(op, "row_topk", row_topk, dk, "Dk")
    rest = {
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
    }
    if _can_launch(q1, v):
        from .gla.triton_layer import triton_sse_gla_layer

        return triton_sse_gla_layer(
            q1, k1, q2, k2, v, gk1, gk2, routing, norm_weight=norm_weight, gate=gate, eps=eps,
            row_topk=row_topk, **rest,
        )  # fmt: skip
    k1, k2 = classify(k1, row_topk), classify(k2, row_topk)
    g1, g2 = gla_log_decay(gk1), gla_log_decay(gk2)
    o, state = sse_gla(F.silu(q1), k1, F.silu(q2), k2, F.silu(v), g1, g2, routing, **rest)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), state


def sse_gdn_layer(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    routing: Routing,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    gate: Tensor | None = None,
    allow_neg_eigval: bool = False,
    gate_after_norm: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """From an SSE-GDN layer's projections of packed sequences to what its o_proj takes.

    As `sse_gla_layer`, with `sse_gdn` of silu(q), silu(k), silu(v), gdn_log_decay(a) and
    gdn_beta(b): a, b [T, 2 Hv], A_log, dt_bias [2 Hv], the first half the shared stream's. On CUDA
    6 rows a token like v are kept, and the output.
    """
    op = "sse_gdn_layer"
    expect_streams(op, {"q1": q1, "k1": k1, "q2": q2, "k2": k2}, v, {}, routing)
    _expect_layer(op, q1, v, routing, cu_seqlens, initial_state, norm_weight, gate)
    tokens, heads = v.shape[:2]
    for name, x in (("a", a), ("b", b)):
        expect_tensor(op, name, x, "[T, 2 Hv]", (tokens, 2 * heads), v.device)
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        expect_tensor(op, name, x, "[2 Hv]", (2 * heads,), v.device)
    rest = {
        "gate_after_norm": gate_after_norm,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
    }
    if _can_launch(q1, v):
        from .delta.triton_layer import triton_sse_gdn_layer

        return triton_sse_gdn_layer(
            q1, k1, q2, k2, v, a, b, routing, A_log=A_log, dt_bias=dt_bias,
            norm_weight=norm_weight, gate=gate, eps=eps, allow_neg_eigval=allow_neg_eigval, **rest,
        )  # fmt: skip
    beta1, beta2 = gdn_beta(b, allow_neg_eigval=allow_neg_eigval).chunk(2, -1)
    g1, g2 = gdn_log_decay(a, A_log, dt_bias).chunk(2, -1)
    q1, k1, q2, k2, v = (F.silu(x) for x in (q1, k1, q2, k2, v))
    o, state = sse_gdn(q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing, **rest)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), state


def _expect_layer(
    op: str,
    q1: Tensor,
    v: Tensor,
    routing: Routing,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor | None,
) -> None:
    expect_cu_seqlens(op, cu_seqlens, len(v), v.device)
    streams = 1 + routing.probs.shape[1]
    shape = (len(cu_seqlens) - 1, streams, *v.shape[1:], q1.shape[2])
    expect_initial_state(op, initial_state, shape, v)
    expect_tensor(op, "norm_weight", norm_weight, "[Dv]", (v.shape[2],), v.device)
    if gate is not None:
        expect_tensor(op, "gate", gate, "the shape of v", tuple(v.shape), v.device)


def _can_launch(q1: Tensor, v: Tensor) -> bool:
    """Whether the Triton form runs here: on a GPU, if triton is there and knows these widths."""
    if not v.is_cuda:
        return False
    try:
        from .gla.triton_shapes import triton_serves
    except ImportError:
        return False
    return triton_serves(q1.shape[2], v.shape[2], v.dtype)
