"""One decode step of an SSE layer between its projections: router, activations, states, norm, gate.

On CUDA one launch; elsewhere the composition of this package's functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import classify, gdn_beta, gdn_log_decay, gla_log_decay
from .checks import (
    expect,
    expect_count,
    expect_float,
    expect_ids,
    expect_slots,
    expect_streams,
    expect_tensor,
)
from .delta.op import sse_gdn_step
from .gla.op import sse_gla_step
from .norm import gated_rms_norm
from .routing import MAX_PARTITIONS, Routing, route


@torch.no_grad()
def sse_gla_layer_step(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    gk1: Tensor,
    gk2: Tensor,
    logits: Tensor,
    *,
    k: int,
    norm_weight: Tensor,
    eps: float,
    state: Tensor,
    slots: Tensor,
    gate: Tensor | None = None,
    ids: Tensor | None = None,
    row_topk: int | None = None,
) -> tuple[Tensor, Routing]:
    """From an SSE-GLA layer's projections of one token a sequence to what its o_proj takes.

    `sse_gla_step` of silu(q), classify(k, row_topk), silu(v), gla_log_decay(gk) and the routing of
    `logits`, then `gated_rms_norm` over each head. arXiv 2507.16577, section 3.

    q1, k1, q2, k2, gk1, gk2 [B, H, Dk] and v [B, Hv, Dv] raw, their rows free to lie apart; logits
    [B, N]; ids [B, K] replay an earlier choice (one outside 0..N-1 or given twice is an error on
    CPU and skipped on CUDA); norm_weight [Dv]; gate like v. `state` changes in place at `slots`, as
    in `sse_gla_step`.

    Returns the output [B, Hv, Dv] in v's dtype, and the routing (ids uint8 on CUDA). No gradients.
    Raises ValueError or TypeError naming the argument.
    """
    op = "sse_gla_layer_step"
    q = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "gk1": gk1, "gk2": gk2}
    expect_streams(op, q, v, {})
    _expect_layer(op, q1, v, logits, k, ids, norm_weight, gate, state, slots)
    dk = q1.shape[2]
    if row_topk is not None:
        expect_count(op, "row_topk", row_topk, dk, "Dk")
    if (launch := _launch(v, state)) is not None:
        return launch(
            q1, k1, q2, k2, v, (gk1, gk2), None, logits, k=k, ids=ids, norm_weight=norm_weight,
            gate=gate, eps=eps, state=state, slots=slots, row_topk=row_topk,
        )  # fmt: skip
    routing = route(logits, k, ids=ids)
    k1, k2 = classify(k1, row_topk), classify(k2, row_topk)
    g1, g2 = gla_log_decay(gk1), gla_log_decay(gk2)
    q1, q2, v = F.silu(q1), F.silu(q2), F.silu(v)
    o = sse_gla_step(q1, k1, q2, k2, v, g1, g2, routing, state=state, slots=slots)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), routing


@torch.no_grad()
def sse_gdn_layer_step(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    logits: Tensor,
    *,
    k: int,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    state: Tensor,
    slots: Tensor,
    gate: Tensor | None = None,
    ids: Tensor | None = None,
    allow_neg_eigval: bool = False,
    gate_after_norm: bool = False,
) -> tuple[Tensor, Routing]:
    """From an SSE-GDN layer's projections of one token a sequence to what its o_proj takes.

    As `sse_gla_layer_step`, with `sse_gdn_step` of silu(q), silu(k), silu(v), gdn_log_decay(a) and
    gdn_beta(b): a, b [B, 2 Hv], A_log, dt_bias [2 Hv], the first half the shared stream's.
    """
    op = "sse_gdn_layer_step"
    expect_streams(op, {"q1": q1, "k1": k1, "q2": q2, "k2": k2}, v, {})
    _expect_layer(op, q1, v, logits, k, ids, norm_weight, gate, state, slots)
    batch, heads = v.shape[:2]
    for name, x in (("a", a), ("b", b)):
        expect_tensor(op, name, x, "[B, 2 Hv]", (batch, 2 * heads), v.device)
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        expect_tensor(op, name, x, "[2 Hv]", (2 * heads,), v.device)
    if (launch := _launch(v, state)) is not None:
        return launch(
            q1, k1, q2, k2, v, (a, b), (A_log, dt_bias), logits, k=k, ids=ids,
            norm_weight=norm_weight, gate=gate, eps=eps, state=state, slots=slots,
            allow_neg_eigval=allow_neg_eigval, gate_after_norm=gate_after_norm,
        )  # fmt: skip
    routing = route(logits, k, ids=ids)
    g1, g2 = gdn_log_decay(a, A_log, dt_bias).chunk(2, -1)
    beta1, beta2 = gdn_beta(b, allow_neg_eigval=allow_neg_eigval).chunk(2, -1)
    q1, k1, q2, k2, v = (F.silu(x) for x in (q1, k1, q2, k2, v))
    o = sse_gdn_step(
        q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing,
        state=state, slots=slots, gate_after_norm=gate_after_norm,
    )  # fmt: skip
    return gated_rms_norm(o, norm_weight, gate, eps=eps), routing


def _expect_layer(
    op: str,
    q1: Tensor,
    v: Tensor,
    logits: Tensor,
    k: int,
    ids: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor | None,
    state: Tensor,
    slots: Tensor,
) -> None:
    batch, device = len(v), v.device
    expect_float(op, "logits", logits)
    expect(logits.dim() == 2, op, "logits", "shape [B, N]", list(logits.shape))
    n = logits.shape[1]
    expect_tensor(op, "logits", logits, "[B, N]", (batch, n), device)
    expect(1 <= n <= MAX_PARTITIONS, op, "N", f"1 to {MAX_PARTITIONS}", n)
    expect_count(op, "k", k, n, "N")
    if ids is not None:
        expect_ids(op, ids, (batch, k), n, device)
    expect_tensor(op, "norm_weight", norm_weight, "[Dv]", (v.shape[2],), device)
    if gate is not None:
        expect_tensor(op, "gate", gate, "the shape of v", tuple(v.shape), device)
    expect_slots(op, state, slots, (1 + n, *v.shape[1:], q1.shape[2]), v)


def _launch(v: Tensor, state: Tensor) -> Callable[..., tuple[Tensor, Routing]] | None:
    """The Triton form on a GPU, if triton is there and nothing is fp64."""
    if not v.is_cuda or torch.float64 in (v.dtype, state.dtype):
        return None
    try:
        from .triton_layer_step import triton_layer_step
    except ImportError:
        return None
    return triton_layer_step
