"""SSE-GLA forward: a program sweeps one segment's chunks with its state on the chip.

With q' and k' of triton_prepare, G_C a chunk's summed decay and h the state before it:
    o = q' (e^r_q h) + tril(q' k'^T) v          h <- e^G_C h + e^(G_C - r_k) k'^T v
Every stream writes its own outputs, the shared one in fp32, which the caller sums in fixed order.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sizes import block_sizes
from .triton_activate import silu_slope, silu_values
from .triton_prepare import prepare
from .triton_shapes import GlaShapes, dot_precision
from .triton_steep import add_steep_outputs
from .triton_tiles import load_rows, load_segment


def gla_forward(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    final_state: Tensor | None,
    shapes: GlaShapes,
) -> tuple[Tensor, Tensor]:
    """Reads of the shared state, [T, Hv, Dv] fp32, and of K partitions, [K, T, Hv, Dv].

    Writes `final_state` if given. tokens: q1 k1 q2 k2 v g1 g2, contiguous.
    """
    v = silu_values(tokens[4]) if shapes.raw else tokens[4]
    rows, segments, chunks = plan
    prepared = prepare(tokens, weights, plan, shapes)
    shared = torch.empty_like(v, dtype=torch.float32)
    sparse = v.new_empty(shapes.k, *v.shape)
    blocks = block_sizes("gla_fwd", v, shapes.width)
    block_v = min(blocks.v, triton.next_power_of_2(shapes.dv))
    blocks_v = triton.cdiv(shapes.dv, block_v)
    gla_fwd_kernel[(blocks_v * shapes.hv * shapes.segments,)](
        *prepared[:4], v, rows, segments, initial_state, shared, sparse, final_state,
        shapes.tokens, shapes.sequences, len(chunks),
        H=shapes.h, HV=shapes.hv, DK=shapes.dk, DV=shapes.dv, N=shapes.n,
        C=shapes.chunk, BV=block_v, PRECISION=dot_precision(v),
        **blocks.options,
    )  # fmt: skip
    add_steep_outputs(tokens, weights, plan, prepared, shared, sparse, shapes)
    return shared, sparse


def sum_slots(
    slots: Tensor,
    dtype: torch.dtype,
    *,
    group: int = 1,
    base: Tensor | None = None,
    silu_of: Tensor | None = None,
) -> Tensor:
    """[S, T, H * group, D] summed over `base`, the S slots and each group of heads, in this order.

    base: [T, H, D] fp32. silu_of: the sum is a gradient of silu at this [T, H, D], becomes that of
    its argument. A single slot of this dtype is overwritten with the sum and returned.
    """
    count, tokens, heads, width = slots.shape
    if count == 1 and group == 1 and base is None and silu_of is None:
        return slots[0].to(dtype)
    if count == 1 and group == 1 and slots.dtype == dtype:
        out = slots[0]
    else:
        out = slots.new_empty(tokens, heads // group, width, dtype=dtype)
    if out.numel():
        sum_slots_kernel[(triton.cdiv(out.numel(), 2048),)](
            slots, base, silu_of, out, tokens,
            S=count, GROUP=group, D=width, ROW=heads * width, BLOCK=2048,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T", "B", "M"])
def gla_fwd_kernel(
    q, k, scales, steep, v, rows, segments, initial_state, shared, sparse, final_state,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_s = tl.program_id(0) // (NV * HV)
    chunk, chunk_count = load_segment(segments, i_s, B, M, N)

    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    v_mask = (i_vd < DV)[None, :]
    state_at = ((i_s % B * (1 + N) + i_s // B).to(tl.int64) * HV + i_h) * DK * DV
    state_tile = state_at + i_k[:, None] + i_vd[None, :] * DK
    h = tl.zeros([DK, BV], tl.float32)
    if initial_state is not None:
        h += tl.load(initial_state + state_tile, mask=v_mask, other=0.0).to(tl.float32)
    dtype = q.dtype.element_ty
    for c in range(0, chunk_count):
        head = (chunk + c).to(tl.int64) * H + i_h // (HV // H)
        tile = head * C * DK + i_c[:, None] * DK + i_k[None, :]
        b_q = tl.load(q + tile)
        b_k = tl.load(k + tile)
        b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        flat = tl.load(steep + head) == 0
        b_a = tl.where((i_c[:, None] >= i_c[None, :]) & flat, b_a, 0.0).to(dtype)
        mask, token, row = load_rows(rows, chunk + c, T, C)
        v_at = v + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
        b_v = tl.load(v_at, mask=mask[:, None] & v_mask, other=0.0).to(dtype)
        scales_at = scales + head * 3 * DK + i_k
        h *= tl.load(scales_at)[:, None]
        o = tl.dot(b_q, h.to(dtype), input_precision=PRECISION)
        o = tl.dot(b_a, b_v, o, input_precision=PRECISION)
        h *= tl.load(scales_at + DK)[:, None]
        h = tl.dot(tl.trans(b_k), b_v, h, input_precision=PRECISION)
        h *= tl.load(scales_at + 2 * DK)[:, None]
        o_tile = ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
        # No branch on the kind of stream: it would end the pipelining of the loop's loads.
        tl.store(shared + o_tile, o, mask=(mask & (row < T))[:, None] & v_mask)
        o_tile = (((row - T) * HV + i_h) * DV)[:, None] + i_vd[None, :]
        o = o.to(sparse.dtype.element_ty)
        tl.store(sparse + o_tile, o, mask=(mask & (row >= T))[:, None] & v_mask)
    if final_state is not None:
        tl.store(final_state + state_tile, h, mask=v_mask)


@triton.jit(do_not_specialize=["tokens"])
def sum_slots_kernel(
    slots, base, silu_of, out, tokens,
    S: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # From the row's width triton knows how the sizes are aligned.
    slot_size = tokens.to(tl.int64) * ROW
    mask = i < tokens.to(tl.int64) * (ROW // GROUP)
    source = i
    if GROUP > 1:
        source = i // D * (GROUP * D) + i % D
    total = tl.zeros([BLOCK], tl.float32)
    if base is not None:
        total += tl.load(base + i, mask=mask, other=0.0)
    for s in tl.static_range(S):
        for j in tl.static_range(GROUP):
            slot = slots + s * slot_size
            x = tl.load(slot + source + j * D, mask=mask, other=0.0)
            total += x.to(tl.float32)
    if silu_of is not None:
        total *= silu_slope(tl.load(silu_of + i, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)
