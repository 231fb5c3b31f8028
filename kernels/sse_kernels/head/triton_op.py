"""The head with Triton's passes over blocks of logits: the operator as torch sees it on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_rows import TRITON
from .walk import Operands, head_backward, head_forward


@torch.library.custom_op("sse_kernels::head", mutates_args=())
def head(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the logarithms of the softmax's denominators, [T] each."""
    return head_forward(Operands(hidden, weight, targets, temperature, dtype), TRITON)


@head.register_fake
def _(hidden, weight, targets, temperature, dtype):
    empty = lambda: hidden.new_empty(len(hidden), dtype=torch.float32)
    return empty(), empty(), empty()


@torch.library.custom_op("sse_kernels::head_backward", mutates_args=())
def _head_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype,
    entropy: Tensor, lse: Tensor, dlogprobs: Tensor, dentropy: Tensor,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight; an unwanted one is empty."""
    return head_backward(
        Operands(hidden, weight, targets, temperature, dtype), TRITON,
        entropy, lse, dlogprobs.contiguous(), dentropy.contiguous(), (wants_hidden, wants_weight),
    )  # fmt: skip


@_head_backward.register_fake
def _(
    hidden, weight, targets, temperature, dtype, entropy, lse, dlogprobs, dentropy,
    wants_hidden, wants_weight,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants_weight else weight.new_empty(0),
    )


def _keep(ctx, inputs, output) -> None:
    hidden, weight, targets, ctx.temperature, ctx.dtype = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, targets, entropy, lse)


def _backward(ctx, dlogprobs: Tensor, dentropy: Tensor, _):
    hidden, weight, targets, entropy, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = _head_backward(
        hidden, weight, targets, ctx.temperature, ctx.dtype,
        entropy, lse, dlogprobs, dentropy, *wanted,
    )  # fmt: skip
    return *(x if w else None for x, w in zip(gradients, wanted, strict=True)), None, None, None


head.register_autograd(_backward, setup_context=_keep)
