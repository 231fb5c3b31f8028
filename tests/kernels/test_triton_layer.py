"""SSE-GLA's layer and the output norm in Triton, fp32 in triton's interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid, silu

pytest.importorskip("triton")
import sse_kernels
from sse_kernels.gla.triton_layer import triton_sse_gla_layer
from sse_kernels.norm import gated_rms_norm
from sse_kernels.triton_norm import triton_gated_rms_norm

TOLERANCE = 2e-5  # measured 1e-6; in steep chunks 6e-6, the rounding of the summed decays
EPS = 1e-6

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases")


def exact_layer(q1, k1, q2, k2, v, gk1, gk2, routing, *, norm_weight, gate, row_topk, eps, **rest):
    """The layer's definition in the dtype of its inputs."""

    def classes(k):
        order = k.detach().sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.zeros_like(k, dtype=torch.bool).scatter(-1, order[..., row_topk:], True)
        return k.masked_fill(dropped, -torch.inf).softmax(-1)

    g1, g2 = (logsigmoid(x) / 16 for x in (gk1, gk2))
    inputs = (silu(q1), classes(k1), silu(q2), classes(k2), silu(v), g1, g2, routing)
    o, state = sse_kernels.naive_sse_gla(*inputs, **rest)
    return gated_rms_norm(o, norm_weight, gate, eps=eps), state


def results(case, layer, dtype, *, row_topk, gated=True):
    """Output, final state and all gradients of a fixed weighting of both."""
    case = case.to(dtype)
    v = case.tokens["v"]
    wave = lambda x: torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).add(0.3).sin()
    leaves = {**case.tokens, "norm_weight": 1 + wave(v[0, 0]).to(dtype)}
    if gated:
        leaves["gate"] = 2 * wave(v).to(dtype)
    if case.initial_state is not None:
        leaves["initial_state"] = case.initial_state
    for x in leaves.values():
        x.requires_grad_()
    (*tokens,) = (leaves[n] for n in ("q1", "k1", "q2", "k2", "v", "g1", "g2"))
    y, state = layer(
        *tokens,
        sse_kernels.route(leaves["logits"], case.k),
        norm_weight=leaves["norm_weight"],
        gate=leaves.get("gate"),
        eps=EPS,
        row_topk=row_topk,
        cu_seqlens=case.cu_seqlens,
        initial_state=case.initial_state,
        output_final_state=True,
    )
    loss = (y.double() * wave(y)).sum() + (state.double() * wave(state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def assert_agrees(case, difference, *, row_topk=None, gated=True):
    options = {"row_topk": row_topk or case.tokens["q1"].shape[-1], "gated": gated}
    exact = results(case, exact_layer, torch.float64, **options)
    options["row_topk"] = row_topk
    errors = difference(results(case, triton_sse_gla_layer, torch.float32, **options), exact)
    assert max(errors.values()) < TOLERANCE, errors


def test_the_layer_agrees_with_its_definition(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 3}
    assert_agrees(make_case("gla", [1, 65, 0, 2], **shape), difference)


def test_keys_keep_their_largest_rows_and_ties_go_to_the_lowest(make_case, difference):
    shape = {"heads": 1, "value_heads": 2, "dk": 16, "dv": 24, "partitions": 3, "k": 2}
    case = make_case("gla", [20], resumed=False, **shape)
    for name in ("k1", "k2"):
        case.tokens[name] = (2 * case.tokens[name]).round() / 2
    assert_agrees(case, difference, row_topk=5, gated=False)


def test_a_softmax_over_more_rows_than_a_tile_has(make_case, difference):
    shape = {"heads": 1, "dk": 128, "dv": 16, "partitions": 2}
    assert_agrees(make_case("gla", [3], **shape), difference, row_topk=100)


def test_steep_decays_stay_exact(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2, "k": 2}
    case = make_case("gla", [18], **shape)
    for name in ("g1", "g2"):
        case.tokens[name] = case.tokens[name] * torch.tensor([0.1, 1, 400, 4000]).repeat(4)
    assert_agrees(case, difference, row_topk=9)


def test_packed_equals_alone_to_the_bit(make_case):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2}
    case = make_case("gla", [3, 66], dtype=torch.float32, **shape)
    norm = {"norm_weight": torch.ones(16), "eps": EPS}
    layer = lambda *args, **rest: triton_sse_gla_layer(*args, **norm, **rest)
    with torch.no_grad():
        y, state = case.forward(layer)
        alone, final = case.alone(1).forward(layer)
    assert torch.equal(y[case.rows(1)], alone)
    assert torch.equal(state[1:], final)


@pytest.mark.parametrize("gated", [False, True])
def test_the_norm_and_its_gradients_are_torchs(gated):
    rng = torch.Generator().manual_seed(0)
    o, gate, dy = torch.randn(3, 300, 2, 24, generator=rng)
    weight = torch.rand(24, generator=rng)
    # The backward pass finds o in the output, be it multiplied with nothing or nearly so.
    gate[::3], gate[1::7], weight[5] = 0, -80, 0
    leaves = [x.requires_grad_() for x in (o, weight, gate)[: 2 + gated]]

    def run(norm):
        y = norm(*leaves, eps=EPS)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    for found, right in zip(run(triton_gated_rms_norm), run(gated_rms_norm), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_norm_of_nothing_is_nothing():
    o = torch.zeros(0, 2, 16, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    y = triton_gated_rms_norm(o, weight, None, eps=EPS)
    do, dweight = torch.autograd.grad(y.sum(), (o, weight))
    assert y.shape == do.shape == o.shape
    assert torch.equal(dweight, torch.zeros(16))
