"""SSE-GDN forward: a program sweeps one segment's chunks with its state on the chip.

With A, P of triton_prepare and h the state before a chunk:
    e = v - e^G (K h)        x = e - P (beta e)        u = beta x
    o = e^G (Q h) + A u      h <- e^G_C h + (e^(G_C - G) K)^T u
Every stream writes its own outputs, the shared one in fp32, which the caller sums in fixed order.
For the backward pass the same sweep stores x and h instead.
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
from ..gla.triton_shapes import GlaShapes, dot_precision
from ..gla.triton_tiles import load_rows, load_segment
from .triton_prepare import Prepared, prepare


def gdn_forward(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    final_state: Tensor | None,
    shapes: GlaShapes,
    *,
    gate_after_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Reads of the shared state, [T, Hv, Dv] fp32, and of K partitions, [K, T, Hv, Dv].

    Writes `final_state` if given. tokens: q1 k1 q2 k2 v g1 beta1 g2 beta2, contiguous.
    """
    v = tokens[4]
    prepared = prepare(tokens, weights, plan, shapes, gate_after_norm=gate_after_norm)
    shared = torch.empty_like(v, dtype=torch.float32)
    sparse = v.new_empty(shapes.k, *v.shape)
    out = (shared, sparse, final_state, None, None)
    _sweep("gdn_fwd", tokens, plan, prepared, initial_state, out, shapes)
    return shared, sparse


def rebuild_states(
    tokens: tuple[Tensor, ...],
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    initial_state: Tensor | None,
    shapes: GlaShapes,
) -> tuple[Tensor, Tensor]:
    """h before every chunk [M, Hv, Dk, Dv] and x [M, Hv, C, Dv]."""
    m, heads = prepared.scores.shape[:2]
    states = prepared.scores.new_empty(m, heads, shapes.dk, shapes.dv)
    errors = prepared.scores.new_empty(m, heads, shapes.chunk, shapes.dv)
    out = (None, None, None, states, errors)
    _sweep("gdn_states", tokens, plan, prepared, initial_state, out, shapes)
    return states, errors


def _sweep(
    name: str,
    tokens: tuple[Tensor, ...],
    plan: tuple[Tensor, Tensor, Tensor],
    prepared: Prepared,
    initial_state: Tensor | None,
    out: tuple[Tensor | None, ...],
    shapes: GlaShapes,
) -> None:
    rows, segments, chunks = plan
    v = tokens[4]
    blocks = block_sizes(name, v, shapes.width)
    block_v = min(blocks.v, triton.next_power_of_2(shapes.dv))
    blocks_v = triton.cdiv(shapes.dv, block_v)
    gdn_sweep_kernel[(blocks_v * shapes.hv * shapes.segments,)](
        *tokens[:5], *prepared, rows, segments, initial_state, *out,
        shapes.tokens, shapes.sequences, len(chunks),
        H=shapes.h, HV=shapes.hv, DK=shapes.dk, DV=shapes.dv, N=shapes.n,
        C=shapes.chunk, BV=block_v, PRECISION=dot_precision(v),
        **blocks.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "M"])
def gdn_sweep_kernel(
    q1, k1, q2, k2, v, scores, solved, factors, decays, rows, segments, initial_state,
    shared, sparse, final_state, states, errors,
    T, B, M,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % HV
    i_s = tl.program_id(0) // (NV * HV)
    chunk, chunk_count = load_segment(segments, i_s, B, M, N)
    q, k = q1, k1
    if i_s >= B:
        q, k = q2, k2

    i_c, i_k, i_vd = tl.arange(0, C), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    v_mask = (i_vd < DV)[None, :]
    state_at = ((i_s % B * (1 + N) + i_s // B).to(tl.int64) * HV + i_h) * DK * DV
    state_tile = state_at + i_k[:, None] + i_vd[None, :] * DK
    h = tl.zeros([DK, BV], tl.float32)
    if initial_state is not None:
        h += tl.load(initial_state + state_tile, mask=v_mask, other=0.0).to(tl.float32)
    dtype = scores.dtype.element_ty
    for c in range(0, chunk_count):
        head = (chunk + c).to(tl.int64) * HV + i_h
        square = head * C * C + i_c[:, None] * C + i_c[None, :]
        mask, token, row = load_rows(rows, chunk + c, T, C)
        qk_at = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
        b_k = tl.load(k + qk_at, mask=mask[:, None], other=0.0).to(dtype)
        v_mask_c = mask[:, None] & v_mask
        v_at = v + ((token * HV + i_h) * DV)[:, None] + i_vd[None, :]
        b_v = tl.load(v_at, mask=v_mask_c, other=0.0).to(tl.float32)
        b_p = tl.load(solved + square)
        at = factors + head * 10 * C + i_c
        b_beta = tl.load(at + 3 * C)[:, None]
        b_h = h.to(dtype)
        e = b_v - tl.load(at + C)[:, None] * tl.dot(b_k, b_h, input_precision=PRECISION)
        x = e - tl.dot(b_p, (b_beta * e).to(dtype), input_precision=PRECISION)
        u = b_beta * x
        if states is not None:
            state_c = states + head * DK * DV + i_k[:, None] * DV + i_vd[None, :]
            tl.store(state_c, b_h, mask=v_mask)
            error_c = errors + head * C * DV + i_c[:, None] * DV + i_vd[None, :]
            tl.store(error_c, x.to(dtype), mask=v_mask)
        else:
            b_q = tl.load(q + qk_at, mask=mask[:, None], other=0.0).to(dtype)
            b_a = tl.load(scores + square)
            o = tl.load(at)[:, None] * tl.dot(b_q, b_h, input_precision=PRECISION)
            o = tl.dot(b_a, u.to(dtype), o, input_precision=PRECISION)
            # Two masked stores: a branch here keeps triton 3.6 from pipelining the loop.
            o_tile = ((row * HV + i_h) * DV)[:, None] + i_vd[None, :]
            tl.store(shared + o_tile, o, mask=v_mask_c & (row < T)[:, None])
            o_tile = (((row - T) * HV + i_h) * DV)[:, None] + i_vd[None, :]
            o_mask = v_mask_c & (row >= T)[:, None]
            tl.store(sparse + o_tile, o.to(sparse.dtype.element_ty), mask=o_mask)
        u = (u * tl.load(at + 2 * C)[:, None]).to(dtype)
        h = tl.dot(tl.trans(b_k), u, h * tl.load(decays + head), input_precision=PRECISION)
    if final_state is not None:
        tl.store(final_state + state_tile, h, mask=v_mask)
