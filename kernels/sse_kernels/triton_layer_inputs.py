"""One decode step of an SSE layer up to its activations: one launch behind one product with x."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sizes import block_sizes
from .gla.triton_shapes import dot_precision
from .layer_inputs import InputWeights, LayerInputs

_ROWS, _WINDOWS = 32, 4
"""Tokens of a tile of products and of one of the convolution, whatever the batch."""
_CHANNELS = 512
"""Of x, that a program of the router reads at once."""


def layer_inputs_step(
    x: Tensor,
    projected: Tensor,
    weights: InputWeights,
    *,
    heads: tuple[int, int],
    windows: tuple[Tensor, Tensor] | None,
    slots: Tensor,
) -> LayerInputs:
    """x [B, d] and its products -> all inputs of the layer's step.

        q2 = q + Bq (Aq x)   k2 = k + Bk (Ak x)   gk = W2 (W1 x) + b   gate = Wg2 (Wg1 x)
        q1, k1 = conv(q), conv(k)   logits = We x, fp32 throughout

    projected [B, P]: q, k, v, Aq x, Ak x, then W1 x of both streams (SSE-GDN: a, b), then Wg1 x,
    side by side. heads: (H, Hv). windows: the last W-1 inputs of the convolution of q and of k,
    [S, H*Dk, W-1], changed in place at `slots` [B], as in `causal_conv_step`.

    Sums in fp32, each result rounded once to the dtype of `projected`. CUDA only.
    """
    batch, keys = len(x), len(weights.lora_q)
    h, hv = heads
    rank = weights.lora_q.shape[1]
    decay_rank = 0 if weights.decays is None else weights.decays[0].shape[1]
    gate_rank = 0 if weights.gate is None else rank
    rates = 2 * decay_rank if decay_rank else 4 * hv
    values = projected.shape[1] - 2 * keys - 2 * rank - rates - gate_rank
    conv_width = 0 if weights.conv is None else weights.conv[0].shape[2]
    widths = [keys, keys] + [keys, keys] * bool(decay_rank) + [values] * bool(gate_rank)
    convolved = [keys, keys] * bool(conv_width)
    expanded = projected.new_empty(batch, sum(widths + convolved))
    partitions = len(weights.router)
    logits = torch.empty(batch, partitions, dtype=torch.float32, device=x.device)
    block_n = min(triton.next_power_of_2(partitions), 8)
    w1, b1, w2, b2 = weights.decays or (None,) * 4
    blocks = block_sizes("layer_inputs", projected, keys // h)
    programs = batch * triton.cdiv(partitions, block_n)
    for group, height in ((widths, _ROWS), (convolved, _WINDOWS)):
        columns = sum(triton.cdiv(width, blocks.k) for width in group)
        programs += columns * triton.cdiv(batch, height)
    if batch:
        layer_inputs_kernel[(programs,)](
            x, weights.router, logits, projected, expanded,
            weights.lora_q, weights.lora_k, w1, w2, b1, b2, weights.gate,
            *(weights.conv or (None, None)), *(windows or (None, None)), slots, batch,
            1 if windows is None else len(windows[0]), x.stride(0), projected.stride(0),
            D=x.shape[1], N=partitions, NB=block_n,
            DB=min(triton.next_power_of_2(x.shape[1]), _CHANNELS),
            KEYS=keys, VALUES=values, R=rank, RATES=rates, DR=decay_rank, W=conv_width,
            RP=max(triton.next_power_of_2(rank), 64), WP=triton.next_power_of_2(conv_width),
            DRP=max(triton.next_power_of_2(decay_rank), 64),
            BM=_ROWS, CM=_WINDOWS, BN=blocks.k, PRECISION=dot_precision(projected),
            num_warps=blocks.warps,
        )  # fmt: skip
    rows = iter(expanded.split(widths + convolved, -1))
    q, k, v, _ = projected.split([keys, keys, values, projected.shape[1] - 2 * keys - values], -1)
    q2, k2 = next(rows), next(rows)
    if decay_rank:
        decays = tuple(next(rows).unflatten(-1, (h, -1)) for _ in range(2))
    else:
        at = 2 * keys + values + 2 * rank
        decays = projected[:, at : at + 4 * hv].chunk(2, -1)
    gate = next(rows).unflatten(-1, (hv, -1)) if gate_rank else None
    q1, k1 = (next(rows), next(rows)) if conv_width else (q, k)
    q1, k1, q2, k2 = (y.unflatten(-1, (h, -1)) for y in (q1, k1, q2, k2))
    return LayerInputs(q1, k1, q2, k2, v.unflatten(-1, (hv, -1)), decays, gate, logits)


@triton.jit
def _expand(
    low, weight, base, bias, out, s_p, s_out, i_m, i_n, B,
    WIDTH: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = low weight^T, + base, + bias; low [B, R], weight [WIDTH, R]."""
    rows, columns = i_m * BM + tl.arange(0, BM).to(tl.int64), i_n * BN + tl.arange(0, BN)
    r, row_mask, column_mask = tl.arange(0, RP), (rows < B)[:, None], (columns < WIDTH)[None, :]
    r_mask = (r < R)[None, :]
    b_low = tl.load(low + rows[:, None] * s_p + r[None, :], mask=row_mask & r_mask, other=0.0)
    b_weight = tl.load(
        weight + columns[:, None] * R + r[None, :],
        mask=(columns < WIDTH)[:, None] & r_mask,
        other=0.0,
    ).to(b_low.dtype)
    y = tl.dot(b_low, tl.trans(b_weight), input_precision=PRECISION)
    mask = row_mask & column_mask
    if base is not None:
        at = base + rows[:, None] * s_p + columns[None, :]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None] * s_out + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _convolve(
    x, weight, window, slots, out, s_p, s_out, i_m, i_n, B, S,
    WIDTH: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = the newest output of the convolution; the window moves on."""
    rows, columns = i_m * BM + tl.arange(0, BM).to(tl.int64), i_n * BN + tl.arange(0, BN)
    tap, inside = tl.arange(0, WP), columns < WIDTH
    mask = (rows < B)[:, None] & inside[None, :]
    slot = tl.load(slots + rows, mask=rows < B, other=0)
    slot = tl.minimum(tl.maximum(slot, 0), S - 1)
    past = window + (slot[:, None] * WIDTH + columns[None, :])[:, :, None] * (W - 1) + tap
    b_x = tl.load(x + rows[:, None] * s_p + columns[None, :], mask=mask, other=0.0)
    b_past = tl.load(past, mask=mask[:, :, None] & (tap < W - 1), other=0.0)
    b_past = tl.where(tap == W - 1, b_x[:, :, None], b_past.to(b_x.dtype))
    b_weight = tl.load(
        weight + columns[:, None] * W + tap[None, :],
        mask=inside[:, None] & (tap < W)[None, :],
        other=0.0,
    )
    y = tl.sum(b_past.to(tl.float32) * b_weight.to(tl.float32)[None, :, :], axis=2)
    at = out + rows[:, None] * s_out + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # another thread may have to read first what this one overwrites
    keep = mask[:, :, None] & (tap > 0) & (tap < W)
    tl.store(past - 1, b_past.to(window.dtype.element_ty), mask=keep)


@triton.jit
def _route_row(
    x, router, logits, i_n, D: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, DB: tl.constexpr
):  # fmt: skip
    """NB router logits of one token, fp32."""
    n = i_n * NB + tl.arange(0, NB)
    total = tl.zeros([NB, DB], tl.float32)
    for start in range(0, D, DB):
        i = start + tl.arange(0, DB)
        b_x = tl.load(x + i, mask=i < D, other=0.0).to(tl.float32)
        mask = (n < N)[:, None] & (i < D)[None, :]
        b_e = tl.load(router + n[:, None] * D + i[None, :], mask=mask, other=0.0)
        total += b_e.to(tl.float32) * b_x[None, :]
    tl.store(logits + n, tl.sum(total, axis=1), mask=n < N)


@triton.jit
def layer_inputs_kernel(
    x, router, logits, projected, out, lora_q, lora_k, w1, w2, bias1, bias2, gate,
    conv_q, conv_k, window_q, window_k, slots, B, S, s_x, s_p,
    D: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, DB: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, R: tl.constexpr, RATES: tl.constexpr, DR: tl.constexpr, W: tl.constexpr,
    RP: tl.constexpr, DRP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CM: tl.constexpr,
    WP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NN: tl.constexpr = (N + NB - 1) // NB
    NK: tl.constexpr = (KEYS + BN - 1) // BN
    GLA: tl.constexpr = 1 if DR > 0 else 0
    GATE: tl.constexpr = 1 if gate is not None else 0
    NV: tl.constexpr = GATE * ((VALUES + BN - 1) // BN)
    NE: tl.constexpr = (2 + 2 * GLA) * NK + NV
    LOW: tl.constexpr = 2 * KEYS + VALUES
    DECAYS: tl.constexpr = 2 * KEYS
    GATES: tl.constexpr = DECAYS + GLA * 2 * KEYS
    CONV: tl.constexpr = GATES + GATE * VALUES
    s_out = CONV + (2 * KEYS if W > 0 else 0)
    pid = tl.program_id(0)
    if pid < B * NN:
        i_b = (pid // NN).to(tl.int64)
        _route_row(x + i_b * s_x, router, logits + i_b * N, pid % NN, D, N, NB, DB)
        return
    tiles = (B + BM - 1) // BM
    i_m, i = (pid - B * NN) % tiles, (pid - B * NN) // tiles
    if i >= NE:
        if W > 0:
            i = pid - B * NN - NE * tiles
            tiles = (B + CM - 1) // CM
            i_m, i = i % tiles, i // tiles
            if i < NK:
                _convolve(
                    projected, conv_q, window_q, slots, out + CONV, s_p, s_out, i_m, i, B, S,
                    KEYS, W, WP, CM, BN,
                )  # fmt: skip
            else:
                _convolve(
                    projected + KEYS, conv_k, window_k, slots, out + CONV + KEYS, s_p, s_out,
                    i_m, i - NK, B, S, KEYS, W, WP, CM, BN,
                )  # fmt: skip
        return
    low = projected + LOW
    if i < NK:
        _expand(
            low, lora_q, projected, None, out, s_p, s_out, i_m, i, B,
            KEYS, R, RP, BM, BN, PRECISION,
        )  # fmt: skip
    if (i >= NK) & (i < 2 * NK):
        _expand(
            low + R, lora_k, projected + KEYS, None, out + KEYS, s_p, s_out, i_m, i - NK, B,
            KEYS, R, RP, BM, BN, PRECISION,
        )  # fmt: skip
    i -= 2 * NK
    if GLA:
        if (i >= 0) & (i < NK):
            _expand(
                low + 2 * R, w1, None, bias1, out + DECAYS, s_p, s_out, i_m, i, B,
                KEYS, DR, DRP, BM, BN, PRECISION,
            )  # fmt: skip
        if (i >= NK) & (i < 2 * NK):
            _expand(
                low + 2 * R + DR, w2, None, bias2, out + DECAYS + KEYS, s_p, s_out, i_m, i - NK, B,
                KEYS, DR, DRP, BM, BN, PRECISION,
            )  # fmt: skip
        i -= 2 * NK
    if GATE:  # noqa: SIM102 (a compile-time condition, then one of the device)
        if i >= 0:
            _expand(
                low + 2 * R + RATES, gate, None, None, out + GATES, s_p, s_out, i_m, i, B,
                VALUES, R, RP, BM, BN, PRECISION,
            )  # fmt: skip
