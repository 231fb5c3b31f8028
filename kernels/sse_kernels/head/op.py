"""The language-model head: log-probabilities and entropies without the [T, V] logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..checks import expect, expect_float
from .walk import Operands, head_backward, head_forward, multiply


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at `targets`, and the softmax's entropy in nats.

    hidden [T, d] and weight [V, d] of any float dtype, targets [T] of integers -> [T] each, fp32
    (fp64 if an input is). Both carry gradients to hidden and weight. A block of logits is alive at
    a time, and is made again in the backward pass.

    Logits, softmax and all sums are fp32. What is multiplied, hidden, weight and the gradient of
    the logits, has `dtype`; None: bf16 on CUDA for two bf16 inputs or under bf16 autocast, in all
    other cases fp32.

    Raises ValueError or TypeError naming the argument; a target outside 0..V-1 is an error on CPU
    and gives NaN on CUDA.
    """
    op = "linear_logprob"
    _expect_matrices(op, hidden, weight)
    expect(hidden.dim() == 2, op, "hidden", "shape [T, d]", list(hidden.shape))
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"{op}: targets must have an integer dtype, got {targets.dtype}")
    shape = [len(hidden)]
    expect(list(targets.shape) == shape, op, "targets", f"[T] = {shape}", list(targets.shape))
    expect(targets.device == hidden.device, op, "targets", f"on {hidden.device}", targets.device)
    expect(temperature > 0, op, "temperature", "above 0", temperature)
    if targets.device.type == "cpu" and len(targets):
        low, high = int(targets.min()), int(targets.max())
        inside = low >= 0 and high < len(weight)
        expect(inside, op, "targets", f"in 0..{len(weight) - 1}", f"{low}..{high}")
    logprobs, entropy, _ = _head(
        hidden, weight, targets.long(), float(temperature), _operand_dtype(hidden, weight, dtype)
    )
    return logprobs, entropy


def linear_logits(hidden: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """hidden [..., d] weight^T -> [..., V] in fp32 (fp64 if an input is), never rounded to bf16.

    The logits of which `linear_logprob` gives the log-probabilities; `dtype` as there.
    """
    _expect_matrices("linear_logits", hidden, weight)
    dtype = _operand_dtype(hidden, weight, dtype)
    if dtype == torch.bfloat16:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _logits(rows, weight).reshape(*hidden.shape[:-1], len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.to(dtype), weight.to(dtype))


def _expect_matrices(op: str, hidden: Tensor, weight: Tensor) -> None:
    expect_float(op, "hidden", hidden)
    expect_float(op, "weight", weight)
    expect(hidden.dim() >= 1, op, "hidden", "shape [..., d]", list(hidden.shape))
    width = hidden.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == width and weight.numel() > 0
    expect(fits, op, "weight", f"shape [V, d] with d = {width}", list(weight.shape))
    expect(weight.device == hidden.device, op, "weight", f"on {hidden.device}", weight.device)


def _operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """fp64 and, on CUDA, bf16 are multiplied as such; everything else as fp32."""
    device = hidden.device.type
    if dtype is None:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if device == "cuda" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float64 or (dtype == torch.bfloat16 and device == "cuda"):
        return dtype
    return torch.float32


@torch.library.custom_op("sse_kernels::head", mutates_args=())
def _head(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the logarithms of the softmax's denominators, [T] each."""
    return head_forward(Operands(hidden, weight, targets, temperature, dtype))


@_head.register_fake
def _(hidden, weight, targets, temperature, dtype):
    total = torch.float64 if dtype == torch.float64 else torch.float32
    empty = lambda: hidden.new_empty(len(hidden), dtype=total)
    return empty(), empty(), empty()


@torch.library.custom_op("sse_kernels::head_backward", mutates_args=())
def _head_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype,
    entropy: Tensor, lse: Tensor, dlogprobs: Tensor, dentropy: Tensor,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight; an unwanted one is empty."""
    return head_backward(
        Operands(hidden, weight, targets, temperature, dtype),
        entropy, lse, dlogprobs.contiguous(), dentropy.contiguous(),
        wants_hidden=wants_hidden, wants_weight=wants_weight,
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


_head.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("sse_kernels::bf16_logits", mutates_args=(), device_types="cuda")
def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, d], weight [V, d] rounded to bf16 -> [T, V] fp32."""
    out = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    return multiply(hidden.bfloat16(), weight.bfloat16().t(), out)


@_logits.register_fake
def _(hidden, weight):
    return hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)


@torch.library.custom_op("sse_kernels::bf16_logits_backward", mutates_args=(), device_types="cuda")
def _logits_backward(hidden: Tensor, weight: Tensor, dlogits: Tensor) -> tuple[Tensor, Tensor]:
    d = dlogits.bfloat16()
    dhidden, dweight = (x.new_empty(x.shape, dtype=torch.float32) for x in (hidden, weight))
    multiply(d, weight.bfloat16(), dhidden)
    multiply(d.t(), hidden.bfloat16(), dweight)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype)


@_logits_backward.register_fake
def _(hidden, weight, dlogits):
    return torch.empty_like(hidden), torch.empty_like(weight)


_logits.register_autograd(
    lambda ctx, dlogits: _logits_backward(*ctx.saved_tensors, dlogits),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
