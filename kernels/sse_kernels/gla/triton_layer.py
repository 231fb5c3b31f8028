"""A whole SSE-GLA layer between its projections in Triton: the operator as torch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import kernel_dtype
from ..routing import Routing
from ..routing_plan import routing_plan
from ..triton_norm import empty_normed, norm_backward, norm_forward
from .triton_backward import gla_backward
from .triton_forward import gla_forward
from .triton_shapes import empty_final, gla_shapes


def triton_sse_gla_layer(
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
    gate: Tensor | None = None,
    eps: float,
    row_topk: int | None = None,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `sse_gla_layer`. bf16 and fp16 multiply in bf16, fp32 in fp32; all else is fp32.

    Keeps its inputs for the backward pass, with a gate 8 rows of width H * D a token, and its
    output, as the product that takes it does. Needs `triton_serves` of its widths.
    """
    partitions = routing.probs.shape[1]
    plan = routing_plan(routing.ids, cu_seqlens, partitions)
    dtype = kernel_dtype(q1, k1, q2, k2, v)
    tokens = [x.to(dtype).contiguous() for x in (q1, k1, q2, k2, v)]
    decays = [x.to(kernel_dtype(gk1, gk2)).contiguous() for x in (gk1, gk2)]
    weights = routing.weights.to(kernel_dtype(routing.weights)).contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    y, _, final_state = _layer(
        *tokens, *decays, weights, *plan, norm_weight.contiguous(),
        None if gate is None else gate.contiguous(), initial_state,
        partitions, row_topk or 0, eps, output_final_state,
    )  # fmt: skip
    return y.to(v.dtype), final_state if output_final_state else None


@torch.library.custom_op("sse_kernels::gla_layer", mutates_args=())
def _layer(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gk1: Tensor, gk2: Tensor,
    weights: Tensor, rows: Tensor, segments: Tensor, chunks: Tensor, norm_weight: Tensor,
    gate: Tensor | None, initial_state: Tensor | None, partitions: int, row_topk: int, eps: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and r of `norm_forward`, the final state."""
    shapes = gla_shapes(q1, v, weights, segments, partitions, raw=True, row_topk=row_topk)
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    shared, sparse = gla_forward(
        (q1, k1, q2, k2, v, gk1, gk2), weights, (rows, segments, chunks), initial_state,
        final_state if output_final_state else None, shapes,
    )  # fmt: skip
    return *norm_forward(sparse, norm_weight, gate, eps, base=shared), final_state


@_layer.register_fake
def _(
    q1, k1, q2, k2, v, gk1, gk2, weights, rows, segments, chunks, norm_weight, gate, initial_state,
    partitions, row_topk, eps, output_final_state,
):  # fmt: skip
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    return *empty_normed(v), final_state


@torch.library.custom_op("sse_kernels::gla_layer_backward", mutates_args=())
def _layer_backward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gk1: Tensor, gk2: Tensor,
    weights: Tensor, rows: Tensor, segments: Tensor, chunks: Tensor, norm_weight: Tensor,
    gate: Tensor | None, initial_state: Tensor | None, y: Tensor, scales: Tensor, partitions: int,
    row_topk: int, dy: Tensor, dfinal: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the floating inputs that are given, in the order of the arguments."""
    shapes = gla_shapes(q1, v, weights, segments, partitions, raw=True, row_topk=row_topk)
    do, dnorm, dgate = norm_backward(y, scales, norm_weight, gate, dy.contiguous(), v.dtype)
    gradients = gla_backward(
        (q1, k1, q2, k2, v, gk1, gk2), weights, (rows, segments, chunks), initial_state,
        do, None if dfinal is None else dfinal.contiguous(), shapes,
    )  # fmt: skip
    rest = [dnorm, dgate, *gradients[8:]]
    return [*gradients[:8], *(x for x in rest if x is not None)]


@_layer_backward.register_fake
def _(
    q1, k1, q2, k2, v, gk1, gk2, weights, rows, segments, chunks, norm_weight, gate, initial_state,
    y, scales, partitions, row_topk, dy, dfinal,
):  # fmt: skip
    inputs = q1, k1, q2, k2, v, gk1, gk2, weights, norm_weight, gate, initial_state
    return [torch.empty_like(x) for x in inputs if x is not None]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.partitions, ctx.row_topk, _, ctx.output_final_state = inputs
    ctx.save_for_backward(*tensors, *output[:2])


def _backward(ctx, dy: Tensor, dscales: Tensor, dfinal: Tensor):
    *tensors, y, scales = ctx.saved_tensors
    found = iter(
        _layer_backward(
            *tensors, y, scales, ctx.partitions, ctx.row_topk, dy,
            dfinal if ctx.output_final_state else None,
        )
    )  # fmt: skip
    tokens = [next(found) for _ in range(8)]
    rest = [None if x is None else next(found) for x in tensors[-3:]]
    return (*tokens, None, None, None, *rest, None, None, None, None)


_layer.register_autograd(_backward, setup_context=_setup_context)
