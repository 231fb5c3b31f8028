"""What every chunk of SSE-GDN does alone: lengths, decays, scores and the solved delta rule.

With Q = a q and K = b k the rows of unit length, a with the scale, G the decays summed inside a
chunk and D_ij = e^(G_i - G_j) for j <= i:
    A = D * (Q K^T)        N = D * (K K^T), strictly lower        P = (I + N beta)^-1 N
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

from ..block_sizes import block_sizes
from ..gla.triton_shapes import GlaShapes, dot_precision
from ..gla.triton_tiles import load_rows, load_weights
from .gate import NORM_EPS
from .triton_inverse import unit_lower_inverse
from .triton_tiles import summed_decays, unit_factor

FACTORS = 10


class Prepared(NamedTuple):
    """Tiles of every chunk m and value head h."""

    scores: Tensor
    """[M, Hv, C, C] A, bf16 (fp32 for fp32 inputs)."""
    solved: Tensor
    """[M, Hv, C, C] P."""
    factors: Tensor
    """[M, Hv, 10, C] fp32: a e^G, b e^G, b e^(G_C - G), beta, a, b, the two parts of G, and what
    the norms of q and k take back (`unit_factor`)."""
    decays: Tensor
    """[M, Hv] fp32: e^G_C."""


def prepare(
    tokens: tuple[Tensor, ...],
    weights: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    shapes: GlaShapes,
    *,
    gate_after_norm: bool,
) -> Prepared:
    """tokens: q1, k1, q2, k2, v, g1, beta1, g2, beta2, contiguous."""
    q1, k1, q2, k2, _, g1, beta1, g2, beta2 = tokens
    rows, _, chunks = plan
    m, hv, c, dk = len(chunks), shapes.hv, shapes.chunk, shapes.dk
    dtype = torch.float32 if q1.dtype == torch.float32 else torch.bfloat16
    out = Prepared(
        q1.new_empty(m, hv, c, c, dtype=dtype),
        q1.new_empty(m, hv, c, c, dtype=dtype),
        q1.new_empty(m, hv, FACTORS, c, dtype=torch.float32),
        q1.new_empty(m, hv, dtype=torch.float32),
    )
    blocks = block_sizes("gdn_prepare", q1, shapes.width)
    gdn_prepare_kernel[(m * hv,)](
        q1, k1, q2, k2, g1, beta1, g2, beta2, weights, rows, chunks, *out,
        shapes.tokens, shapes.sequences,
        H=shapes.h, HV=hv, DK=dk, K=shapes.k, C=c, BK=min(blocks.k, dk), SCALE=dk**-0.5,
        EPS=NORM_EPS, GATE_LAST=gate_after_norm, PRECISION=dot_precision(q1),
        **blocks.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T", "B"])
def gdn_prepare_kernel(
    q1, k1, q2, k2, g1, beta1, g2, beta2, weights, rows, chunks, scores, solved, factors, decays,
    T, B,
    H: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, GATE_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(0) % HV, tl.program_id(0) // HV
    i_s = tl.load(chunks + i_m)
    if i_s < 0:
        return
    q, k, g, beta = q1, k1, g1, beta1
    if i_s >= B:
        q, k, g, beta = q2, k2, g2, beta2
    mask, token, row = load_rows(rows, i_m, T, C)
    weight, _, _ = load_weights(weights, token, row, mask, T, K)
    i_c, i_k = tl.arange(0, C), tl.arange(0, BK)
    tile = ((token * H + i_h // (HV // H)) * DK)[:, None] + i_k[None, :]
    dtype = scores.dtype.element_ty
    q_squares = tl.zeros([C], tl.float32)
    k_squares = tl.zeros([C], tl.float32)
    a = tl.zeros([C, C], tl.float32)
    n = tl.zeros([C, C], tl.float32)
    for block in tl.static_range(DK // BK):
        b_q = tl.load(q + tile + block * BK, mask=mask[:, None], other=0.0).to(dtype)
        b_k = tl.load(k + tile + block * BK, mask=mask[:, None], other=0.0).to(dtype)
        q_squares += tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), axis=1)
        k_squares += tl.sum(b_k.to(tl.float32) * b_k.to(tl.float32), axis=1)
        a = tl.dot(b_q, tl.trans(b_k), a, input_precision=PRECISION)
        n = tl.dot(b_k, tl.trans(b_k), n, input_precision=PRECISION)
    q_factor, q_back = unit_factor(q_squares, weight, EPS, GATE_LAST)
    k_factor, k_back = unit_factor(k_squares, weight, EPS, GATE_LAST)
    q_factor *= SCALE
    b_beta = tl.load(beta + token * HV + i_h, mask=mask, other=0.0).to(tl.float32)
    coarse, fine, coarse_end, fine_end = summed_decays(g, token * HV + i_h, mask)

    head = tl.program_id(0).to(tl.int64)
    down = tl.exp(coarse + fine)
    at = factors + head * 10 * C + i_c
    tl.store(at, q_factor * down)
    tl.store(at + C, k_factor * down)
    tl.store(at + 2 * C, k_factor * tl.exp((coarse_end - coarse) + (fine_end - fine)))
    tl.store(at + 3 * C, b_beta)
    tl.store(at + 4 * C, q_factor)
    tl.store(at + 5 * C, k_factor)
    tl.store(at + 6 * C, coarse)
    tl.store(at + 7 * C, fine)
    tl.store(at + 8 * C, q_back)
    tl.store(at + 9 * C, k_back)
    tl.store(decays + head, tl.exp(coarse_end + fine_end))

    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    between = tl.exp(tl.where(i_c[:, None] >= i_c[None, :], between, float("-inf")))
    square = head * C * C + i_c[:, None] * C + i_c[None, :]
    a *= between * q_factor[:, None] * k_factor[None, :]
    tl.store(scores + square, a.to(dtype))
    n *= between * k_factor[:, None] * k_factor[None, :]
    n = tl.where(i_c[:, None] > i_c[None, :], n, 0.0)
    # (I + N beta)^-1 = I - P beta: a beta of 0 would hide its column of P.
    b_shown = tl.where(tl.abs(b_beta) < 1e-20, 1e-20, b_beta)[None, :]
    p = unit_lower_inverse(n * b_shown, C, PRECISION)
    p = tl.where(i_c[:, None] > i_c[None, :], -p / b_shown, 0.0)
    tl.store(solved + square, p.to(dtype))
