"""SSE-GDN's layer in Triton, fp32 in triton's interpreter, against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu, softplus

pytest.importorskip("triton")
import sse_kernels
from sse_kernels.delta.triton_layer import triton_sse_gdn_layer
from sse_kernels.norm import gated_rms_norm

TOLERANCE = 1e-5  # measured 2e-6
EPS = 1e-6

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def exact_layer(
    q1, k1, q2, k2, v, a, b, routing, *, A_log, dt_bias, norm_weight, gate, eps, allow_neg_eigval,
    **rest,
):  # fmt: skip
    """The layer's definition in the dtype of its inputs."""
    g1, g2 = (-A_log.exp() * softplus(a + dt_bias)).chunk(2, -1)
    beta1, beta2 = ((1 + allow_neg_eigval) * b.sigmoid()).chunk(2, -1)
    inputs = (silu(q1), silu(k1), silu(q2), silu(k2), silu(v), g1, beta1, g2, beta2, routing)
    o, state = sse_kernels.naive_sse_gdn(*inputs, **rest)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), state


def results(case, layer, dtype, *, gated=True, hidden=(), **options):
    """Output, final state and all gradients of a fixed weighting of both."""
    case = case.to(dtype)
    v = case.tokens["v"]
    wave = lambda x: torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).add(0.3).sin()
    twice = torch.zeros(2 * v.shape[1])
    leaves = {n: case.tokens[n] for n in ("q1", "k1", "q2", "k2", "v", "logits")}
    for name in ("a", "b"):
        streams = [case.tokens[("g" if name == "a" else "beta") + n] for n in "12"]
        leaves[name] = 3 * torch.cat(streams, -1) + (2 if name == "a" else -1)
    leaves["A_log"], leaves["dt_bias"] = wave(twice).to(dtype), 2 * wave(twice).to(dtype) - 3
    leaves["norm_weight"] = 1 + wave(v[0, 0]).to(dtype)
    if gated:
        leaves["gate"] = 2 * wave(v).to(dtype)
    if case.initial_state is not None:
        leaves["initial_state"] = case.initial_state
    for name in hidden:
        leaves[name].view(-1)[::3] = 0
    for x in leaves.values():
        x.requires_grad_()
    y, state = layer(
        *(leaves[n] for n in ("q1", "k1", "q2", "k2", "v", "a", "b")),
        sse_kernels.route(leaves["logits"], case.k),
        **{n: leaves.get(n) for n in ("A_log", "dt_bias", "norm_weight", "gate", "initial_state")},
        eps=EPS,
        cu_seqlens=case.cu_seqlens,
        output_final_state=True,
        **options,
    )
    loss = (y.double() * wave(y)).sum() + (state.double() * wave(state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def assert_agrees(case, difference, **options):
    options = {"allow_neg_eigval": False, "gate_after_norm": False, **options}
    exact = results(case, exact_layer, torch.float64, **options)
    errors = difference(results(case, triton_sse_gdn_layer, torch.float32, **options), exact)
    assert max(errors.values()) < TOLERANCE, errors


def test_the_layer_agrees_with_its_definition(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 3}
    assert_agrees(make_case("gdn", [1, 65, 0, 2], **shape), difference)


def test_two_partitions_shared_query_heads_and_no_gate(make_case, difference):
    shape = {"heads": 1, "value_heads": 3, "dk": 16, "dv": 24, "partitions": 3, "k": 2}
    case = make_case("gdn", [20], resumed=False, **shape)
    options = {"allow_neg_eigval": True, "gate_after_norm": True, "gated": False}
    assert_agrees(case, difference, **options)


def test_a_gate_or_a_norm_weight_of_zero_has_its_gradient(make_case, difference):
    case = make_case("gdn", [9], heads=2, dk=16, dv=16, partitions=2)
    assert_agrees(case, difference, hidden=("gate", "norm_weight"))


def test_rows_wider_than_a_tile_are_activated_whole(make_case, difference):
    case = make_case("gdn", [3], heads=1, dk=128, dv=80, partitions=2)
    assert_agrees(case, difference, gate_after_norm=True)


def test_packed_equals_alone_to_the_bit(make_case):
    case = make_case("gdn", [3, 66], dtype=torch.float32, dk=16, dv=16, partitions=2)
    rates = {"A_log": torch.zeros(4), "dt_bias": torch.ones(4)}
    rest = {"norm_weight": torch.ones(16), "eps": EPS, **rates}

    def layer(q1, k1, q2, k2, v, g1, beta1, g2, beta2, routing, **more):
        a, b = torch.cat([g1, g2], -1), torch.cat([beta1, beta2], -1)
        return triton_sse_gdn_layer(q1, k1, q2, k2, v, a, b, routing, **rest, **more)

    with torch.no_grad():
        y, state = case.forward(layer)
        alone, final = case.alone(1).forward(layer)
    assert torch.equal(y[case.rows(1)], alone)
    assert torch.equal(state[1:], final)
