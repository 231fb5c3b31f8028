"""Softmax attention of the hybrid's other layers: RoPE, grouped heads, an optional window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sse_kernels import paged_attention, rotate, rotate_into_pages, take_rows
from sse_kernels.attention.op import triton_serves
from torch import Tensor, nn

from sse_rl.model.cache import PackedInputs, SlotCache
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.joined import products

_TILE = 64
_MASKED = -1e30


class SoftmaxAttention(nn.Module):
    """Causal attention over packed sequences, with keys and values in pages if there is a cache.

    Args:
        index: which of the model's softmax layers this is: its place in the cache.
    """

    def __init__(self, config: SSEConfig, index: int) -> None:
        super().__init__()
        assert config.attn is not None
        self.index = index
        self.head_dim: int = config.attn["head_dim"]
        self.window: int | None = config.attn["window_size"]
        self.rope_theta: float = config.attn["rope_theta"]
        d, bias = config.hidden_size, config.attn["qkv_bias"]
        queries = config.attn["num_heads"] * self.head_dim
        keys = config.attn["num_kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(d, queries, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)
        self.v_proj = nn.Linear(d, keys, bias=bias)
        self.o_proj = nn.Linear(queries, d, bias=False)
        self.qk_norm: bool = config.attn["qk_norm"]
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, seqs: PackedInputs) -> Tensor:
        """x [T, d] -> [T, d]; with a cache, this call's k and v are written to its pages."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in products(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if seqs.cache is not None:
            o = self._attend_pages(q, k, v, seqs, seqs.cache)
            return self.o_proj(o.flatten(-2))
        q, k = rotate(q, k, seqs.positions, theta=self.rope_theta)
        if seqs.fork is None:
            o = self._attend(q, k, v, seqs)
        else:
            behind = seqs.fork.whole
            q, k, v = (take_rows(x, behind.rows) for x in (q, k, v))
            o = take_rows(self._attend(q, k, v, behind.inputs), behind.places)
        return self.o_proj(o.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seqs: PackedInputs) -> Tensor:
        served = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        attend = _varlen_attention if served else _bucketed_attention
        return attend(q, k, v, seqs, self.window)

    def _attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: PackedInputs, cache: SlotCache
    ) -> Tensor:
        """q, k, v before RoPE; k and v go to the cache. Without a kernel the pages are gathered."""
        assert seqs.block_table is not None and seqs.context_lens is not None
        pages = cache.k[self.index], cache.v[self.index]
        room = seqs.block_table.shape[1] * pages[0].shape[1]
        if seqs.max_context > room:
            raise ValueError(f"block_table: room for {room} tokens, max_context {seqs.max_context}")
        if triton_serves(q) and q.dtype == pages[0].dtype and not q.requires_grad:
            lengths = {
                "context_lens": seqs.context_lens,
                "cu_seqlens": None if seqs.max_seqlen == 1 else seqs.cu_seqlens,
            }
            table = seqs.block_table
            q = rotate_into_pages(q, k, v, *pages, table, theta=self.rope_theta, **lengths)
            return paged_attention(q, *pages, table, window=self.window, **lengths)
        q, k = rotate(q, k, seqs.positions, theta=self.rope_theta)
        _write_pages(k, v, seqs, cache, self.index)
        attend = _gathered_attention if q.is_cuda else _tiled_attention
        return attend(q, *pages, seqs, self.window)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, seqs: PackedInputs, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = seqs.cu_seqlens.int()
    left = -1 if window is None else window - 1
    # torch 2.11 knows no grouped heads here.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    o = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        seqs.max_seqlen,
        seqs.max_seqlen,
        window_size=(left, 0),
    )
    assert isinstance(o, Tensor)
    return o


def _bucketed_attention(
    q: Tensor, k: Tensor, v: Tensor, seqs: PackedInputs, window: int | None
) -> Tensor:
    """Sequences whose lengths share a power of two are padded to one batch."""
    lengths = seqs.cu_seqlens.diff()
    bucket = torch.tensor([(n - 1).bit_length() for n in lengths.tolist()])
    of_token = torch.empty_like(seqs.positions)
    outputs, filled = [], 0
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for size in bucket.unique():
        rows = (bucket == size).nonzero()[:, 0].to(q.device)
        width = int(lengths[rows].max())
        column = torch.arange(width, device=q.device)
        token = seqs.cu_seqlens[rows, None] + column.clamp(max=lengths[rows, None] - 1)
        mine = column < lengths[rows, None]
        place = filled + torch.arange(mine.numel(), device=q.device).view(mine.shape)
        of_token[token[mine]] = place[mine]
        filled += mine.numel()
        q_rows, k_rows, v_rows = (
            x.index_select(0, token.flatten()).unflatten(0, token.shape).transpose(1, 2)
            for x in (q, k, v)
        )
        o = _causal_attention(q_rows, k_rows, v_rows, window)
        outputs.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, of_token)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """[B, H, L, D]; padding on the right is seen by no token before it."""
    length = q.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    at = torch.arange(length, device=q.device)
    distance = at[:, None] - at
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _write_pages(k: Tensor, v: Tensor, seqs: PackedInputs, cache: SlotCache, index: int) -> None:
    assert seqs.block_table is not None
    page = seqs.block_table[seqs.sequence_of_token(), seqs.positions // cache.page_size]
    place = page * cache.page_size + seqs.positions % cache.page_size
    for pages, new in ((cache.k[index], k), (cache.v[index], v)):
        pages.flatten(0, 1).index_copy_(0, place, new.to(pages.dtype))


def _gathered_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, seqs: PackedInputs, window: int | None
) -> Tensor:
    """All pages of each sequence in one padded batch; waits for no device value."""
    assert seqs.block_table is not None
    sequences, device = seqs.block_table.shape[0], q.device
    used = -(-seqs.max_context // k_pages.shape[1])
    table = seqs.block_table[:, :used]
    k, v = (pages[table].flatten(1, 2).transpose(1, 2).to(q.dtype) for pages in (k_pages, v_pages))
    of_token = seqs.sequence_of_token()
    column = torch.arange(q.shape[0], device=device) - seqs.cu_seqlens[of_token]
    padded = q.new_zeros(sequences, seqs.max_seqlen, *q.shape[1:])
    padded[of_token, column] = q
    position = seqs.positions.new_zeros(sequences, seqs.max_seqlen)
    position[of_token, column] = seqs.positions
    mask = _visible(position, torch.arange(k.shape[2], device=device), window)
    o = F.scaled_dot_product_attention(
        padded.transpose(1, 2), k, v, attn_mask=mask[:, None], enable_gqa=True
    )
    return o.transpose(1, 2)[of_token, column]


def _tiled_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, seqs: PackedInputs, window: int | None
) -> Tensor:
    """Tiles of queries meet one page after another, with a running softmax.

    Every product has the same shape whatever the company and a page beyond a query's own changes
    nothing, so a row has the same bits in any batch and with any length of block table.
    """
    assert seqs.block_table is not None
    size, kv_heads, width = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    tile = 1 if seqs.is_step else _TILE
    of_tile, token, place = _tiles(seqs, tile)
    tiles = token.shape[0]
    x = q[token].float().unflatten(2, (kv_heads, group)) * width**-0.5
    x = x.permute(0, 2, 3, 1, 4).reshape(tiles, kv_heads, group * tile, width)
    position = seqs.positions[token]
    top = x.new_full((tiles, kv_heads, group * tile, 1), _MASKED)
    total = torch.zeros_like(top)
    o = torch.zeros_like(x)
    for p in range(-(-seqs.max_context // size)):
        page = seqs.block_table[of_tile, p]
        k, v = (pages.index_select(0, page).float() for pages in (k_pages, v_pages))
        seen = _visible(position, torch.arange(p * size, (p + 1) * size), window)
        scores = _by_head(x, k.permute(0, 2, 3, 1).unbind(1)).view(
            tiles, kv_heads, group, tile, size
        )
        scores = scores.masked_fill(~seen[:, None, None], _MASKED).flatten(2, 3)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_top)
        kept = torch.exp(top - new_top)
        total = total * kept + weights.sum(-1, keepdim=True)
        o = o * kept + _by_head(weights, v.unbind(2))
        top = new_top
    o = (o / total).view(tiles, kv_heads, group, tile, width).permute(0, 3, 1, 2, 4)
    return o.reshape(tiles * tile, *q.shape[1:])[place].to(q.dtype)


def _by_head(x: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """x [n, Hkv, L, a] times each head's [n, a, b], read in place: a transposed copy costs more."""
    return torch.stack([torch.bmm(x[:, h], page) for h, page in enumerate(pages)], 1)


def _tiles(seqs: PackedInputs, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts each sequence into tiles of queries, the last one filled up with its last token.

    Returns the sequence of each tile [n], its tokens [n, tile], and where each token's first copy
    lies among them [T].
    """
    begin, end = seqs.cu_seqlens[:-1], seqs.cu_seqlens[1:]
    count = (end - begin + tile - 1) // tile
    of_tile = torch.repeat_interleave(count)
    first = count.cumsum(0) - count
    offset = (torch.arange(of_tile.shape[0]) - first[of_tile]) * tile
    token = (begin[of_tile] + offset)[:, None] + torch.arange(tile)
    token = torch.minimum(token, end[of_tile, None] - 1)
    sequence = seqs.sequence_of_token()
    place = first[sequence] * tile + torch.arange(sequence.shape[0]) - begin[sequence]
    return of_tile, token, place


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """query positions [B, L], key positions [S] -> [B, L, S]: itself and what lies before it."""
    distance = query[..., None] - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
