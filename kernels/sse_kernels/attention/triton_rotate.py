"""RoPE in one launch: of q and k, with a gradient; or with the write of k and v into their pages.

The gradient of turning by an angle is turning the gradient back.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rope import frequencies
from .triton_tiles import load_pages, sequence_of

_kept: dict[tuple[int, float, torch.device], Tensor] = {}


def triton_rotate(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, sign: int = 1
) -> tuple[Tensor, Tensor]:
    """See `rotate`; sign -1 turns back. One program a token."""
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    q, k = _dense_heads(q, k)
    o_q, o_k = q.new_empty(q.shape), k.new_empty(k.shape)
    if tokens:
        power = triton.next_power_of_2
        rotate_rows_kernel[(tokens,)](
            q, k, positions.contiguous(), _frequencies(width, theta, q.device), o_q, o_k,
            q.stride(0), k.stride(0), SIGN=sign, H=heads, HP=power(heads), HKV=kv_heads,
            HKVP=power(kv_heads), HALF=width // 2, HALFP=power(width // 2), num_warps=4,
        )  # fmt: skip
    return o_q, o_k


@torch.library.custom_op("sse_kernels::rotate", mutates_args=())
def differentiable_rotate(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, sign: int = 1
) -> tuple[Tensor, Tensor]:
    """`triton_rotate` with a gradient."""
    return triton_rotate(q, k, positions, theta, sign)


@differentiable_rotate.register_fake
def _(q: Tensor, k: Tensor, positions: Tensor, theta: float, sign: int = 1):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, positions, ctx.theta, ctx.sign = inputs
    ctx.save_for_backward(positions)


def _backward(ctx, dq: Tensor, dk: Tensor):
    turned = differentiable_rotate(dq, dk, *ctx.saved_tensors, ctx.theta, -ctx.sign)
    return *turned, None, None, None


differentiable_rotate.register_autograd(_backward, setup_context=_setup_context)


def triton_rotate_into_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    *,
    theta: float,
    context_lens: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """See `rotate_into_pages`. One program a token; what its table has no room for is not kept."""
    (tokens, heads, width), (page, kv_heads) = q.shape, k_pages.shape[1:3]
    q, k, v = _dense_heads(q, k, v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return o
    power = triton.next_power_of_2
    rotate_kernel[(tokens,)](
        q, k, v, _frequencies(width, theta, q.device), k_pages, v_pages, o,
        block_table, context_lens, cu_seqlens,
        q.stride(0), k.stride(0), v.stride(0),
        block_table.stride(0), len(context_lens), len(k_pages), block_table.shape[1] * page,
        H=heads, HP=power(heads), HKV=kv_heads, HKVP=power(kv_heads), HALF=width // 2,
        HALFP=power(width // 2), PAGE=page, num_warps=4,
    )  # fmt: skip
    return o


def _dense_heads(*inputs: Tensor) -> tuple[Tensor, ...]:
    """x [T, H, D] each, a token's heads one behind the other; tokens may lie apart."""
    return tuple(x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in inputs)


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Every layer of every step asks for the same ones: they are kept, except those made while a
    graph is captured, whose memory is the graph's and empty until its first replay."""
    key = width, theta, device
    if (found := _kept.get(key)) is None:
        found = frequencies(*key)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _kept[key] = found
    return found


@triton.jit
def rotate_rows_kernel(
    q, k, positions, frequency, o_q, o_k, q_row, k_row, SIGN: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HKV: tl.constexpr, HKVP: tl.constexpr, HALF: tl.constexpr,
    HALFP: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    cos, sin = _cos_sin(tl.load(positions + i_t), frequency, HALF, HALFP)
    sin *= SIGN
    _turn(q + i_t * q_row, o_q + i_t * H * 2 * HALF, cos, sin, H, HP, HALF, HALFP)
    _turn(k + i_t * k_row, o_k + i_t * HKV * 2 * HALF, cos, sin, HKV, HKVP, HALF, HALFP)


@triton.jit(do_not_specialize=["q_row", "k_row", "v_row", "stride", "B", "P", "room"])
def rotate_kernel(
    q, k, v, frequency, k_pages, v_pages, o, block_table, context_lens, cu_seqlens,
    q_row, k_row, v_row, stride, B, P, room,
    H: tl.constexpr, HP: tl.constexpr, HKV: tl.constexpr, HKVP: tl.constexpr, HALF: tl.constexpr,
    HALFP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        i_b = i_t
        position = tl.load(context_lens + i_b)
    else:
        i_b = sequence_of(cu_seqlens, i_t, B, 0)
        position = tl.load(context_lens + i_b) + i_t - tl.load(cu_seqlens + i_b)
    fits = (position >= 0) & (position < room)
    position = tl.where(fits, position, 0)
    page = load_pages(block_table, i_b, stride, position // PAGE, position // PAGE + 1, P)
    row = page.to(tl.int64) * PAGE + position % PAGE
    cos, sin = _cos_sin(position, frequency, HALF, HALFP)
    _turn(q + i_t * q_row, o + i_t * H * 2 * HALF, cos, sin, H, HP, HALF, HALFP)
    kept, target = tl.where(fits, HKV, 0), row * HKV * 2 * HALF
    _turn(k + i_t * k_row, k_pages + target, cos, sin, kept, HKVP, HALF, HALFP)
    at, mask = _places(kept, HKVP, HALF, HALFP)
    source, target = v + i_t * v_row + at, v_pages + target + at
    tl.store(target, tl.load(source, mask=mask), mask=mask)
    tl.store(target + HALF, tl.load(source + HALF, mask=mask), mask=mask)


@triton.jit
def _cos_sin(position, frequency, HALF: tl.constexpr, HALFP: tl.constexpr):
    i_d = tl.arange(0, HALFP)[None, :]
    angle = position.to(tl.float32) * tl.load(frequency + i_d, mask=i_d < HALF, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _turn(
    source, target, cos, sin, heads, HP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr
):  # fmt: skip
    at, mask = _places(heads, HP, HALF, HALFP)
    a = tl.load(source + at, mask=mask).to(tl.float32)
    b = tl.load(source + at + HALF, mask=mask).to(tl.float32)
    tl.store(target + at, (a * cos - b * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + at + HALF, (b * cos + a * sin).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _places(heads, HP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr):
    """Where the first halves of a token's heads lie, and which of them there are."""
    i_h, i_d = tl.arange(0, HP)[:, None], tl.arange(0, HALFP)[None, :]
    return i_h * (2 * HALF) + i_d, (i_h < heads) & (i_d < HALF)
