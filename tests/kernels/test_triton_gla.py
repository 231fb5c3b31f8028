"""The Triton form of SSE-GLA in fp32 against the definition, in triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sse_kernels.gla.triton_chunk import triton_sse_gla

TOLERANCE = 2e-5  # measured 3e-7; in steep chunks 6e-6, the rounding of the summed decays


def assert_agrees(case, difference):
    naive = case.to(torch.float64).results(case.form("naive"))
    errors = difference(case.results(triton_sse_gla), naive)
    assert max(errors.values()) < TOLERANCE, errors


pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def test_agrees_with_the_definition(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 3}
    assert_agrees(make_case("gla", [1, 65, 0, 2], dtype=torch.float32, **shape), difference)


def test_two_partitions_a_token_and_shared_query_heads(make_case, difference):
    shape = {"heads": 1, "value_heads": 2, "dk": 16, "dv": 24, "partitions": 3, "k": 2}
    case = make_case("gla", [66], resumed=False, dtype=torch.float32, **shape)
    assert_agrees(case, difference)


def test_decays_beyond_one_exponent_stay_exact(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2, "k": 2}
    case = make_case("gla", [18], dtype=torch.float32, **shape)
    for name in ("g1", "g2"):
        steep = case.tokens[name].detach() * torch.tensor([0.1, 1, 40, 400]).repeat(4)
        case.tokens[name] = steep.requires_grad_()
    assert_agrees(case, difference)


def test_inputs_of_several_dtypes_are_read_in_the_widest(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2}
    case = make_case("gla", [3, 5], dtype=torch.float32, **shape)
    for name in ("q1", "k1", "v"):  # in fp32 nothing is lost, in bf16 q2 and k2 would be
        case.tokens[name] = case.tokens[name].bfloat16()
    for name in ("g1", "g2"):
        case.tokens[name] = case.tokens[name].double()
    with torch.no_grad():
        found, exact = (
            case.forward(triton_sse_gla),
            case.to(torch.float64).forward(case.form("naive")),
        )
    assert found[0].dtype == torch.bfloat16
    assert max(difference({"state": found[1]}, {"state": exact[1]}).values()) < TOLERANCE
    torch.testing.assert_close(found[0].double(), exact[0], rtol=4e-3, atol=1e-6)  # o's rounding


def test_heads_wider_than_a_tile(make_case, difference):
    shape = {"heads": 1, "value_heads": 2, "dk": 128, "dv": 16, "partitions": 2, "k": 2}
    case = make_case("gla", [7], resumed=False, dtype=torch.float32, **shape)
    steep = case.tokens["g2"].detach() * torch.tensor([1.0] * 100 + [400.0] * 28)
    case.tokens["g2"] = steep.requires_grad_()
    assert_agrees(case, difference)


def test_packed_equals_alone_to_the_bit(make_case):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2}
    case = make_case("gla", [3, 66], dtype=torch.float32, **shape)
    with torch.no_grad():
        o, state = case.forward(triton_sse_gla)
        alone, final = case.alone(1).forward(triton_sse_gla)
    assert torch.equal(o[case.rows(1)], alone)
    assert torch.equal(state[1:], final)


def test_a_call_without_tokens_returns_the_initial_state(make_case):
    case = make_case("gla", [0, 0], heads=1, dk=16, dv=16, dtype=torch.float32)
    o, state = case.forward(triton_sse_gla)
    assert o.shape == (0, 1, 16)
    assert torch.equal(state, case.initial_state)
