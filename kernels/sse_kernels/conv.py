"""The short causal convolution before the mixer: depthwise, over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import expect, expect_cu_seqlens, expect_float, expect_slots, expect_tensor
from .dtypes import compute_dtype
from .rows import gather_rows


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    cu_seqlens: Tensor,
    initial: Tensor | None = None,
    output_final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y[t] = sum over i of weight[:, 0, i] * x[t - (W-1) + i], inside each sequence.

    x [T, C]; weight [C, 1, W]; initial [B, C, W-1]: the inputs before each sequence, oldest first
    (None: zeros). Returns y [T, C] and, on request, the last W-1 inputs [B, C, W-1], x's dtype.
    """
    op = "causal_conv"
    channels, width = _expect_weight(op, x, weight)
    expect_cu_seqlens(op, cu_seqlens, len(x), x.device)
    batch, past = len(cu_seqlens) - 1, width - 1
    if initial is not None:
        shape = (batch, channels, past)
        expect_tensor(op, "initial", initial, "[B, C, W-1]", shape, x.device)

    if (
        x.is_cuda
        and x.dtype != torch.float64
        and not _carries_gradients(x, weight, initial, output_final)
    ):
        try:
            from .triton_conv import triton_causal_conv
        except ImportError:
            pass
        else:
            return triton_causal_conv(
                x, weight, cu_seqlens=cu_seqlens, initial=initial, output_final=output_final
            )
    # Every sequence is laid out behind W-1 rows of its past, so that windows are plain slices.
    dtype = compute_dtype(x)
    sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=len(x))
    place = torch.arange(len(x), device=x.device) + past * (sequence + 1)
    rows = x.new_zeros(len(x) + past * batch, channels, dtype=dtype)
    if initial is not None and past:
        before = torch.arange(past, device=x.device)
        before = (cu_seqlens[:-1] + past * torch.arange(batch, device=x.device))[:, None] + before
        rows = rows.index_copy(0, before.flatten(), initial.mT.flatten(0, 1).to(dtype))
    rows = rows.index_copy(0, place, x.to(dtype))
    y = _window_sum([rows[i : len(rows) - past + i] for i in range(width)], weight.to(dtype))
    y = gather_rows(y, place - past).to(x.dtype)
    if not output_final:
        return y, None
    ends = cu_seqlens[1:] + past * torch.arange(1, batch + 1, device=x.device)
    last = ends[:, None] - past + torch.arange(past, device=x.device)
    return y, rows[last].mT.to(x.dtype)


@torch.no_grad()
def causal_conv_step(x: Tensor, weight: Tensor, *, state: Tensor, slots: Tensor) -> Tensor:
    """One token a sequence: x [B, C] -> y [B, C].

    state [S, C, W-1], the inputs before, oldest first; rows `slots` [B] int64 change in place.
    """
    op = "causal_conv_step"
    channels, width = _expect_weight(op, x, weight)
    expect_slots(op, state, slots, (channels, width - 1), x)
    dtype = compute_dtype(x)
    window = torch.cat([state[slots].to(dtype), x.to(dtype)[:, :, None]], dim=-1)
    state[slots] = window[:, :, 1:].to(state.dtype)
    return _window_sum(window.unbind(-1), weight.to(dtype)).to(x.dtype)


def _carries_gradients(
    x: Tensor, weight: Tensor, initial: Tensor | None, output_final: bool
) -> bool:
    """Whether gradients go through what is carried from piece to piece: torch's form has them."""
    into = initial is not None and (initial.requires_grad or weight.requires_grad)
    return (into or (output_final and x.requires_grad)) and torch.is_grad_enabled()


def _window_sum(window: list[Tensor] | tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """Sum of W products in the order of time, the same for both forms."""
    y = window[0] * weight[:, 0, 0]
    for i in range(1, len(window)):
        y = y + window[i] * weight[:, 0, i]
    return y


def _expect_weight(op: str, x: Tensor, weight: Tensor) -> tuple[int, int]:
    expect_float(op, "x", x)
    expect(x.dim() == 2, op, "x", "two-dimensional, [rows, C]", list(x.shape))
    expect_float(op, "weight", weight)
    expect(weight.dim() == 3, op, "weight", "shape [C, 1, W]", list(weight.shape))
    channels, width = x.shape[1], weight.shape[2]
    expect_tensor(op, "weight", weight, "[C, 1, W]", (channels, 1, width), x.device)
    return channels, width
