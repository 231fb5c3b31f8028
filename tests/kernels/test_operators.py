"""chunk == naive == recurrent: outputs, final states and the gradient of every input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sse_kernels.gla import chunk as gla_chunk

# Largest error over largest value (at least 1), outputs, states and gradients together.
TOLERANCE = {  # measured
    ("gla", torch.float64): 1e-14,  # 8.4e-16
    ("gdn", torch.float64): 1e-14,  # 1.8e-15
    ("gla", torch.float32): 1e-6,  # 2.9e-07
    ("gdn", torch.float32): 4e-6,  # 8.4e-07
    ("gla", torch.bfloat16): 8e-3,  # 2.0e-03, the rounding of o
    ("gdn", torch.bfloat16): 8e-3,  # 2.9e-03
}
VARIANTS = [("gla", {}), ("gdn", {}), ("gdn", {"gate_after_norm": True})]
LENGTHS = [1, 20, 0, 37]

variants = pytest.mark.parametrize(("variant", "options"), VARIANTS)
forms = pytest.mark.parametrize("form", ["chunk", "recurrent"])


def worst(errors: dict[str, float]) -> float:
    return max(errors.values())


@forms
@variants
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("partitions", [4, 6])
def test_forms_agree_with_the_definition(
    variant, options, form, k, partitions, make_case, difference
):
    case = make_case(variant, LENGTHS, k=k, partitions=partitions, **options)
    errors = difference(case.results(case.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, torch.float64], errors


@forms
@variants
def test_value_heads_share_query_heads(variant, options, form, make_case, difference):
    case = make_case(variant, [70, 5], value_heads=4, k=2, **options)
    errors = difference(case.results(case.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, torch.float64], errors


@forms
@variants
def test_single_precision_stays_close_to_double(variant, options, form, make_case, difference):
    case = make_case(variant, LENGTHS, k=2, **options)
    single = case.to(torch.float32)
    errors = difference(single.results(single.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, torch.float32], errors


@forms
@variants
def test_bf16_inputs_accumulate_in_fp32(variant, options, form, make_case, difference):
    half = make_case(variant, [80], dk=16, dv=16, k=2, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        o, state = half.forward(half.form(form))
        exact_o, exact_state = half.to(torch.float64).forward(half.form("naive"))
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    errors = difference({"o": o, "state": state}, {"o": exact_o, "state": exact_state})
    assert errors["o"] < TOLERANCE[variant, torch.bfloat16]
    # The router's probabilities and the state stay in fp32 (bf16 would err by 4e-3).
    assert errors["state"] < 1e-5, errors  # measured 1.1e-07


@forms
@variants
def test_no_initial_state_means_zeros(variant, options, form, make_case):
    case = make_case(variant, LENGTHS, resumed=False, **options)
    zeros = make_case(variant, LENGTHS, **options).initial_state.zero_()
    with torch.no_grad():
        left = case.forward(case.form(form))
        right = replace(case, initial_state=zeros).forward(case.form(form))
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


@forms
@variants
def test_a_sequence_can_be_resumed(variant, options, form, make_case):
    case = make_case(variant, [90], k=2, **options)
    with torch.no_grad():
        whole, final = case.forward(case.form(form))
        state, outputs = case.initial_state, []
        for rows in (slice(0, 33), slice(33, 34), slice(34, 90)):
            length = torch.tensor([0, rows.stop - rows.start])
            tokens = {name: x[rows] for name, x in case.tokens.items()}
            piece = replace(case, tokens=tokens, initial_state=state, cu_seqlens=length)
            o, state = piece.forward(case.form(form))
            outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-13)


@forms
@variants
def test_an_untouched_partition_keeps_its_state(variant, options, form, make_case, difference):
    case = make_case(variant, [40, 3], partitions=4, k=2, **options)
    case.tokens["logits"][:, 2] = -9.0
    with torch.no_grad():
        _, state = case.forward(case.form(form))
    assert torch.equal(state[:, 3], case.initial_state[:, 3])
    errors = difference(case.results(case.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, torch.float64], errors


@forms
@variants
def test_all_tokens_may_choose_one_partition(variant, options, form, make_case, difference):
    case = make_case(variant, [100, 17], **options)
    case.tokens["logits"][:, 1] += 20.0
    errors = difference(case.results(case.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, torch.float64], errors


@forms
@variants
def test_a_call_may_have_no_tokens_at_all(variant, options, form, make_case):
    case = make_case(variant, [0, 0], **options)
    o, state = case.forward(case.form(form))
    assert o.shape == (0, 2, 3)
    assert torch.equal(state, case.initial_state)


@forms
@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decays_are_exact(variant, options, form, dtype, make_case, difference):
    """Decays of e^-50 a token beside weak ones: sums of log-decays reach -2000 in a chunk."""
    case = make_case(variant, [70, 20], k=2, **options)
    for name in ("g1", "g2"):
        g = case.tokens[name]
        g[::3] = -50.0
        g[7] = -1000.0
        g[40:60, 0] = 0.0
    cast = case.to(dtype)
    errors = difference(cast.results(cast.form(form)), case.results(case.form("naive")))
    assert worst(errors) < TOLERANCE[variant, dtype], errors


def test_exact_and_fast_factors_of_gla_agree(make_case):
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 2, gla_chunk.CHUNK, 8, generator=rng, dtype=torch.float64)
    g = -torch.rand(q.shape, generator=rng, dtype=torch.float64)
    fast, exact = gla_chunk._fast(q, k, g), gla_chunk._exact(q, k, g)
    for x, y in zip(fast, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@forms
@variants
def test_not_a_number_stays_in_its_sequence(variant, options, form, make_case):
    case = make_case(variant, [20, 30], **options)
    for x in case.tokens.values():
        x[0] = float("nan")
    with torch.no_grad():
        o, state = case.forward(case.form(form))
    assert o[0].isnan().any()
    assert not o[20:].isnan().any()
    assert not state[1].isnan().any()


@variants
def test_replayed_ids_reproduce_the_live_choice(variant, options, make_case, difference):
    case = make_case(variant, [30], k=2, partitions=6, **options)
    ids = case.tokens["logits"].topk(2).indices
    replay = replace(case, ids=ids.to(torch.uint8))
    errors = difference(replay.results(case.form("chunk")), case.results(case.form("chunk")))
    assert worst(errors) == 0.0


@pytest.mark.parametrize("gate_after_norm", [False, True])
def test_the_norm_cancels_the_router_weight_of_gdn(gate_after_norm, make_case):
    """Up to eps: the gradient is 7e-07 at most, and 0.44 with the option."""
    case = make_case("gdn", [30], dk=16, gate_after_norm=gate_after_norm)
    gradient = case.results(case.form("chunk"))["dlogits"].abs().max()
    assert gradient > 1e-2 if gate_after_norm else gradient < 1e-5
