"""SSE-GDN's log-decays and writing strengths from their projections in one kernel; its backward.

    g = -exp(A_log) softplus(a + dt_bias)        beta = c sigmoid(b), c = 1 or 2
Channels 0..Hv-1 of a, b, A_log and dt_bias are the shared stream's, the others the sparse one's.
"""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gla.triton_activate import sigmoid

_TILE = 2048
"""Values a program holds."""


def gates_forward(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, beta_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b [T, 2 Hv], A_log, dt_bias [2 Hv] -> g1, beta1, g2, beta2 [T, Hv] fp32. Contiguous."""
    tokens, channels = a.shape
    out = a.new_empty(2, 2, tokens, channels // 2, dtype=torch.float32)
    rows, width = _tile(channels)
    if tokens:
        gdn_gates_fwd_kernel[(triton.cdiv(tokens, rows),)](
            a, b, A_log, dt_bias, out, tokens,
            D=channels, DP=width, BETA_SCALE=beta_scale, BLOCK=rows,
        )  # fmt: skip
    (g1, beta1), (g2, beta2) = out
    return g1, beta1, g2, beta2


def gates_backward(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_scale: float,
    dg1: Tensor,
    dbeta1: Tensor,
    dg2: Tensor,
    dbeta2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, A_log and dt_bias."""
    tokens, channels = a.shape
    da, db = torch.empty_like(a), torch.empty_like(b)
    rows, width = _tile(channels)
    parts = triton.cdiv(tokens, rows)
    rates = a.new_empty(2, channels, parts, dtype=torch.float32)
    if tokens:
        gdn_gates_bwd_kernel[(parts,)](
            a, b, A_log, dt_bias, dg1, dbeta1, dg2, dbeta2, da, db, rates, tokens,
            D=channels, DP=width, BETA_SCALE=beta_scale, BLOCK=rows,
        )  # fmt: skip
    d_log, d_bias = (x.sum(-1) for x in rates)
    return da, db, d_log.to(A_log.dtype), d_bias.to(dt_bias.dtype)


def _tile(channels: int) -> tuple[int, int]:
    """Tokens and channels of a tile."""
    width = triton.next_power_of_2(channels)
    return max(_TILE // width, 1), width


@triton.jit(do_not_specialize=["T"])
def gdn_gates_fwd_kernel(
    a, b, A_log, dt_bias, out, T,
    D: tl.constexpr, DP: tl.constexpr, BETA_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [2 streams, g and beta, T, Hv]."""
    HV: tl.constexpr = D // 2
    i_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i_d = tl.arange(0, DP)[None, :]
    mask = (i_t < T) & (i_d < D)
    x, rate = _time_step(a, A_log, dt_bias, i_t, i_d, mask, D)
    to = out + (i_d // HV * 2 * T + i_t) * HV + i_d % HV
    tl.store(to, -rate * _softplus(x), mask=mask)
    s = sigmoid(tl.load(b + i_t * D + i_d, mask=mask, other=0.0).to(tl.float32))
    tl.store(to + tl.full([], HV, tl.int64) * T, BETA_SCALE * s, mask=mask)


@triton.jit(do_not_specialize=["T"])
def gdn_gates_bwd_kernel(
    a, b, A_log, dt_bias, dg1, dbeta1, dg2, dbeta2, da, db, rates, T,
    D: tl.constexpr, DP: tl.constexpr, BETA_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rates [A_log and dt_bias, 2 Hv, programs]: the share of each program."""
    HV: tl.constexpr = D // 2
    i_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i_d = tl.arange(0, DP)[None, :]
    mask = (i_t < T) & (i_d < D)
    x, rate = _time_step(a, A_log, dt_bias, i_t, i_d, mask, D)
    dg = _of_streams(dg1, dg2, i_t, i_d, mask, HV)
    dx = -dg * rate * sigmoid(x)
    tl.store(da + i_t * D + i_d, dx.to(da.dtype.element_ty), mask=mask)
    s = sigmoid(tl.load(b + i_t * D + i_d, mask=mask, other=0.0).to(tl.float32))
    dz = _of_streams(dbeta1, dbeta2, i_t, i_d, mask, HV) * BETA_SCALE * s * (1.0 - s)
    tl.store(db + i_t * D + i_d, dz.to(db.dtype.element_ty), mask=mask)
    i_d = tl.arange(0, DP)
    at = rates + i_d * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, -tl.sum(dg * rate * _softplus(x), axis=0), mask=i_d < D)
    tl.store(at + D * tl.num_programs(0), tl.sum(dx, axis=0), mask=i_d < D)


@triton.jit
def _time_step(a, A_log, dt_bias, i_t, i_d, mask, D: tl.constexpr):
    """a + dt_bias, and the channels' rates."""
    x = tl.load(a + i_t * D + i_d, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + i_d, mask=i_d < D, other=0.0).to(tl.float32)
    return x, tl.exp(tl.load(A_log + i_d, mask=i_d < D, other=0.0).to(tl.float32))


@triton.jit
def _of_streams(x1, x2, i_t, i_d, mask, HV: tl.constexpr):
    """Channels of x1 [T, Hv], then of x2."""
    x = tl.load(x1 + i_t * HV + i_d, mask=mask & (i_d < HV), other=0.0)
    return x + tl.load(x2 + i_t * HV + i_d - HV, mask=mask & (i_d >= HV), other=0.0)


@triton.jit
def _softplus(x):
    """log(1 + e^x), small values as exactly as large ones."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    rest = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + rest
