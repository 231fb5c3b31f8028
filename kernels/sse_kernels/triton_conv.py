"""The short convolution over packed sequences: one kernel forward, one backward.

With W taps and the bounds [s, e) of a token's sequence,
    y_t  = sum_i w_i x_(t-(W-1)+i)     of inputs from s on; before s, of `initial`
    dx_t = sum_i w_i dy_(t+(W-1)-i)    of outputs before e
    dw_i = sum_t dy_t x_(t-(W-1)+i)
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routing_plan import upper_bound

TOKENS, CHANNELS = 32, 64
"""Of a tile."""
TILES = 16
"""Tiles a program of the backward pass takes, which is one part of the gradient of `weight`."""


def triton_causal_conv(
    x: Tensor, weight: Tensor, *, cu_seqlens: Tensor, initial: Tensor | None, output_final: bool
) -> tuple[Tensor, Tensor | None]:
    """See `causal_conv`; no fp64, and gradients only of `x` and `weight` without `initial`."""
    x, weight, cu_seqlens = x.contiguous(), weight.contiguous(), cu_seqlens.contiguous()
    initial = None if initial is None else initial.contiguous()
    y = _conv(x, weight, cu_seqlens, initial)
    if not output_final:
        return y, None
    past = weight.shape[2] - 1
    final = x.new_empty(len(cu_seqlens) - 1, x.shape[1], past)
    if final.numel():
        grid = (len(final), triton.cdiv(x.shape[1], CHANNELS))
        conv_final_kernel[grid](
            x, cu_seqlens, initial, final, len(x), x.shape[1],
            P=past, PP=triton.next_power_of_2(past), BC=CHANNELS,
        )  # fmt: skip
    return y, final


@torch.library.custom_op("sse_kernels::causal_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    (tokens, channels), sequences = x.shape, len(cu_seqlens) - 1
    if y.numel():
        grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(channels, CHANNELS))
        conv_fwd_kernel[grid](
            x, weight, cu_seqlens, initial, y, tokens, channels, sequences,
            sequences.bit_length(), W=weight.shape[2], BT=TOKENS, BC=CHANNELS,
        )  # fmt: skip
    return y


@_conv.register_fake
def _(x: Tensor, weight: Tensor, cu_seqlens: Tensor, initial: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sse_kernels::causal_conv_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dy = torch.empty_like(x), dy.contiguous()
    (tokens, channels), width, sequences = x.shape, weight.shape[2], len(cu_seqlens) - 1
    parts = triton.cdiv(tokens, TOKENS * TILES)
    dweight = weight.new_empty(parts, width, channels, dtype=torch.float32)
    if dx.numel():
        conv_bwd_kernel[(parts, triton.cdiv(channels, CHANNELS))](
            x, weight, cu_seqlens, dy, dx, dweight, tokens, channels, sequences,
            sequences.bit_length(), W=width, BT=TOKENS, BC=CHANNELS, TILES=TILES,
        )  # fmt: skip
    return dx, dweight.sum(0).T[:, None].to(weight.dtype).contiguous()


@_conv_backward.register_fake
def _(x: Tensor, weight: Tensor, cu_seqlens: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, dy: Tensor):
    return *_conv_backward(*ctx.saved_tensors, dy), None, None


_conv.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _bounds(cu_seqlens, i_t, tokens, sequences, steps):
    """The sequence of each token, and where it starts and ends."""
    b = tl.minimum(upper_bound(cu_seqlens + 1, i_t, sequences, steps), sequences - 1)
    inside = i_t < tokens
    start = tl.load(cu_seqlens + b, mask=inside, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + b + 1, mask=inside, other=0).to(tl.int32)
    return b, tl.maximum(start, 0), tl.minimum(end, tokens)


_SIZES = ["tokens", "sequences", "steps"]
"""Change from batch to batch: no kernel is compiled anew for them."""


@triton.jit(do_not_specialize=_SIZES)
def conv_fwd_kernel(
    x, weight, cu_seqlens, initial, y, tokens, channels, sequences, steps,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = i_c < channels
    b, start, _ = _bounds(cu_seqlens, i_t, tokens, sequences, steps)
    total = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(W):
        source = i_t - (W - 1 - i)
        live = (i_t < tokens)[:, None] & in_c[None, :]
        tile = source.to(tl.int64)[:, None] * channels + i_c[None, :]
        taken = tl.load(x + tile, mask=live & (source >= start)[:, None], other=0.0)
        taken = taken.to(tl.float32)
        if initial is not None and i < W - 1:
            before = source - start + (W - 1)
            row = (b.to(tl.int64)[:, None] * channels + i_c[None, :]) * (W - 1)
            mask = live & ((source < start) & (before >= 0))[:, None]
            past = tl.load(initial + row + before[:, None], mask=mask, other=0.0)
            taken += past.to(tl.float32)
        w = tl.load(weight + i_c * W + i, mask=in_c, other=0.0).to(tl.float32)
        total += taken * w[None, :]
    mask = (i_t < tokens)[:, None] & in_c[None, :]
    tile = i_t.to(tl.int64)[:, None] * channels + i_c[None, :]
    tl.store(y + tile, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def conv_bwd_kernel(
    x, weight, cu_seqlens, dy, dx, dweight, tokens, channels, sequences, steps,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dweight [parts, W, C]: the share of each program."""
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = i_c < channels
    for i in tl.static_range(W):
        dw = tl.zeros([BC], tl.float32)
        for tile in range(TILES):
            i_t = (tl.program_id(0) * TILES + tile) * BT + tl.arange(0, BT)
            live = (i_t < tokens)[:, None] & in_c[None, :]
            _, start, _ = _bounds(cu_seqlens, i_t, tokens, sequences, steps)
            source = i_t - (W - 1 - i)
            at = source.to(tl.int64)[:, None] * channels + i_c[None, :]
            taken = tl.load(x + at, mask=live & (source >= start)[:, None], other=0.0)
            here = i_t.to(tl.int64)[:, None] * channels + i_c[None, :]
            slope = tl.load(dy + here, mask=live, other=0.0)
            dw += tl.sum(taken.to(tl.float32) * slope.to(tl.float32), axis=0)
        part = (tl.program_id(0).to(tl.int64) * W + i) * channels
        tl.store(dweight + part + i_c, dw, mask=in_c)
    for tile in range(TILES):
        i_t = (tl.program_id(0) * TILES + tile) * BT + tl.arange(0, BT)
        live = (i_t < tokens)[:, None] & in_c[None, :]
        _, _, end = _bounds(cu_seqlens, i_t, tokens, sequences, steps)
        total = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(W):
            reader = i_t + (W - 1 - i)
            at = reader.to(tl.int64)[:, None] * channels + i_c[None, :]
            slope = tl.load(dy + at, mask=live & (reader < end)[:, None], other=0.0)
            w = tl.load(weight + i_c * W + i, mask=in_c, other=0.0).to(tl.float32)
            total += slope.to(tl.float32) * w[None, :]
        here = i_t.to(tl.int64)[:, None] * channels + i_c[None, :]
        tl.store(dx + here, total.to(dx.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def conv_final_kernel(
    x, cu_seqlens, initial, final, tokens, channels,
    P: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last P inputs of each sequence, of `initial` where it is shorter."""
    b = tl.program_id(0).to(tl.int64)
    i_c, i_p = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, PP)
    start = tl.maximum(tl.load(cu_seqlens + b), 0)
    end = tl.maximum(tl.minimum(tl.load(cu_seqlens + b + 1), tokens), start)
    live = (i_c < channels)[:, None] & (i_p < P)[None, :]
    source = end - P + i_p
    at = source[None, :] * channels + i_c[:, None]
    last = tl.load(x + at, mask=live & (source >= start)[None, :], other=0.0)
    row = (b * channels + i_c)[:, None] * P
    if initial is not None:
        mask = live & (source < start)[None, :]
        past = tl.load(initial + row + (source - start + P)[None, :], mask=mask, other=0.0)
        last += past.to(last.dtype)
    tl.store(final + row + i_p[None, :], last, mask=live)
