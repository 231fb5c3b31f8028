"""Decoding: one token a sequence, states changed in place at their slots."""

from __future__ import annotations

import pytest
import sse_kernels
import torch
from sse_kernels import Routing

VARIANTS = [("gla", {}), ("gdn", {}), ("gdn", {"gate_after_norm": True})]
variants = pytest.mark.parametrize(("variant", "options"), VARIANTS)


def step(case, rows, state, slots):
    """Feed `rows` of the packed tokens, one a slot."""
    routing = sse_kernels.route(case.tokens["logits"][rows], case.k)
    args = [x[rows] for name, x in case.tokens.items() if name != "logits"]
    op = getattr(sse_kernels, f"sse_{case.variant}_step")
    return op(*args, routing, state=state, slots=slots, **case.options)


@variants
@pytest.mark.parametrize(("partitions", "k"), [(4, 1), (6, 2)])
def test_steps_equal_the_recurrent_form_to_the_bit(variant, options, partitions, k, make_case):
    shape = {"partitions": partitions, "k": k, "value_heads": 4}
    case = make_case(variant, [9, 9], dtype=torch.float32, **shape, **options)
    with torch.no_grad():
        o, final = case.forward(case.form("recurrent"))
    state = torch.randn(5, *final.shape[1:])
    before, slots = state.clone(), torch.tensor([3, 1])
    state[slots] = case.initial_state
    for t in range(9):
        assert torch.equal(step(case, [t, 9 + t], state, slots), o[[t, 9 + t]])
    assert torch.equal(state[slots], final)
    untouched = [0, 2, 4]
    assert torch.equal(state[untouched], before[untouched])


@variants
def test_a_row_does_not_depend_on_its_company(variant, options, make_case):
    case = make_case(variant, [16], dk=16, dv=16, k=2, dtype=torch.float32, **options)
    states = torch.randn(16, *case.initial_state.shape[1:])
    together = states.clone()
    o = step(case, list(range(16)), together, torch.arange(16))
    for row in range(16):
        alone = states.clone()
        assert torch.equal(step(case, [row], alone, torch.tensor([row])), o[row : row + 1])
        assert torch.equal(alone[row], together[row])


@variants
def test_a_bf16_state_rounds_only_what_is_stored(variant, options, make_case):
    case = make_case(variant, [4], dk=16, dv=16, dtype=torch.float32, **options)
    state = torch.randn(4, *case.initial_state.shape[1:]).bfloat16()
    exact, slots = state.float(), torch.arange(4)
    o = step(case, slots, state, slots)
    assert torch.equal(o, step(case, slots, exact, slots))
    assert torch.equal(state, exact.bfloat16())


@variants
def test_prefill_then_decode_is_the_definition(variant, options, make_case):
    case = make_case(variant, [70], k=2, **options)
    with torch.no_grad():
        o, final = case.forward(case.form("naive"))
    state = case.initial_state.clone()
    tokens, routing = case.tokens, sse_kernels.route(case.tokens["logits"], 2)
    args = [x[:60] for name, x in tokens.items() if name != "logits"]
    _, state = case.form("chunk")(
        *args,
        Routing(*(x[:60] for x in routing)),
        cu_seqlens=torch.tensor([0, 60]),
        initial_state=state,
        output_final_state=True,
        **options,
    )
    for t in range(60, 70):
        out = step(case, [t], state, torch.tensor([0]))
        torch.testing.assert_close(out, o[t : t + 1], rtol=0, atol=1e-13)  # measured 1.8e-15
    torch.testing.assert_close(state, final, rtol=0, atol=1e-13)


@variants
def test_ids_in_bytes_are_those_in_words(variant, options, make_case):
    """A layer's step on CUDA returns bytes, in which 255 + 1 would be the shared state."""
    case = make_case(variant, [5], partitions=256, dk=2, dv=2, dtype=torch.float32, **options)
    args = [x for name, x in case.tokens.items() if name != "logits"]
    case.tokens["logits"][:, 255] += 20.0
    words = sse_kernels.route(case.tokens["logits"], 1)
    assert words.ids.eq(255).all()
    bytes_ = words._replace(ids=words.ids.to(torch.uint8))
    op, found = getattr(sse_kernels, f"sse_{variant}_step"), []
    for routing in (words, bytes_):
        state = case.initial_state.repeat(5, 1, 1, 1, 1)
        o = op(*args, routing, state=state, slots=torch.arange(5), **options)
        form = case.form("recurrent")
        rest = {"cu_seqlens": case.cu_seqlens, "initial_state": case.initial_state, **options}
        found.append((o, state, form(*args, routing, **rest)[0]))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
