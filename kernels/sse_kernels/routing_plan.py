"""Which tokens each (sequence, partition) pair sweeps, laid out on the device without waiting.

All sizes follow from shapes alone, so that a plan can be made inside a CUDA graph or torch.compile.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
"""Tokens a kernel handles at once."""


class RoutingPlan(NamedTuple):
    """Which tokens every chunk holds. A segment is one sequence's tokens in one partition.

    Segments are stream-major: number n * B + b, with n = 0 the shared stream and n = 1 + partition.
    Example: B = 1, N = 2, K = 1, ids = [[0], [1], [0]] gives chunks [0, 1, 2], segments
    [[1, 1, 1], [1, 2, 3]] and rows [[0, 1, 2], [3, 5], [4]], each filled up with -1.
    """

    rows: Tensor
    """[M, CHUNK] int32: s * T + t for token t in output slot s (0 shared, else 1 + j), or -1."""
    segments: Tensor
    """[2, (1+N)*B] int32: number of chunks, and the running sum of it."""
    chunks: Tensor
    """[M] int32: segment of every chunk, -1 for the surplus."""


def max_chunks(tokens: int, k: int, sequences: int, partitions: int) -> int:
    """The most chunks that any routing of these sizes can have."""
    segments = sequences * (1 + partitions)
    return (tokens + tokens * k) // CHUNK + segments


@torch.library.custom_op("sse_kernels::routing_plan", mutates_args=())
def routing_plan(ids: Tensor, cu_seqlens: Tensor, partitions: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a `RoutingPlan` for ids [T, K] (ascending in each row) and cu_seqlens [B + 1].

    Values out of range are clamped: a wrong id reads a wrong partition, never foreign memory.
    """
    tokens, k = ids.shape
    sequences = len(cu_seqlens) - 1
    rows, segments, chunks = _empty_plan(ids, cu_seqlens, partitions)
    rows.fill_(-1)
    if tokens == 0:
        return rows, segments.zero_(), chunks.fill_(-1)
    ids, cu_seqlens = ids.contiguous(), cu_seqlens.contiguous()
    member = torch.empty(partitions * tokens, dtype=torch.int32, device=ids.device)
    block = 256
    n_pow2 = triton.next_power_of_2(partitions)
    plan_member_kernel[(triton.cdiv(tokens, block),)](
        ids, member, tokens, K=k, N=partitions, NP=n_pow2, BLOCK=block
    )
    member = member.cumsum(0, dtype=torch.int32)
    plan_segments_kernel[(triton.cdiv(sequences, 32),)](
        cu_seqlens, member, segments, sequences, tokens,
        N=partitions, NP=n_pow2, BLOCK=32, CHUNK=CHUNK,
    )  # fmt: skip
    torch.cumsum(segments[0], 0, dtype=torch.int32, out=segments[1])
    row_blocks = triton.cdiv(tokens, block)
    plan_rows_kernel[(row_blocks + triton.cdiv(len(chunks), block),)](
        ids, cu_seqlens, member, segments, rows, chunks,
        sequences, tokens, len(chunks), row_blocks,
        sequences.bit_length(), (sequences * (1 + partitions)).bit_length(),
        K=k, N=partitions, BLOCK=block, CHUNK=CHUNK,
    )  # fmt: skip
    return rows, segments, chunks


@routing_plan.register_fake
def _(ids: Tensor, cu_seqlens: Tensor, partitions: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_plan(ids, cu_seqlens, partitions)


def _empty_plan(ids: Tensor, cu_seqlens: Tensor, partitions: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k = ids.shape
    sequences = cu_seqlens.shape[0] - 1
    chunks = max_chunks(tokens, k, sequences, partitions)
    return (
        ids.new_empty(chunks, CHUNK, dtype=torch.int32),
        ids.new_empty(2, sequences * (1 + partitions), dtype=torch.int32),
        ids.new_empty(chunks, dtype=torch.int32),
    )


@triton.jit(do_not_specialize=["tokens"])
def plan_member_kernel(
    ids, member, tokens, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr
):
    """member[n, t] = 1 if token t chose partition n."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, NP)[:, None]
    chosen = tl.zeros([NP, BLOCK], tl.int32)
    for j in range(K):
        choice = tl.load(ids + t.to(tl.int64) * K + j, mask=t < tokens, other=0).to(tl.int32)
        chosen |= (n == tl.minimum(tl.maximum(choice, 0), N - 1)[None, :]).to(tl.int32)
    tl.store(member + n * tokens + t[None, :], chosen, mask=(n < N) & (t < tokens)[None, :])


@triton.jit
def _members_before(member, n, t, tokens, mask):
    """How many members come before (n, t) in (partition, token) order."""
    flat = n * tokens + t
    return tl.load(member + flat - 1, mask=mask & (flat > 0), other=0)


@triton.jit
def _load_bound(cu_seqlens, b, tokens, mask):
    bound = tl.load(cu_seqlens + b, mask=mask, other=0).to(tl.int32)
    return tl.minimum(tl.maximum(bound, 0), tokens)


@triton.jit(do_not_specialize=["sequences", "tokens"])
def plan_segments_kernel(
    cu_seqlens, member, segments, sequences, tokens,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The number of chunks of every segment."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < sequences
    start = _load_bound(cu_seqlens, b, tokens, inside)
    end = tl.maximum(_load_bound(cu_seqlens, b + 1, tokens, inside), start)
    tl.store(segments + b, (end - start + CHUNK - 1) // CHUNK, mask=inside)

    n = tl.arange(0, NP)[None, :]
    mask = inside[:, None] & (n < N)
    count = _members_before(member, n, end[:, None], tokens, mask) - _members_before(
        member, n, start[:, None], tokens, mask
    )
    s = (1 + n) * sequences + b[:, None]
    tl.store(segments + s, (count + CHUNK - 1) // CHUNK, mask=mask)


@triton.jit
def upper_bound(sorted_values, x, size, steps):
    """Index of the first of `size` rising values above x."""
    low = tl.zeros_like(x)
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        above = tl.load(sorted_values + middle, mask=open_, other=0) > x
        high = tl.where(open_ & above, middle, high)
        low = tl.where(open_ & ~above, middle + 1, low)
    return low


@triton.jit(
    do_not_specialize=[
        "sequences",
        "tokens",
        "chunk_count",
        "row_blocks",
        "sequence_steps",
        "segment_steps",
    ]
)
def plan_rows_kernel(
    ids, cu_seqlens, member, segments, rows, chunks,
    sequences, tokens, chunk_count, row_blocks, sequence_steps, segment_steps,
    K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first programs place every token in its segments; the rest name each chunk's segment."""
    pid = tl.program_id(0)
    total = sequences * (1 + N)
    if pid < row_blocks:
        t = pid * BLOCK + tl.arange(0, BLOCK)
        inside = t < tokens
        b = tl.minimum(upper_bound(cu_seqlens + 1, t, sequences, sequence_steps), sequences - 1)
        start = _load_bound(cu_seqlens, b, tokens, inside)
        _place(rows, segments, b, t - start, t, total, chunk_count, inside, CHUNK)
        for j in range(K):
            n = tl.load(ids + t.to(tl.int64) * K + j, mask=inside, other=0).to(tl.int32)
            n = tl.minimum(tl.maximum(n, 0), N - 1)
            rank = _members_before(member, n, t, tokens, inside) - _members_before(
                member, n, start, tokens, inside
            )
            segment = (1 + n) * sequences + b
            row = (1 + j) * tokens + t
            _place(rows, segments, segment, rank, row, total, chunk_count, inside, CHUNK)
    else:
        m = (pid - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        s = upper_bound(segments + total, m, total, segment_steps)
        tl.store(chunks + m, tl.where(s < total, s, -1), mask=m < chunk_count)


@triton.jit
def _place(rows, segments, segment, rank, row, total, chunk_count, mask, CHUNK: tl.constexpr):
    last = tl.load(segments + total + segment, mask=mask, other=0)
    first = last - tl.load(segments + segment, mask=mask, other=0)
    place = first.to(tl.int64) * CHUNK + rank
    tl.store(rows + place, row, mask=mask & (place >= 0) & (place < chunk_count * CHUNK))
