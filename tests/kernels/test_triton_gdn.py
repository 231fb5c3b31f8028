"""The Triton form of SSE-GDN in fp32 against the definition, in triton's interpreter."""

# Triton's annotations do not describe what its compiler accepts.
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from sse_kernels.delta.triton_chunk import triton_sse_gdn
from sse_kernels.delta.triton_inverse import unit_lower_inverse

TOLERANCE = 1e-5  # measured 7e-7
SHAPE = {"heads": 1, "dk": 16, "dv": 16, "dtype": torch.float32}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def assert_agrees(case, difference, tolerance=TOLERANCE):
    naive = case.to(torch.float64).results(case.form("naive"))
    errors = difference(case.results(triton_sse_gdn), naive)
    assert max(errors.values()) < tolerance, errors


def test_agrees_with_the_definition(make_case, difference):
    assert_agrees(make_case("gdn", [1, 65, 0, 2], partitions=3, **SHAPE), difference)


@pytest.mark.parametrize("gate_after_norm", [False, True])
def test_two_partitions_a_token_and_shared_query_heads(make_case, difference, gate_after_norm):
    shape = {**SHAPE, "value_heads": 2, "dv": 24, "partitions": 3, "k": 2}
    case = make_case("gdn", [66], resumed=False, gate_after_norm=gate_after_norm, **shape)
    assert_agrees(case, difference)


def test_steep_decays_and_writes_of_strength_zero_and_two_stay_exact(make_case, difference):
    case = make_case("gdn", [70], partitions=2, k=2, **SHAPE)
    decays, strengths = torch.tensor([0.1, 1, 40, 400, 0, 3, 1000]), torch.tensor([0, 2, 1])
    for n in ("1", "2"):
        steep = case.tokens[f"g{n}"].detach() * decays.repeat(10)[:, None]
        case.tokens[f"g{n}"] = steep.requires_grad_()
        case.tokens[f"beta{n}"] = strengths.repeat(24)[:70, None].float().requires_grad_()
    assert_agrees(case, difference)


def test_wide_heads_are_taken_in_two_blocks(make_case, difference):
    """Dk beyond the tile of `gdn_dqk`: the norm's part of dq and dk comes in a second pass."""
    shape = {**SHAPE, "dk": 128, "partitions": 2}
    assert_agrees(make_case("gdn", [20], gate_after_norm=True, **shape), difference)


def test_equal_keys_and_reflections_stay_accurate(make_case, difference):
    case = make_case("gdn", [64], partitions=2, resumed=False, **SHAPE)
    case.tokens["k1"] = case.tokens["k1"].detach()[:1].expand(64, -1, -1).clone().requires_grad_()
    for name in ("g1", "beta1"):
        case.tokens[name] = torch.full_like(case.tokens[name], 2.0 * (name == "beta1"))
    assert_agrees(case, difference, tolerance=1e-4)  # measured 2e-5


def test_inputs_of_several_dtypes_are_read_in_the_widest(make_case, difference):
    shape = {"heads": 1, "dk": 16, "dv": 16, "partitions": 2}
    case = make_case("gdn", [3, 5], dtype=torch.float32, **shape)
    for name in ("q1", "k1", "v"):  # in fp32 nothing is lost, in bf16 q2 and k2 would be
        case.tokens[name] = case.tokens[name].bfloat16()
    for name in ("g1", "g2"):
        case.tokens[name] = case.tokens[name].double()
    with torch.no_grad():
        found, exact = (
            case.forward(triton_sse_gdn),
            case.to(torch.float64).forward(case.form("naive")),
        )
    assert found[0].dtype == torch.bfloat16
    assert max(difference({"state": found[1]}, {"state": exact[1]}).values()) < TOLERANCE
    torch.testing.assert_close(found[0].double(), exact[0], rtol=4e-3, atol=1e-6)  # o's rounding


def test_packed_equals_alone_to_the_bit(make_case):
    case = make_case("gdn", [3, 66], partitions=2, **SHAPE)
    with torch.no_grad():
        o, state = case.forward(triton_sse_gdn)
        alone, final = case.alone(1).forward(triton_sse_gdn)
    assert torch.equal(o[case.rows(1)], alone)
    assert torch.equal(state[1:], final)


def test_a_call_without_tokens_returns_the_initial_state(make_case):
    case = make_case("gdn", [0, 0], **SHAPE)
    o, state = case.forward(triton_sse_gdn)
    assert o.shape == (0, 1, 16)
    assert torch.equal(state, case.initial_state)


@triton.jit
def _inverse_kernel(x, out, C: tl.constexpr):
    i = tl.arange(0, C)
    tile = i[:, None] * C + i[None, :]
    tl.store(out + tile, unit_lower_inverse(tl.load(x + tile), C, "ieee"))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_inverse_on_the_chip_is_the_inverse(size):
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).tril(-1)
    out = torch.empty_like(x)
    _inverse_kernel[(1,)](x, out, C=size)
    exact = torch.linalg.inv(torch.eye(size).double() + x.double())
    assert float((out - exact).norm() / exact.norm()) < 1e-5  # measured 3e-7
