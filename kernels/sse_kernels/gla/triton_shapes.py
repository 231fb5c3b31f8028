"""Sizes of one SSE-GLA call, and what the Triton form can serve."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..routing_plan import CHUNK


class GlaShapes(NamedTuple):
    """What every launcher needs to know of a call."""

    tokens: int
    sequences: int
    h: int
    hv: int
    dk: int
    dv: int
    k: int
    n: int
    raw: bool = False
    """Tokens are projections, activated as they are read; else activated already."""
    row_topk: int = 0
    """How many rows of the state a raw key keeps; 0: all."""
    chunk: int = CHUNK

    @property
    def segments(self) -> int:
        """Sequences times streams."""
        return self.sequences * (1 + self.n)

    @property
    def width(self) -> int:
        """The head width by which block sizes are chosen: Dk, or the narrower if it is under 64."""
        narrow = min(self.dk, triton.next_power_of_2(self.dv))
        return self.dk if narrow >= 64 else narrow


def gla_shapes(
    q: Tensor,
    v: Tensor,
    weights: Tensor,
    segments: Tensor,
    n: int,
    *,
    raw: bool = False,
    row_topk: int = 0,
) -> GlaShapes:
    """Sizes of q [T, H, Dk], v [T, Hv, Dv], weights [T, K] and a plan's segments."""
    return GlaShapes(
        tokens=v.shape[0],
        sequences=segments.shape[1] // (1 + n),
        h=q.shape[1],
        hv=v.shape[1],
        dk=q.shape[2],
        dv=v.shape[2],
        k=weights.shape[1],
        n=n,
        raw=raw,
        row_topk=row_topk if row_topk < q.shape[2] else 0,
    )


def empty_final(v: Tensor, segments: Tensor, dk: int, partitions: int, wanted: bool) -> Tensor:
    """fp32 [B, 1+N, Hv, Dv, Dk] for the final states of v [T, Hv, Dv], or nothing if not wanted."""
    if not wanted:
        return v.new_empty(0, dtype=torch.float32)
    streams = 1 + partitions
    shape = segments.shape[1] // streams, streams, v.shape[1], v.shape[2], dk
    return v.new_empty(shape, dtype=torch.float32)


def dot_precision(x: Tensor) -> str:
    """fp32 operands multiply as three tf32 products, which keeps fp32's error; others are exact."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def triton_serves(dk: int, dv: int, dtype: torch.dtype) -> bool:
    """Whether the Triton form has kernels for these head widths."""
    return (
        dk in (16, 32, 64, 128, 256)
        and 16 <= dv <= 256
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
