"""SSE-GLA over packed sequences in Triton: the operator as torch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import kernel_dtype
from ..routing import Routing
from ..routing_plan import routing_plan
from .triton_backward import gla_backward
from .triton_forward import gla_forward, sum_slots
from .triton_shapes import empty_final, gla_shapes


def triton_sse_gla(
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
    """See `sse_gla`. bf16 and fp16 multiply in bf16, fp32 in fp32; sums and states are fp32.

    Keeps its inputs and nothing else for the backward pass. Needs `triton_serves` of its widths.
    """
    partitions = routing.probs.shape[1]
    plan = routing_plan(routing.ids, cu_seqlens, partitions)
    dtype = kernel_dtype(q1, k1, q2, k2, v)
    tokens = [x.to(dtype).contiguous() for x in (q1, k1, q2, k2, v)]
    decays = [x.to(kernel_dtype(g1, g2)).contiguous() for x in (g1, g2)]
    weights = routing.weights.to(kernel_dtype(routing.weights)).contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    o, final_state = _gla(
        *tokens, *decays, weights, *plan, partitions, initial_state,
        output_final_state,
    )  # fmt: skip
    return o.to(v.dtype), final_state if output_final_state else None


@torch.library.custom_op("sse_kernels::gla", mutates_args=())
def _gla(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, g1: Tensor, g2: Tensor,
    weights: Tensor, rows: Tensor, segments: Tensor, chunks: Tensor, partitions: int,
    initial_state: Tensor | None, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shapes = gla_shapes(q1, v, weights, segments, partitions)
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    shared, sparse = gla_forward(
        (q1, k1, q2, k2, v, g1, g2), weights, (rows, segments, chunks), initial_state,
        final_state if output_final_state else None, shapes,
    )  # fmt: skip
    return sum_slots(sparse, v.dtype, base=shared), final_state


@_gla.register_fake
def _(
    q1, k1, q2, k2, v, g1, g2, weights, rows, segments, chunks, partitions, initial_state,
    output_final_state,
):  # fmt: skip
    final_state = empty_final(v, segments, q1.shape[2], partitions, output_final_state)
    return torch.empty_like(v), final_state


@torch.library.custom_op("sse_kernels::gla_backward", mutates_args=())
def _gla_backward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, g1: Tensor, g2: Tensor,
    weights: Tensor, rows: Tensor, segments: Tensor, chunks: Tensor, partitions: int,
    initial_state: Tensor | None, do: Tensor, dfinal: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    shapes = gla_shapes(q1, v, weights, segments, partitions)
    return list(
        gla_backward(
            (q1, k1, q2, k2, v, g1, g2), weights, (rows, segments, chunks), initial_state,
            do.contiguous(), None if dfinal is None else dfinal.contiguous(), shapes,
        )
    )  # fmt: skip


@_gla_backward.register_fake
def _(
    q1, k1, q2, k2, v, g1, g2, weights, rows, segments, chunks, partitions, initial_state,
    do, dfinal,
):  # fmt: skip
    inputs = [q1, k1, q2, k2, v, g1, g2, weights]
    if initial_state is not None:
        inputs.append(initial_state)
    return [torch.empty_like(x) for x in inputs]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.partitions, initial_state, ctx.output_final_state = inputs
    ctx.save_for_backward(*tensors, initial_state)


def _backward(ctx, do: Tensor, dfinal: Tensor):
    *tensors, initial_state = ctx.saved_tensors
    gradients = _gla_backward(
        *tensors, ctx.partitions, initial_state, do, dfinal if ctx.output_final_state else None
    )
    dinitial = gradients[8] if initial_state is not None else None
    return (*gradients[:8], None, None, None, None, dinitial, None)


_gla.register_autograd(_backward, setup_context=_setup_context)
