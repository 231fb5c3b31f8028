"""A whole layer's decode step: projections in, normed and gated output out."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import sse_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "plain": {},
    "wide": {"value_heads": 4, "dv": 40, "n": 6, "k": 3},
    "narrow": {"dk": 24, "dv": 8, "n": 1},
}
OPTIONS = {
    "gla": [{}, {"row_topk": 5}],
    "gdn": [{}, {"allow_neg_eigval": True, "gate_after_norm": True}],
}
CASES = [
    pytest.param(variant, shape, options, id=f"{variant}-{name}-{i}")
    for variant, all_options in OPTIONS.items()
    for name, shape in SHAPES.items()
    for i, options in enumerate(all_options)
]


def layer(
    variant: str, *, batch: int = 3, heads: int = 2, value_heads: int = 2, dk: int = 16,
    dv: int = 16, n: int = 4, k: int = 1,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    """Positional and keyword arguments of the step; v and the gate are slices of one tensor."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    q1, k1, q2, k2 = (2 * normal(batch, heads, dk) for _ in range(4))
    v, gate = normal(batch, 2, value_heads, dv).unbind(1)
    logits = normal(batch, n)
    named = {
        "k": k, "norm_weight": normal(dv), "gate": gate, "eps": 1e-6,
        "state": normal(6, 1 + n, value_heads, dv, dk), "slots": torch.tensor([4, 1, 5])[:batch],
    }  # fmt: skip
    if variant == "gla":
        return [q1, k1, q2, k2, v, *(3 * normal(batch, heads, dk) for _ in range(2)), logits], named
    rates = {"A_log": normal(2 * value_heads), "dt_bias": normal(2 * value_heads)}
    a, b = (normal(batch, 2 * value_heads) for _ in range(2))
    return [q1, k1, q2, k2, v, a, b, logits], named | rates


def torch_form(variant: str, args: list[Tensor], named: dict[str, Any]) -> tuple[Tensor, ...]:
    """Output, new state, ids, weights and probabilities."""
    state = named["state"].clone()
    form = getattr(sse_kernels, f"sse_{variant}_layer_step")
    o, routing = form(*args, **named | {"state": state})
    return o, state, *routing


def triton_form(variant: str, args: list[Tensor], named: dict[str, Any]) -> tuple[Tensor, ...]:
    from sse_kernels.triton_layer_step import triton_layer_step

    state, options = named["state"].clone(), dict(named)
    rates = (options.pop("A_log"), options.pop("dt_bias")) if variant == "gdn" else None
    *streams, d1, d2, logits = args
    options |= {"ids": options.pop("ids", None), "state": state}
    o, routing = triton_layer_step(*streams, (d1, d2), rates, logits, **options)
    return o, state, *routing


needs_interpreter = pytest.mark.skipif(
    not importlib.util.find_spec("triton") or torch.cuda.is_available(),
    reason="needs triton's interpreter; tests/gpu holds these cases on a GPU",
)
forms = pytest.mark.parametrize(
    "step", [torch_form, pytest.param(triton_form, marks=needs_interpreter)]
)


def by_hand(variant: str, args: list[Tensor], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """From the definition: every sequence is one token long and starts from its slot's state."""
    q1, k1, q2, k2, v, d1, d2, logits = args
    routing = sse_kernels.route(logits, named["k"], ids=named.get("ids"))
    ends = {"cu_seqlens": torch.arange(len(v) + 1), "output_final_state": True}
    ends["initial_state"] = named["state"][named["slots"]]
    if variant == "gla":
        k1, k2 = (sse_kernels.classify(x, named.get("row_topk")) for x in (k1, k2))
        gates = [F.logsigmoid(d1) / 16, F.logsigmoid(d2) / 16]
        inputs = [F.silu(q1), k1, F.silu(q2), k2, F.silu(v), *gates]
        o, final = sse_kernels.naive_sse_gla(*inputs, routing, **ends)
    else:
        g = -named["A_log"].exp() * F.softplus(d1 + named["dt_bias"])
        beta = d2.sigmoid() * (2 if named.get("allow_neg_eigval") else 1)
        gates = [x for pair in zip(g.chunk(2, -1), beta.chunk(2, -1), strict=True) for x in pair]
        inputs = [F.silu(x) for x in (q1, k1, q2, k2, v)]
        o, final = sse_kernels.naive_sse_gdn(
            *inputs, *gates, routing, gate_after_norm=named.get("gate_after_norm", False), **ends
        )
    assert final is not None
    state = named["state"].clone()
    state[named["slots"]] = final
    o = o * (o.square().mean(-1, keepdim=True) + named["eps"]).rsqrt() * named["norm_weight"]
    return (o if named["gate"] is None else o * F.silu(named["gate"])), state


@forms
@pytest.mark.parametrize(("variant", "shape", "options"), CASES)
def test_the_step_is_the_definition(variant, shape, options, step):
    args, named = layer(variant, **shape)
    found, state, ids, weights, probs = step(variant, args, named | options)
    right, right_state = by_hand(variant, args, named | options)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)  # measured 3e-6
    torch.testing.assert_close(state, right_state, rtol=1e-5, atol=1e-5)
    routing = sse_kernels.route(args[-1], named["k"])
    assert torch.equal(ids.long(), routing.ids)
    torch.testing.assert_close(weights, routing.weights)
    torch.testing.assert_close(probs, routing.probs)


@forms
@pytest.mark.parametrize("variant", OPTIONS)
def test_recorded_partitions_replay_in_any_order(variant, step):
    args, named = layer(variant, n=6, k=3)
    ids = torch.tensor([[5, 0, 2], [1, 4, 3], [0, 1, 5]], dtype=torch.uint8)
    found = step(variant, args, named | {"ids": ids})
    right, right_state = by_hand(variant, args, named | {"ids": ids})
    torch.testing.assert_close(found[0], right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], right_state, rtol=1e-5, atol=1e-5)
    assert found[2].tolist() == ids.sort(-1).values.tolist()
    again = step(variant, args, named | {"ids": found[2]})
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@needs_interpreter
@pytest.mark.parametrize("variant", OPTIONS)
def test_a_partition_that_does_not_exist_is_skipped(variant):
    args, named = layer(variant, n=5, k=2)  # a tile of the router holds 8
    wrong = torch.tensor([[7, 2], [-1, 300], [3, 3]])
    o, state, ids, weights, probs = triton_form(variant, args, named | {"ids": wrong})
    assert ids.tolist() == [[2, 0], [0, 0], [3, 0]]
    torch.testing.assert_close(weights[:, 0], probs[[0, 1, 2], [2, 0, 3]] * torch.tensor([1, 0, 1]))
    assert not weights[:, 1].any()
    touched = torch.zeros(6, 6, dtype=torch.bool)
    touched[4, [0, 3]] = touched[1, 0] = touched[5, [0, 4]] = True
    assert torch.equal((state != named["state"]).flatten(2).any(-1), touched)
    args, single = layer(variant, n=5, k=2)
    right = triton_form(variant, args, single | {"k": 1, "ids": torch.tensor([[2], [0], [3]])})
    for b in (0, 2):
        assert torch.equal(o[b], right[0][b])
    assert o.isfinite().all()


@forms
def test_equal_logits_and_equal_keys_choose_the_lowest(step):
    args, named = layer("gla", n=6, k=2)
    args[-1][:] = torch.tensor([0.0, 1, 0, 1, 1, 0])
    args[1][:, :, 3:] = 1.0
    found = step("gla", args, named | {"row_topk": 4})
    right, _ = by_hand("gla", args, named | {"row_topk": 4})
    assert found[2].tolist() == [[1, 3]] * 3
    torch.testing.assert_close(found[0], right, rtol=1e-5, atol=1e-5)


@forms
@pytest.mark.parametrize("variant", OPTIONS)
def test_a_row_does_not_depend_on_its_company(variant, step):
    args, named = layer(variant)
    found = step(variant, args, named)
    row = [x[1:2] for x in args]
    alone = named | {"slots": named["slots"][1:2], "gate": named["gate"][1:2]}
    single = step(variant, row, alone)
    assert torch.equal(single[0], found[0][1:2])
    assert torch.equal(single[1][1], found[1][1])


@forms
@pytest.mark.parametrize("variant", OPTIONS)
def test_a_layer_without_a_gate_is_only_normed(variant, step):
    args, named = layer(variant)
    found = step(variant, args, named | {"gate": None})
    right, _ = by_hand(variant, args, named | {"gate": None})
    torch.testing.assert_close(found[0], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("k", 5, "k must be an integer from 1 to N = 4, got 5"),
        ("k", 1.0, "k must be an integer from 1 to N = 4, got 1.0"),
        ("norm_weight", torch.ones(3), r"norm_weight must be \[Dv\] = \[16\], got \[3\]"),
        ("gate", torch.ones(3, 2, 8), r"gate must be the shape of v = \[3, 2, 16\]"),
        ("ids", torch.tensor([[0], [1], [4]]), r"ids must be in 0..3, got 0..4"),
        ("slots", torch.tensor([0, 1, 6]), r"slots must be in 0..5, got 0..6"),
        ("state", torch.zeros(6, 4, 2, 16, 16), "state must be"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(variant, name, wrong, message):
    args, named = layer(variant)
    before = named["state"].clone()
    with pytest.raises(ValueError, match=f"sse_{variant}_layer_step: {message}"):
        getattr(sse_kernels, f"sse_{variant}_layer_step")(*args, **named | {name: wrong})
    assert torch.equal(named["state"], before)
