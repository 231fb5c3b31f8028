"""Packed = alone: what a sequence is packed with, or where a prefill is cut, changes nothing.

Measured on CPU, fp32 and fp64, both variants: the largest difference of outputs, final states and
gradients is 0 where Dk and Dv are multiples of 16; 1e-06 in fp32 elsewhere (alignment in BLAS).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

LENGTHS = [1, 63, 64, 65, 130]
VARIANTS = [("gla", {}), ("gdn", {}), ("gdn", {"gate_after_norm": True})]

variants = pytest.mark.parametrize(("variant", "options"), VARIANTS)
routings = pytest.mark.parametrize(("partitions", "k"), [(4, 1), (6, 2)])


@variants
@routings
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("resumed", [True, False])
def test_packed_is_alone_to_the_bit(variant, options, partitions, k, order, resumed, make_case):
    shape = {"dk": 16, "dv": 32, "partitions": partitions, "k": k, "resumed": resumed}
    case = make_case(variant, LENGTHS[::order], dtype=torch.float32, **shape, **options)
    with torch.no_grad():
        o, state = case.forward(case.form("chunk"))
        for b in range(len(LENGTHS)):
            alone = case.alone(b)
            o_alone, state_alone = alone.forward(alone.form("chunk"))
            assert torch.equal(o[case.rows(b)], o_alone)
            assert torch.equal(state[b : b + 1], state_alone)


@variants
@routings
def test_gradients_packed_are_gradients_alone(variant, options, partitions, k, make_case):
    shape = {"dk": 16, "dv": 16, "partitions": partitions, "k": k}
    case = make_case(variant, LENGTHS, dtype=torch.float32, **shape, **options)
    form = case.form("chunk")
    rng = torch.Generator().manual_seed(1)
    do = torch.randn(case.tokens["v"].shape, generator=rng)
    ds = torch.randn(case.initial_state.shape, generator=rng)

    def gradients(case, do, ds):
        leaves = [x.requires_grad_() for x in (*case.tokens.values(), case.initial_state)]
        o, state = case.forward(form)
        return torch.autograd.grad([o, state], leaves, [do, ds])

    alone = [case.alone(b) for b in range(len(LENGTHS))]
    packed = gradients(case, do, ds)
    for b, single in enumerate(alone):
        *tokens, initial = gradients(single, do[case.rows(b)], ds[b : b + 1])
        for x, y in zip(packed, tokens, strict=False):
            assert torch.equal(x[case.rows(b)], y)
        assert torch.equal(packed[-1][b : b + 1], initial)


@variants
@routings
def test_a_prefill_cut_at_a_multiple_of_64_changes_no_bit(
    variant, options, partitions, k, make_case
):
    shape = {"dk": 16, "dv": 16, "partitions": partitions, "k": k}
    case = make_case(variant, [200], dtype=torch.float32, **shape, **options)
    with torch.no_grad():
        whole, final = case.forward(case.form("chunk"))
        state, outputs = case.initial_state, []
        for rows in (slice(0, 64), slice(64, 192), slice(192, 200)):
            length = torch.tensor([0, rows.stop - rows.start])
            tokens = {name: x[rows] for name, x in case.tokens.items()}
            piece = replace(case, tokens=tokens, initial_state=state, cu_seqlens=length)
            o, state = piece.forward(case.form("chunk"))
            outputs.append(o)
    assert torch.equal(torch.cat(outputs), whole)
    assert torch.equal(state, final)


@variants
def test_a_neighbour_with_strong_decays_changes_nothing(variant, options, make_case):
    case = make_case(variant, [50, 70], dk=16, dv=16, dtype=torch.float32, **options)
    for name in ("g1", "g2"):
        case.tokens[name][:50] = -50.0
    with torch.no_grad():
        o, _ = case.forward(case.form("chunk"))
        alone, _ = case.alone(1).forward(case.form("chunk"))
    assert torch.equal(o[50:], alone)


@variants
def test_odd_widths_agree_up_to_rounding(variant, options, make_case):
    case = make_case(variant, LENGTHS, k=2, partitions=6, dtype=torch.float32, **options)
    with torch.no_grad():
        o, state = case.forward(case.form("chunk"))
        for b in range(len(LENGTHS)):
            alone = case.alone(b)
            o_alone, state_alone = alone.forward(alone.form("chunk"))
            torch.testing.assert_close(o[case.rows(b)], o_alone, rtol=0, atol=4e-6)  # 9.5e-07
            torch.testing.assert_close(state[b : b + 1], state_alone, rtol=0, atol=4e-6)
