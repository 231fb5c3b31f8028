"""A whole SSE-GDN layer between its projections in Triton: the operator as torch sees it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..dtypes import kernel_dtype
from ..gla.triton_shapes import empty_final, gla_shapes
from ..routing import Routing
from ..routing_plan import routing_plan
from ..triton_norm import empty_normed, norm_backward, norm_forward
from .triton_backward import gdn_backward
from .triton_gates import gates_backward, gates_forward
from .triton_sweep import gdn_forward


def triton_sse_gdn_layer(
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
    gate: Tensor | None = None,
    eps: float,
    allow_neg_eigval: bool = False,
    gate_after_norm: bool = False,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `sse_gdn_layer`. bf16 and fp16 multiply in bf16, fp32 in fp32; all else is fp32.

    Keeps its inputs for the backward pass, with a gate 6 rows of width H * D a token, and its
    output, as the product that takes it does. Needs `triton_serves` of its widths.
    """
    partitions = routing.probs.shape[1]
    plan = routing_plan(routing.ids, cu_seqlens, partitions)
    dtype = kernel_dtype(q1, k1, q2, k2, v)
    tokens = [x.to(dtype).contiguous() for x in (q1, k1, q2, k2, v)]
    rest = (a, b, A_log, dt_bias, norm_weight, routing.weights)
    rest = [x.to(kernel_dtype(x)).contiguous() for x in rest]
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    y, _, final_state = _layer(
        *tokens, *rest, *plan,
        None if gate is None else gate.contiguous(), initial_state,
        partitions, 2.0 if allow_neg_eigval else 1.0, gate_after_norm, eps, output_final_state,
    )  # fmt: skip
    return y.to(v.dtype), final_state if output_final_state else None


@torch.library.custom_op("sse_kernels::gdn_layer", mutates_args=())
def _layer(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, weights: Tensor,
    rows: Tensor, segments: Tensor, chunks: Tensor, gate: Tensor | None,
    initial_state: Tensor | None, partitions: int, beta_scale: float, gate_after_norm: bool,
    eps: float, output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and r of `norm_forward`, the final state."""
    shapes = gla_shapes(q1, v, weights, segments, partitions)
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    gates = gates_forward(a, b, A_log, dt_bias, beta_scale)
    active = map(silu, (q1, k1, q2, k2, v))
    shared, sparse = gdn_forward(
        (*active, *gates), weights, (rows, segments, chunks), initial_state,
        final_state if output_final_state else None, shapes, gate_after_norm=gate_after_norm,
    )  # fmt: skip
    return *norm_forward(sparse, norm_weight, gate, eps, base=shared), final_state


@_layer.register_fake
def _(
    q1, k1, q2, k2, v, a, b, A_log, dt_bias, norm_weight, weights, rows, segments, chunks, gate,
    initial_state, partitions, beta_scale, gate_after_norm, eps, output_final_state,
):  # fmt: skip
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    return *empty_normed(v), final_state


@torch.library.custom_op("sse_kernels::gdn_layer_backward", mutates_args=())
def _layer_backward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, a: Tensor, b: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, weights: Tensor,
    rows: Tensor, segments: Tensor, chunks: Tensor, gate: Tensor | None,
    initial_state: Tensor | None, y: Tensor, scales: Tensor, partitions: int, beta_scale: float,
    gate_after_norm: bool, dy: Tensor, dfinal: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the floating inputs that are given, in the order of the arguments."""
    shapes = gla_shapes(q1, v, weights, segments, partitions)
    do, dnorm, dgate = norm_backward(y, scales, norm_weight, gate, dy.contiguous(), v.dtype)
    gates = gates_forward(a, b, A_log, dt_bias, beta_scale)
    raw = (q1, k1, q2, k2, v)
    found = gdn_backward(
        (*map(silu, raw), *gates), weights, (rows, segments, chunks), initial_state, do,
        None if dfinal is None else dfinal.contiguous(), shapes, gate_after_norm=gate_after_norm,
        silu_of=raw,
    )  # fmt: skip
    rates = gates_backward(a, b, A_log, dt_bias, beta_scale, *found[5:9])
    given = [] if dgate is None else [dgate]
    return [*found[:5], *rates, dnorm, found[9], *given, *found[10:]]


@_layer_backward.register_fake
def _(
    q1, k1, q2, k2, v, a, b, A_log, dt_bias, norm_weight, weights, rows, segments, chunks, gate,
    initial_state, y, scales, partitions, beta_scale, gate_after_norm, dy, dfinal,
):  # fmt: skip
    inputs = q1, k1, q2, k2, v, a, b, A_log, dt_bias, norm_weight, weights, gate, initial_state
    return [torch.empty_like(x) for x in inputs if x is not None]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.partitions, ctx.beta_scale, ctx.gate_after_norm, _, ctx.wants_final = inputs
    ctx.save_for_backward(*tensors, *output[:2])


def _backward(ctx, dy: Tensor, dscales: Tensor, dfinal: Tensor):
    *tensors, y, scales = ctx.saved_tensors
    found = iter(
        _layer_backward(
            *tensors, y, scales, ctx.partitions, ctx.beta_scale, ctx.gate_after_norm, dy,
            dfinal if ctx.wants_final else None,
        )
    )  # fmt: skip
    always = [next(found) for _ in range(11)]
    given = [None if x is None else next(found) for x in tensors[-2:]]
    return (*always, None, None, None, *given, None, None, None, None, None)


_layer.register_autograd(_backward, setup_context=_setup_context)
