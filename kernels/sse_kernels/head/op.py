"""The language-model head: log-probabilities and entropies without the [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..checks import expect, expect_float
from .torch_rows import TORCH
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
    dtype = _operand_dtype(hidden, weight, dtype)
    form = _form(hidden, dtype)
    logprobs, entropy, _ = form(hidden, weight, targets.long(), float(temperature), dtype)
    return logprobs, entropy


def linear_logits(hidden: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """hidden [..., d] weight^T -> [..., V] in fp32 (fp64 if an input is), never rounded to bf16.

    The logits of which `linear_logprob` gives the log-probabilities; `dtype` as there.
    """
    _expect_matrices("linear_logits", hidden, weight)
    dtype = _operand_dtype(hidden, weight, dtype)
    if dtype == torch.bfloat16:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _Bf16Logits.apply(rows, weight).reshape(*hidden.shape[:-1], len(weight))
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


def _form(hidden: Tensor, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    """The operator with Triton's passes on a GPU, else with torch's."""
    if hidden.is_cuda and dtype != torch.float64:
        try:
            from .triton_op import head
        except ImportError:
            return _Head.apply
        return head
    return _Head.apply


class _Head(torch.autograd.Function):
    """Log-probs, entropies and the logarithms of the softmax's denominators, [T] each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = head_forward(Operands(hidden, weight, targets, temperature, dtype), TORCH)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.save_for_backward(hidden, weight, targets, *out[1:])
        ctx.mark_non_differentiable(out[2])
        return out

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, _: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        x = Operands(hidden, weight, targets, ctx.temperature, ctx.dtype)
        wanted = ctx.needs_input_grad[:2]
        gradients = head_backward(x, TORCH, entropy, lse, dlogprobs, dentropy, wanted)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None


class _Bf16Logits(torch.autograd.Function):
    """hidden [T, d], weight [V, d] rounded to bf16 -> [T, V] fp32; on CUDA."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        out = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        return multiply(hidden.bfloat16(), weight.bfloat16().t(), out)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        d = dlogits.bfloat16()

        def gradient(wanted: bool, a: Tensor, b: Tensor, x: Tensor) -> Tensor | None:
            if not wanted:
                return None
            return multiply(a, b.bfloat16(), x.new_empty(x.shape, dtype=torch.float32)).to(x.dtype)

        wants_hidden, wants_weight = ctx.needs_input_grad
        dhidden = gradient(wants_hidden, d, weight, hidden)
        return dhidden, gradient(wants_weight, d.t(), hidden, weight)
