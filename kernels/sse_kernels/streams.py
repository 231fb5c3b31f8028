"""The 1 + K streams of a token: the shared one first, then its partitions in ascending order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import compute_dtype
from .routing import Routing


def touched(ids: Tensor) -> Tensor:
    """Indices [B, 1+K] into the state's partition axis: 0 is shared, 1 + n is partition n."""
    ids = ids.long()  # as bytes, 255 + 1 would be the shared state, and an index a mask
    return torch.cat([ids.new_zeros(len(ids), 1), ids + 1], dim=1)


def per_pair(x: Tensor, k: int) -> Tensor:
    """Rows [T, ...] once for each of their K partitions, [T * K, ...]."""
    return x[:, None].expand(-1, k, *x.shape[1:]).flatten(0, 1)


def state_rows(state: Tensor, slots: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A view of contiguous states [S, 1+N, ...] as rows, and the rows [B, 1+K] of these tokens."""
    return state.view(-1, *state.shape[2:]), slots[:, None] * state.shape[1] + touched(ids)


def stack_streams(shared: Tensor, sparse: Tensor, group: int = 1) -> Tensor:
    """[B, H, ...] and [B, K, H, ...] as [B, 1+K, H * group, ...], each head repeated in place."""
    x = torch.cat([shared[:, None], sparse], dim=1)
    return x if group == 1 else x.repeat_interleave(group, dim=2)


def sum_streams(o: Tensor) -> Tensor:
    """Sum [B, 1+K, Hv, Dv] over its streams, always in the same order."""
    total = o[:, 0]
    for slot in range(1, o.shape[1]):
        total = total + o[:, slot]
    return total


def split_state(state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """[B, 1+N, Hv, Dv, Dk] as the states of B shared and of B * N sparse streams."""
    if state is None:
        return None, None
    state = state.to(dtype)
    return state[:, 0], state[:, 1:].flatten(0, 1)


def join_streams(
    shared: Tensor,
    sparse: Tensor,
    shared_state: Tensor | None,
    sparse_state: Tensor | None,
    v: Tensor,
    routing: Routing,
) -> tuple[Tensor, Tensor | None]:
    """Sum outputs [T, ..] and [T * K, ..] in v's shape and dtype; join what `split_state` split."""
    tokens, k = routing.ids.shape
    pairs = sparse.view(tokens, k, *v.shape[1:])
    o = sum_streams(stack_streams(shared.view(v.shape), pairs)).to(v.dtype)
    if shared_state is None or sparse_state is None:
        return o, None
    pairs = sparse_state.unflatten(0, (-1, routing.probs.shape[1]))
    return o, torch.cat([shared_state[:, None], pairs], dim=1)


def scan_tokens(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    v: Tensor,
    routing: Routing,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run `step(states [B', 1+K, Hv, Dv, Dk], rows [B']) -> (states, o)` along all sequences."""
    state_shape = (len(cu_seqlens) - 1, 1 + routing.probs.shape[1], *v.shape[1:], q.shape[2])
    if initial_state is None:
        state = v.new_zeros(state_shape, dtype=compute_dtype(q))
    else:
        state = initial_state.to(compute_dtype(q))
    lengths, streams = cu_seqlens.diff(), touched(routing.ids)
    order, outputs = [cu_seqlens[:0]], [state.new_zeros(0, *v.shape[1:])]
    for t in range(int(lengths.max())):
        active = (lengths > t).nonzero()[:, 0]
        rows = cu_seqlens[active] + t
        index = active[:, None], streams[rows]
        new, o = step(state[index], rows)
        state = state.index_put(index, new)
        order.append(rows)
        outputs.append(o)
    o = torch.cat(outputs)[torch.cat(order).argsort()]
    return o.to(v.dtype), state if output_final_state else None
