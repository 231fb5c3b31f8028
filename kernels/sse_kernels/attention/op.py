"""Attention of new tokens to keys and values in pages: decoding, and prefill in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect, expect_cu_seqlens, expect_float, expect_tensor
from .naive import naive_paged_attention, token_places
from .rope import rotate

SPLIT = 512


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    *,
    context_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    split: int = SPLIT,
) -> Tensor:
    """softmax(D^-1/2 q k^T) v, causal: a token sees its own sequence up to itself. No gradients.

    q [T, H, D]; k_pages, v_pages [P, page, Hkv, D], H a multiple of Hkv, query head h reads head
    h // (H // Hkv); block_table [B, n] integers, the pages of each sequence, in which the keys and
    values of this call's tokens lie already; context_lens [B], tokens of each sequence before this
    call; cu_seqlens [B+1], where each sequence's tokens begin (None: one token a sequence, T = B).

    Args:
        window: a token sees so many tokens, itself included.
        split: on a GPU the keys of a decode step are worked on in parts of so many tokens, a
            multiple of 128. A row's bits depend on its keys and this number alone.

    Returns o [T, H, D]. Raises ValueError or TypeError naming the argument; a sequence that its
    block table has no room for is an error on CPU and gives NaN from the kernel.
    """
    op = "paged_attention"
    _check(op, q, k_pages, v_pages, block_table, context_lens, cu_seqlens)
    counts = window is None or (isinstance(window, int) and window >= 1)
    expect(counts, op, "window", "an integer of at least 1 or None", window)
    fits = isinstance(split, int) and split >= 128 and split % 128 == 0
    expect(fits, op, "split", "a multiple of 128", split)
    lengths = {"context_lens": context_lens, "cu_seqlens": cu_seqlens}
    if not triton_serves(q):
        return naive_paged_attention(q, k_pages, v_pages, block_table, **lengths, window=window)
    from .triton_paged import triton_paged_attention

    return triton_paged_attention(
        q, k_pages, v_pages, block_table, **lengths, window=window, split=split
    )


def rotate_into_pages(
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
    """RoPE of q and k; k and v go to their places in the pages, which are changed in place.

    k, v [T, Hkv, D] in q's dtype; the other arguments as in `paged_attention`. Returns q, rotated.
    Raises ValueError or TypeError naming the argument; a token that its sequence's block table has
    no room for is an error on CPU and goes nowhere on CUDA.
    """
    op = "rotate_into_pages"
    _check(op, q, k_pages, v_pages, block_table, context_lens, cu_seqlens)
    expect(q.shape[2] % 2 == 0, op, "D", "even", q.shape[2])
    expect(theta > 0, op, "theta", "above 0", theta)
    for name, x in (("k", k), ("v", v)):
        expect_tensor(op, name, x, "[T, Hkv, D]", (len(q), *k_pages.shape[2:]), q.device)
        expect(x.dtype == q.dtype, op, name, f"{q.dtype} as q", x.dtype)
        _expect_constant(op, name, x)
    lengths = {"context_lens": context_lens, "cu_seqlens": cu_seqlens}
    if triton_serves(q):
        from .triton_rotate import triton_rotate_into_pages

        return triton_rotate_into_pages(
            q, k, v, k_pages, v_pages, block_table, theta=theta, **lengths
        )
    positions, places = token_places(len(q), k_pages.shape[1], block_table, **lengths)
    q, k = rotate(q, k, positions, theta=theta)
    for pages, new in ((k_pages, k), (v_pages, v)):
        pages.flatten(0, 1).index_copy_(0, places, new)
    return q


def triton_serves(q: Tensor) -> bool:
    """Whether the kernels take these queries: on CUDA, 16 to 256 channels wide, not fp64."""
    if not q.is_cuda or not 16 <= q.shape[-1] <= 256 or q.dtype == torch.float64:
        return False
    try:
        from .triton_paged import triton_paged_attention  # noqa: F401
    except ImportError:
        return False
    return True


def _check(
    op: str,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    expect_float(op, "q", q)
    expect(q.dim() == 3, op, "q", "shape [T, H, D]", list(q.shape))
    expect_float(op, "k_pages", k_pages)
    expect(k_pages.dim() == 4, op, "k_pages", "shape [P, page, Hkv, D]", list(k_pages.shape))
    heads, kv_heads, page = q.shape[1], k_pages.shape[2], k_pages.shape[1]
    expect(k_pages.shape[3] == q.shape[2], op, "k_pages", f"{q.shape[2]} wide", k_pages.shape[3])
    expect_tensor(op, "v_pages", v_pages, "[P, page, Hkv, D]", tuple(k_pages.shape), q.device)
    expect(kv_heads >= 1 and heads % kv_heads == 0, op, "H", f"a multiple of {kv_heads}", heads)
    expect(page >= 16 and page % 16 == 0, op, "k_pages' page", "a multiple of 16 tokens", page)
    expect(len(k_pages) >= 1, op, "k_pages", "one page or more", list(k_pages.shape))
    _expect_constant(op, "q", q)
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        _expect_constant(op, name, x)
        expect(x.device == q.device, op, name, f"on {q.device}", x.device)
        expect(x.dtype == q.dtype, op, name, f"{q.dtype} as q", x.dtype)
        expect(x.is_contiguous(), op, name, "contiguous", f"strides {list(x.stride())}")
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    if cu_seqlens is not None:
        expect_cu_seqlens(op, cu_seqlens, len(q), q.device)
        strides = f"strides {list(cu_seqlens.stride())}"
        expect(cu_seqlens.is_contiguous(), op, "cu_seqlens", "contiguous", strides)
    for name, x, dim in (("block_table", block_table, 2), ("context_lens", context_lens, 1)):
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: {name} must be int64, got {x.dtype}")
        expect(x.dim() == dim, op, name, f"{dim}-dimensional", list(x.shape))
        expect(len(x) == sequences, op, name, f"{sequences} rows, one a sequence", len(x))
        expect(x.device == q.device, op, name, f"on {q.device}", x.device)
        dense = x.shape[-1] <= 1 or x.stride(-1) == 1
        expect(dense, op, name, "contiguous in its last axis", f"strides {list(x.stride())}")
    if len(q):
        shape = list(block_table.shape)
        expect(block_table.shape[1] >= 1, op, "block_table", "one page wide or more", shape)
    if q.device.type == "cpu":
        _check_values(op, k_pages, block_table, context_lens, cu_seqlens)


def _expect_constant(op: str, name: str, x: Tensor) -> None:
    needs = torch.is_grad_enabled() and x.requires_grad
    expect(not needs, op, name, "without gradients, which this has not", "requires_grad")


def _check_values(
    op: str, k_pages: Tensor, block_table: Tensor, context_lens: Tensor, cu_seqlens: Tensor | None
) -> None:
    least = int(context_lens.min()) if len(context_lens) else 0
    expect(least >= 0, op, "context_lens", "at least 0", least)
    lengths = 1 if cu_seqlens is None else cu_seqlens.diff()
    longest = int((context_lens + lengths).max()) if len(context_lens) else 0
    room = block_table.shape[1] * k_pages.shape[1]
    expect(longest <= room, op, "block_table", f"wide enough for {longest} tokens", f"{room}")
    if block_table.numel():
        low, high = int(block_table.min()), int(block_table.max())
        last = len(k_pages) - 1
        expect(low >= 0 and high <= last, op, "block_table", f"in 0..{last}", f"{low}..{high}")
