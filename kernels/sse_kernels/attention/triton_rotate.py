"""RoPE and the write of new keys and values into their pages, in one launch."""

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
    q, k, v = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, k, v))
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


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """Every layer of every step asks for the same ones: they are kept, except those made while a
    graph is captured, whose memory is the graph's and empty until its first replay."""
    key = width, theta, device
    if (found := _kept.get(key)) is None:
        found = frequencies(*key)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _kept[key] = found
    return found


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
    i_d = tl.arange(0, HALFP)[None, :]
    angle = position.to(tl.float32) * tl.load(frequency + i_d, mask=i_d < HALF, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)

    i_h = tl.arange(0, HP)[:, None]
    mask = (i_h < H) & (i_d < HALF)
    at = i_h * (2 * HALF) + i_d
    _turn(q + i_t * q_row + at, o + i_t * H * 2 * HALF + at, cos, sin, mask, HALF)

    i_h = tl.arange(0, HKVP)[:, None]
    mask = (i_h < tl.where(fits, HKV, 0)) & (i_d < HALF)
    at = i_h * (2 * HALF) + i_d
    target = row * HKV * 2 * HALF + at
    _turn(k + i_t * k_row + at, k_pages + target, cos, sin, mask, HALF)
    source = v + i_t * v_row + at
    tl.store(v_pages + target, tl.load(source, mask=mask), mask=mask)
    tl.store(v_pages + target + HALF, tl.load(source + HALF, mask=mask), mask=mask)


@triton.jit
def _turn(source, target, cos, sin, mask, HALF: tl.constexpr):
    a = tl.load(source, mask=mask).to(tl.float32)
    b = tl.load(source + HALF, mask=mask).to(tl.float32)
    tl.store(target, (a * cos - b * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (b * cos + a * sin).to(target.dtype.element_ty), mask=mask)
