"""SSE-GLA: gated linear attention over one shared and N sparse states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import expect_cu_seqlens, expect_initial_state, expect_slots, expect_streams
from ..routing import Routing
from .chunk import chunk_sse_gla
from .recurrent import recurrent_sse_gla_step


def sse_gla(
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
    """Read and write the shared state and K of N partitions, along packed sequences.

    S_0 <- diag(e^g1) S_0 + k1 v^T; for n in ids: S_n <- diag(e^g2) S_n + (w_n k2) v^T, the others
    unchanged; o = Dk^-1/2 (q1^T S_0 + sum over n of (w_n q2)^T S_n). arXiv 2507.16577, section 3.

    q1, k1, q2, k2 [T, H, Dk] after their activations; v [T, Hv, Dv], Hv a multiple of H, value head
    h reads query head h // (Hv // H); g1, g2 [T, H, Dk] log-decays <= 0; cu_seqlens [B+1] int64;
    initial_state [B, 1+N, Hv, Dv, Dk] (None: zeros).

    Returns o [T, Hv, Dv] in v's dtype and, on request, the final state, fp32 (fp64 if q1 is). All
    floating inputs, weights and initial state included, have gradients. Raises ValueError or
    TypeError naming the argument.
    """
    op = "sse_gla"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "g1": g1, "g2": g2}
    expect_streams(op, q, v, {}, routing)
    expect_cu_seqlens(op, cu_seqlens, len(v), v.device)
    shape = (len(cu_seqlens) - 1, 1 + routing.probs.shape[1], *v.shape[1:], q1.shape[2])
    expect_initial_state(op, initial_state, shape, v)
    return _chunk_form(q1, v)(
        q1,
        k1,
        q2,
        k2,
        v,
        g1,
        g2,
        routing,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def sse_gla_step(
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
    """`sse_gla` of one token a sequence: inputs [B, ...] -> o [B, Hv, Dv]. No gradients.

    state [S, 1+N, Hv, Dv, Dk] of any float dtype is changed in place at rows `slots` [B] int64,
    which are distinct except for a scratch row nobody reads.
    """
    op = "sse_gla_step"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "g1": g1, "g2": g2}
    expect_streams(op, q, v, {}, routing)
    row = (1 + routing.probs.shape[1], *v.shape[1:], q1.shape[2])
    expect_slots(op, state, slots, row, v)
    return _step_form(v, state)(q1, k1, q2, k2, v, g1, g2, routing, state=state, slots=slots)


def _chunk_form(q1: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The Triton kernels on a GPU if they know these widths, else torch's form."""
    if v.is_cuda:
        try:
            from .triton_chunk import triton_sse_gla
            from .triton_shapes import triton_serves
        except ImportError:
            return chunk_sse_gla
        if triton_serves(q1.shape[2], v.shape[2], v.dtype):
            return triton_sse_gla
    return chunk_sse_gla


def _step_form(v: Tensor, state: Tensor) -> Callable[..., Tensor]:
    if v.is_cuda and torch.float64 not in (v.dtype, state.dtype) and state.is_contiguous():
        try:
            from .triton_step import triton_sse_gla_step
        except ImportError:
            return recurrent_sse_gla_step
        return triton_sse_gla_step
    return recurrent_sse_gla_step
