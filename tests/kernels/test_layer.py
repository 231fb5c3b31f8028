"""Whole layers over sequences: the operators one after the other, and what they refuse."""

from __future__ import annotations

import pytest
import sse_kernels
import torch
from sse_kernels import classify, gated_rms_norm, gdn_beta, gdn_log_decay, gla_log_decay
from torch.nn.functional import silu

T, H, D = 7, 2, 4
CU_SEQLENS = torch.tensor([0, 3, T])


def inputs():
    torch.manual_seed(0)
    streams = torch.randn(5, T, H, D)
    routing = sse_kernels.route(torch.randn(T, 3), 2)
    norm = {"norm_weight": torch.randn(D), "gate": torch.randn(T, H, D), "eps": 1e-6}
    return streams, routing, norm


def test_a_gla_layer_is_its_operators_one_after_the_other():
    (q1, k1, q2, k2, v), routing, norm = inputs()
    gk1, gk2 = torch.randn(2, T, H, D)
    rest = {"cu_seqlens": CU_SEQLENS, "output_final_state": True}
    y, state = sse_kernels.sse_gla_layer(
        q1, k1, q2, k2, v, gk1, gk2, routing, row_topk=2, **norm, **rest
    )
    keys, decays = [classify(k, 2) for k in (k1, k2)], [gla_log_decay(g) for g in (gk1, gk2)]
    o, right = sse_kernels.sse_gla(
        silu(q1), keys[0], silu(q2), keys[1], silu(v), *decays, routing, **rest
    )
    assert torch.equal(state, right)
    assert torch.equal(y, gated_rms_norm(o, **{"weight": norm.pop("norm_weight"), **norm}))


def test_a_gdn_layer_is_its_operators_one_after_the_other():
    streams, routing, norm = inputs()
    a, b = torch.randn(2, T, 2 * H)
    A_log, dt_bias = torch.randn(2, 2 * H)
    rest = {"cu_seqlens": CU_SEQLENS, "output_final_state": True, "gate_after_norm": True}
    y, state = sse_kernels.sse_gdn_layer(
        *streams, a, b, routing, A_log=A_log, dt_bias=dt_bias, allow_neg_eigval=True, **norm, **rest
    )
    g, beta = gdn_log_decay(a, A_log, dt_bias), gdn_beta(b, allow_neg_eigval=True)
    gates = (g[:, :H], beta[:, :H], g[:, H:], beta[:, H:])
    o, right = sse_kernels.sse_gdn(*(silu(x) for x in streams), *gates, routing, **rest)
    assert torch.equal(state, right)
    assert torch.equal(y, gated_rms_norm(o, **{"weight": norm.pop("norm_weight"), **norm}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("row_topk", 5, "sse_gla_layer: row_topk must be an integer from 1 to Dk = 4, got 5"),
        ("row_topk", 2.5, "sse_gla_layer: row_topk must be an integer from 1 to Dk = 4, got 2.5"),
        ("row_topk", True, "sse_gla_layer: row_topk must be an integer from 1 to Dk = 4, got True"),
        ("gate", torch.zeros(T, H), "sse_gla_layer: gate must be the shape of v"),
        ("norm_weight", torch.zeros(H * D), "sse_gla_layer: norm_weight must be"),
        ("cu_seqlens", torch.tensor([0, 3]), "sse_gla_layer: cu_seqlens must be from 0 to T = 7"),
        ("initial_state", torch.zeros(1), "sse_gla_layer: initial_state must be"),
    ],
)
def test_a_wrong_argument_is_named(name, value, message):
    streams, routing, norm = inputs()
    options = {"cu_seqlens": CU_SEQLENS, **norm, name: value}
    with pytest.raises(ValueError, match=message):
        sse_kernels.sse_gla_layer(*streams, *torch.randn(2, T, H, D), routing, **options)
