"""What the SSE-GLA kernels read of a token: its activated inputs, or raw projections (RAW) which
become them on the way.

RAW: queries and values silu(x), keys softmax over Dk, or over the `row_topk` largest of them, and
log-decays logsigmoid(x) / 16, as `sse_kernels.activations` defines them. A key's softmax needs its
whole row: `key_limits` finds that row's normaliser and smallest kept entry once, for all tiles.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import DECAY_TEMPERATURE
from .triton_tiles import fast_exp

TEMPERATURE = tl.constexpr(DECAY_TEMPERATURE)
LOWEST = tl.constexpr(-30.0)
NO_DECAY = tl.constexpr(128.0)
"""A raw decay beyond which none is left."""
LN_2 = tl.constexpr(0.6931471805599453)


def silu_values(v: Tensor) -> Tensor:
    """silu of raw values [T, Hv, Dv], rounded as products take them: once for all who read them."""
    out = torch.empty_like(v)
    if v.numel():
        grid = (triton.cdiv(v.numel(), 2048),)
        silu_kernel[grid](v, out, v.shape[0], ROW=v[0].numel(), BLOCK=2048)
    return out


@triton.jit(do_not_specialize=["tokens"])
def silu_kernel(x, out, tokens, ROW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # From the row's width triton knows how the size is aligned.
    mask = i < tokens.to(tl.int64) * ROW
    b_x = load_silu(x, i, mask, RAW=True)
    tl.store(out + i, b_x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_silu(x, tile, mask, RAW: tl.constexpr):
    """Queries or values of a tile in fp32, 0 outside."""
    x = tl.load(x + tile, mask=mask, other=0.0).to(tl.float32)
    if RAW:
        x *= sigmoid(x)
    return x


@triton.jit
def load_keys(k, tile, mask, i_k, norm, lowest, RAW: tl.constexpr, TOPK: tl.constexpr):
    """Keys of a tile in fp32; i_k: its channels; norm, lowest: see `key_limits`.

    Outside `mask` they are finite if raw, else 0.
    """
    x = tl.load(k + tile, mask=mask, other=0.0).to(tl.float32)
    if RAW:
        y = fast_exp(x - norm[:, None])
        if TOPK > 0:
            y = tl.where(_rank(x, i_k) >= lowest[:, None], y, 0.0)
        return y
    return x


@triton.jit
def load_decays(g, tile, mask, RAW: tl.constexpr):
    """Log-decays of a tile, 0 outside. Below -30 they are cut: e^-30 is 0 beside any fp32 sum."""
    if RAW:
        x = tl.load(g + tile, mask=mask, other=NO_DECAY).to(tl.float32)
        soft = tl.minimum(x, 0.0) - LN_2 * tl.log2(1.0 + fast_exp(-tl.abs(x)))
        x = soft * (1.0 / TEMPERATURE)
    else:
        x = tl.load(g + tile, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(x, LOWEST)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); a division takes many instructions, a root of the reciprocal one."""
    root = tl.rsqrt(1.0 + fast_exp(-x))
    return root * root


@triton.jit
def silu_slope(x):
    """d silu(x) / dx."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def decay_slope(x):
    """d (logsigmoid(x) / 16) / dx."""
    return sigmoid(-x) * (1.0 / TEMPERATURE)


@triton.jit
def key_limits(k, tile, mask, i_k, TOPK: tl.constexpr):
    """Of whole rows of raw keys: log of the sum of e^x over kept entries, and their lowest rank.

    The rank of the TOPK-th largest entry is found bit by bit, from the top.
    """
    x = tl.load(k + tile, mask=mask, other=0.0).to(tl.float32)
    top = tl.max(x, axis=1)
    terms = fast_exp(x - top[:, None])
    lowest = tl.zeros_like(top).to(tl.int64)
    if TOPK > 0:
        rank = _rank(x, i_k)
        for i in range(40):
            candidate = lowest + (tl.full([], 1, tl.int64) << (39 - i))
            above = tl.sum((rank >= candidate[:, None]).to(tl.int32), axis=1)
            lowest = tl.where(above >= TOPK, candidate, lowest)
        terms = tl.where(rank >= lowest[:, None], terms, 0.0)
    return top + tl.log(tl.sum(terms, axis=1)), lowest


@triton.jit
def load_limits(norms, lowest, at, RAW: tl.constexpr, TOPK: tl.constexpr):
    """What `key_limits` found, read back; zeros where it is of no use."""
    norm, low = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.int64)
    if RAW:
        norm = tl.load(norms + at)
        if TOPK > 0:
            low = tl.load(lowest + at)
    return norm, low


@triton.jit
def _rank(x, i_k):
    """int64 in 0..2^40 that orders a row's entries by value and, in a tie, the lower channel first.

    The bits of an fp32 number, read as an integer, order numbers of one sign.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)
    order = tl.where(bits < 0, -1 - bits, bits + 0x80000000)
    order = tl.where(x != x, 0xFFFFFFFF, order)
    return order * 256 + (255 - i_k)[None, :]
