"""The K largest router logits of every token, in one launch and without a sort."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("sse_kernels::top_partitions", mutates_args=())
def top_partitions(logits: Tensor, k: int) -> Tensor:
    """ids [T, K] int64, ascending in each row; ties go to the lowest index. logits [T, N]."""
    tokens, partitions = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    if tokens:
        n_pow2 = triton.next_power_of_2(partitions)
        block = max(4096 // n_pow2, 1)
        top_partitions_kernel[(triton.cdiv(tokens, block),)](
            logits.contiguous(), ids, tokens, K=k, N=partitions, NP=n_pow2, BLOCK=block
        )
    return ids


@top_partitions.register_fake
def _(logits: Tensor, k: int) -> Tensor:
    return logits.new_empty(logits.shape[0], k, dtype=torch.int64)


@triton.jit(do_not_specialize=["T"])
def top_partitions_kernel(
    logits, ids, T, K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, NP)[None, :]
    inside = (t < T) & (n < N)
    x = tl.load(logits + t * N + n, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    chosen = tl.zeros([BLOCK, NP], tl.int32)
    for _ in range(K):
        open_ = (n < N) & (chosen == 0)
        largest = tl.max(tl.where(open_, x, float("-inf")), axis=1)[:, None]
        first = tl.min(tl.where(open_ & (x == largest), n, NP), axis=1)[:, None]
        chosen += (n == first).to(tl.int32)
    place = tl.cumsum(chosen, axis=1) - 1
    n = tl.zeros([BLOCK, NP], tl.int32) + n
    tl.store(ids + t * K + place, n.to(tl.int64), mask=inside & (chosen > 0))
