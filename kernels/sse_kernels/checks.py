"""Checks of public functions' arguments: errors name the argument, what was expected, what came.

What depends on the values in a tensor is checked on CPU only: a GPU would have to be waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .routing import Routing

MAX_HEAD_DIM = 256


def expect(holds: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{op}: {name} must be {expected}, got {got}")


def expect_count(op: str, name: str, x: object, most: int, of: str) -> None:
    """Raise ValueError unless `x` is an integer from 1 to `most`, which is called `of`."""
    holds = isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most
    expect(holds, op, name, f"an integer from 1 to {of} = {most}", x)


def expect_float(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a tensor of floats."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {x.dtype}")


def expect_tensor(
    op: str, name: str, x: Tensor, axes: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless `x` holds floats of this shape on this device."""
    expect_float(op, name, x)
    expect(tuple(x.shape) == shape, op, name, f"{axes} = {list(shape)}", list(x.shape))
    expect(x.device == device, op, name, f"on {device}", x.device)


def expect_ids(
    op: str, ids: Tensor, shape: tuple[int, int], partitions: int, device: torch.device
) -> None:
    """Raise unless `ids` [T, K] are distinct partitions in 0..N-1."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: ids must have an integer dtype, got {ids.dtype}")
    expect(tuple(ids.shape) == shape, op, "ids", f"[T, K] = {list(shape)}", list(ids.shape))
    expect(ids.device == device, op, "ids", f"on {device}", ids.device)
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    expect(low >= 0 and high < partitions, op, "ids", f"in 0..{partitions - 1}", f"{low}..{high}")
    if shape[1] > 1:
        ordered = ids.sort(dim=-1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        if repeated.any():
            row = int(repeated.nonzero()[0])
            expect(False, op, "ids", "distinct in each row", f"{ids[row].tolist()} in row {row}")


def expect_cu_seqlens(op: str, cu_seqlens: Tensor, tokens: int, device: torch.device) -> None:
    """Raise unless `cu_seqlens` [B + 1] rises from 0 to T (equal neighbours: an empty sequence)."""
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: cu_seqlens must be int64, got {cu_seqlens.dtype}")
    expect(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2,
        op,
        "cu_seqlens",
        "shape [B + 1] with B >= 1",
        list(cu_seqlens.shape),
    )
    expect(cu_seqlens.device == device, op, "cu_seqlens", f"on {device}", cu_seqlens.device)
    if cu_seqlens.device.type != "cpu":
        return
    ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
    expect(
        ends == (0, tokens), op, "cu_seqlens", f"from 0 to T = {tokens}", f"{ends[0]}..{ends[1]}"
    )
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        i = int(falls.nonzero()[0])
        pair = cu_seqlens[i : i + 2].tolist()
        expect(False, op, "cu_seqlens", "non-decreasing", f"{pair} at index {i}")


def expect_streams(
    op: str,
    q: dict[str, Tensor],
    v: Tensor,
    per_head: dict[str, Tensor],
    routing: Routing | None = None,
) -> None:
    """Raise unless the token tensors of both streams and the routing, if any, fit together.

    q: tensors [T, H, Dk], the first of which sets T, H and Dk; per_head: tensors [T, Hv]. Queries,
    keys and values are all fp64 or none is, for that decides what is computed in.
    """
    name, first = next(iter(q.items()))
    expect_float(op, name, first)
    expect(first.dim() == 3, op, name, "shape [T, H, Dk]", list(first.shape))
    tokens, heads, dk = first.shape
    for name, x in q.items():
        expect_tensor(op, name, x, "[T, H, Dk]", (tokens, heads, dk), first.device)
    expect_float(op, "v", v)
    expect(v.dim() == 3, op, "v", "shape [T, Hv, Dv]", list(v.shape))
    double = first.dtype == torch.float64
    for name, x in (*q.items(), ("v", v)):
        if not name.startswith("g"):  # decays may be fp32 whatever they belong to
            same = (x.dtype == torch.float64) == double
            expect(same, op, name, f"{first.dtype} as {next(iter(q))}", x.dtype)
    value_heads, dv = v.shape[1:]
    expect_tensor(op, "v", v, "[T, Hv, Dv]", (tokens, value_heads, dv), first.device)
    expect(heads >= 1 and dk >= 1 and dv >= 1, op, "H, Dk, Dv", ">= 1", [heads, dk, dv])
    expect(dk <= MAX_HEAD_DIM, op, "Dk", f"<= {MAX_HEAD_DIM}", dk)
    expect(
        value_heads >= 1 and value_heads % heads == 0,
        op,
        "Hv (heads of v)",
        f"a multiple of H = {heads}",
        value_heads,
    )
    for name, x in per_head.items():
        expect_tensor(op, name, x, "[T, Hv]", (tokens, value_heads), first.device)
    if routing is not None:
        _expect_routing(op, routing, tokens, first.device)


def expect_initial_state(
    op: str, state: Tensor | None, shape: tuple[int, ...], like: Tensor
) -> None:
    """Raise unless `initial_state` is absent or has the shape [B, 1+N, Hv, Dv, Dk]."""
    if state is not None:
        expect_tensor(op, "initial_state", state, "[B, 1+N, Hv, Dv, Dk]", shape, like.device)


def expect_slots(op: str, state: Tensor, slots: Tensor, row: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `state` is [S, *row] and `slots` [B] point into it."""
    expect_float(op, "state", state)
    expect(tuple(state.shape[1:]) == row, op, "state", f"[S, *{list(row)}]", list(state.shape))
    expect(state.is_contiguous(), op, "state", "contiguous", f"strides {list(state.stride())}")
    expect(state.device == like.device, op, "state", f"on {like.device}", state.device)
    if slots.dtype != torch.int64:
        raise TypeError(f"{op}: slots must be int64, got {slots.dtype}")
    shape = (like.shape[0],)
    expect(tuple(slots.shape) == shape, op, "slots", f"[B] = {list(shape)}", list(slots.shape))
    expect(slots.device == like.device, op, "slots", f"on {like.device}", slots.device)
    if slots.device.type == "cpu" and slots.numel():
        low, high = int(slots.min()), int(slots.max())
        expect(
            low >= 0 and high < len(state), op, "slots", f"in 0..{len(state) - 1}", f"{low}..{high}"
        )


def _expect_routing(op: str, routing: Routing, tokens: int, device: torch.device) -> None:
    expect_float(op, "routing.probs", routing.probs)
    expect(routing.probs.dim() == 2, op, "routing.probs", "shape [T, N]", list(routing.probs.shape))
    partitions = routing.probs.shape[1]
    expect(
        routing.ids.dim() == 2 and 1 <= routing.ids.shape[1] <= partitions,
        op,
        "routing.ids",
        f"[T, K] with 1 <= K <= N = {partitions}",
        list(routing.ids.shape),
    )
    shape = (tokens, routing.ids.shape[1])
    expect_ids(op, routing.ids, shape, partitions, device)
    expect_tensor(op, "routing.weights", routing.weights, "[T, K]", shape, device)
