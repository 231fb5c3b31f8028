"""SSE-GDN: the gated delta rule over one shared and N sparse states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import expect_cu_seqlens, expect_initial_state, expect_slots, expect_streams
from ..routing import Routing
from .chunk import chunk_sse_gdn
from .recurrent import recurrent_sse_gdn_step


def sse_gdn(
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
    """Read and write the shared state and K of N partitions, along packed sequences.

    Each stream: S <- e^g S; S <- S + beta k (v - S^T k)^T; o = Dk^-1/2 q^T S, with q and k
    L2-normalised (eps 1e-6 under the root). The shared stream uses (q1, k1, g1, beta1), partition n
    of ids (w_n q2, w_n k2, g2, beta2); o is the sum. The weight multiplies before the norm, which
    cancels it, or after it with `gate_after_norm`. arXiv 2507.16577, section 3.

    q1, k1, q2, k2 [T, H, Dk] after their activations, not normalised; v [T, Hv, Dv], Hv a multiple
    of H, value head h reads query head h // (Hv // H); g1, g2 [T, Hv] log-decays <= 0; beta1, beta2
    [T, Hv] in 0..2; cu_seqlens [B+1] int64; initial_state [B, 1+N, Hv, Dv, Dk] (None: zeros).

    Returns o [T, Hv, Dv] in v's dtype and, on request, the final state, fp32 (fp64 if q1 is). All
    floating inputs, weights and initial state included, have gradients. Raises ValueError or
    TypeError naming the argument.
    """
    op = "sse_gdn"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2}
    per_head = {"g1": g1, "beta1": beta1, "g2": g2, "beta2": beta2}
    expect_streams(op, q, v, per_head, routing)
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
        beta1,
        g2,
        beta2,
        routing,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        gate_after_norm=gate_after_norm,
    )


def sse_gdn_step(
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
    """`sse_gdn` of one token a sequence: inputs [B, ...] -> o [B, Hv, Dv]. No gradients.

    state [S, 1+N, Hv, Dv, Dk] of any float dtype is changed in place at rows `slots` [B] int64,
    which are distinct except for a scratch row nobody reads.
    """
    op = "sse_gdn_step"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2}
    per_head = {"g1": g1, "beta1": beta1, "g2": g2, "beta2": beta2}
    expect_streams(op, q, v, per_head, routing)
    row = (1 + routing.probs.shape[1], *v.shape[1:], q1.shape[2])
    expect_slots(op, state, slots, row, v)
    return _step_form(v, state)(
        q1,
        k1,
        q2,
        k2,
        v,
        g1,
        beta1,
        g2,
        beta2,
        routing,
        state=state,
        slots=slots,
        gate_after_norm=gate_after_norm,
    )


def _chunk_form(q1: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The Triton kernels on a GPU if they know these widths, else torch's form."""
    if v.is_cuda:
        try:
            from ..gla.triton_shapes import triton_serves
            from .triton_chunk import triton_sse_gdn
        except ImportError:
            return chunk_sse_gdn
        if triton_serves(q1.shape[2], v.shape[2], v.dtype):
            return triton_sse_gdn
    return chunk_sse_gdn


def _step_form(v: Tensor, state: Tensor) -> Callable[..., Tensor]:
    """The Triton kernel on a GPU, else torch's form."""
    if v.is_cuda and torch.float64 not in (v.dtype, state.dtype) and state.is_contiguous():
        try:
            from .triton_step import triton_sse_gdn_step
        except ImportError:
            return recurrent_sse_gdn_step
        return triton_sse_gdn_step
    return recurrent_sse_gdn_step
