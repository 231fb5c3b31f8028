"""The definition of paged attention: one sequence after another, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    *,
    context_lens: Tensor,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """See `paged_attention`; same arguments, same results, no tricks."""
    page, kv_heads, width = k_pages.shape[1:]
    bounds = range(len(q) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = torch.empty_like(q)
    for b, context in enumerate(context_lens.tolist()):
        rows = slice(bounds[b], bounds[b + 1])
        length = rows.stop - rows.start
        past = block_table[b, : -(-(context + length) // page)].long()
        k, v = (
            pages[past].flatten(0, 1)[: context + length].to(dtype) for pages in (k_pages, v_pages)
        )
        x = q[rows].to(dtype).unflatten(1, (kv_heads, -1)) * width**-0.5
        at = context + torch.arange(length, device=q.device)[:, None]
        distance = at - torch.arange(context + length, device=q.device)
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        scores = torch.einsum("thgd,shd->hgts", x, k).masked_fill(hidden, -torch.inf)
        o[rows] = torch.einsum("hgts,shd->thgd", scores.softmax(-1), v).flatten(1, 2).to(q.dtype)
    return o


def token_places(
    tokens: int, page: int, block_table: Tensor, context_lens: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Position of each token in its sequence and its row in the flattened pages, [T] both."""
    sequence = torch.arange(tokens, device=block_table.device)
    position = context_lens
    if cu_seqlens is not None:
        token, sequence = sequence, torch.searchsorted(cu_seqlens, sequence, right=True) - 1
        position = context_lens[sequence] + token - cu_seqlens[sequence]
    place = block_table[sequence, position // page].long() * page + position % page
    return position, place
