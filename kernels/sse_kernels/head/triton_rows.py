"""The two passes over a block of logits, one program a row: see `torch_rows` for what they do."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .torch_rows import Rows

WARPS = 8


def reduce(z: Tensor, targets: Tensor, temperature: float, stats: Tensor, chosen: Tensor) -> None:
    """`torch_rows.reduce` of fp32 logits."""
    rows, width = z.shape
    head_reduce_kernel[(rows,)](
        z, targets, stats, chosen, 1 / temperature, rows, width,
        BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip


def differentiate(
    z: Tensor, targets: Tensor, temperature: float, per_row: tuple[Tensor, ...], out: Tensor
) -> None:
    """`torch_rows.differentiate` of fp32 logits."""
    rows, width = z.shape
    head_differentiate_kernel[(rows,)](
        z, targets, *per_row, out, 1 / temperature, width,
        BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip


TRITON = Rows(reduce, differentiate)


@triton.jit(do_not_specialize=["T"])
def head_reduce_kernel(
    z, targets, stats, chosen, inverse_temperature, T, COLUMNS, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    target = tl.load(targets + row)
    x = tl.load(z + row * COLUMNS + column, mask=inside, other=float("-inf")) * inverse_temperature
    top = tl.max(x, axis=0)
    shifted = tl.where(inside, x - top, 0.0)
    e = tl.where(inside, tl.exp(shifted), 0.0)
    tl.store(stats + row, top)
    tl.store(stats + T + row, tl.sum(e, axis=0))
    tl.store(stats + 2 * T + row, tl.sum(e * shifted, axis=0))
    logit = tl.sum(tl.where(column == target, x, 0.0), axis=0)
    tl.store(chosen + row, logit, mask=(target >= 0) & (target < COLUMNS))


@triton.jit
def head_differentiate_kernel(
    z, targets, lse, entropy, dlogprob, dentropy, out, inverse_temperature, COLUMNS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    target = tl.load(targets + row)
    d = tl.load(dlogprob + row)
    x = tl.load(z + row * COLUMNS + column, mask=inside, other=0.0) * inverse_temperature
    logp = x - tl.load(lse + row)
    weight = d + tl.load(dentropy + row) * (logp + tl.load(entropy + row))
    gradient = tl.where(column == target, d, 0.0) - tl.exp(logp) * weight
    gradient *= inverse_temperature
    tl.store(out + row * COLUMNS + column, gradient.to(out.dtype.element_ty), mask=inside)
