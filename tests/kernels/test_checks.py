"""Wrong arguments: the error names the argument, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sse_kernels import (
    Routing,
    causal_conv,
    causal_conv_step,
    gated_rms_norm,
    route,
    sse_gdn,
    sse_gdn_step,
    sse_gla,
    sse_gla_step,
)

WRONG_TENSORS = [
    ("gla", "q1", lambda x: x[0], r"q1 must be shape \[T, H, Dk\], got \[2, 5\]"),
    ("gla", "k2", lambda x: x[:, :1], r"k2 must be \[T, H, Dk\] = \[6, 2, 5\], got \[6, 1, 5\]"),
    ("gla", "g1", lambda x: x[:3], r"g1 must be \[T, H, Dk\] = \[6, 2, 5\], got \[3, 2, 5\]"),
    ("gla", "v", lambda x: x[:, 0], r"v must be shape \[T, Hv, Dv\], got \[6, 3\]"),
    ("gla", "v", lambda x: x.repeat(1, 2, 1)[:, :3], r"a multiple of H = 2, got 3"),
    ("gla", "v", lambda x: x.long(), r"v must have a floating dtype, got torch.int64"),
    ("gla", "q2", lambda x: x.to("meta"), r"q2 must be on cpu, got meta"),
    ("gla", "q1", lambda x: x.float(), r"k1 must be torch.float32 as q1, got torch.float64"),
    ("gdn", "k2", lambda x: x.float(), r"k2 must be torch.float64 as q1, got torch.float32"),
    ("gdn", "v", lambda x: x.bfloat16(), r"v must be torch.float64 as q1, got torch.bfloat16"),
    ("gdn", "beta2", lambda x: x[:, :1], r"beta2 must be \[T, Hv\] = \[6, 2\], got \[6, 1\]"),
    ("gdn", "g1", lambda x: x[..., None], r"g1 must be \[T, Hv\] = \[6, 2\], got \[6, 2, 1\]"),
]
WRONG_LENGTHS = [
    ([0, 5], r"cu_seqlens must be from 0 to T = 6, got 0..5"),
    ([1, 6], r"cu_seqlens must be from 0 to T = 6, got 1..6"),
    ([0, 4, 2, 6], r"cu_seqlens must be non-decreasing, got \[4, 2\] at index 1"),
    ([0], r"cu_seqlens must be shape \[B \+ 1\] with B >= 1, got \[1\]"),
]
WRONG_IDS = [
    ([[0, 4]], r"ids must be in 0..3, got 0..4"),
    ([[-1, 1]], r"ids must be in 0..3, got -1..1"),
    ([[2, 2]], r"ids must be distinct in each row, got \[2, 2\] in row 0"),
    ([[1]], r"ids must be \[T, K\] = \[1, 2\], got \[1, 1\]"),
]


def call(case, **changed):
    tokens = {**case.tokens, **changed}
    routing = changed.get("routing") or route(tokens["logits"], case.k)
    args = [x for name, x in tokens.items() if name not in ("logits", "routing", "cu_seqlens")]
    op = {"gla": sse_gla, "gdn": sse_gdn}[case.variant]
    return op(*args, routing, cu_seqlens=case.cu_seqlens, initial_state=case.initial_state)


@pytest.mark.parametrize(("variant", "name", "break_it", "message"), WRONG_TENSORS)
def test_a_wrong_tensor_is_named(variant, name, break_it, message, make_case):
    case = make_case(variant, [6])
    with pytest.raises((ValueError, TypeError), match=f"sse_{variant}: .*{message}"):
        call(case, **{name: break_it(case.tokens[name])})


@pytest.mark.parametrize(("bounds", "message"), WRONG_LENGTHS)
def test_wrong_sequence_bounds_are_refused(bounds, message, make_case):
    case = replace(make_case("gla", [6]), cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=message):
        call(case)
    with pytest.raises(ValueError, match=message):
        causal_conv(torch.zeros(6, 2), torch.zeros(2, 1, 4), cu_seqlens=case.cu_seqlens)


def test_sequence_bounds_of_floats_are_refused(make_case):
    case = replace(make_case("gla", [6]), cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int64, got torch.float32"):
        call(case)


@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_wrong_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 4), 2, ids=torch.tensor(ids))


def test_a_routing_that_does_not_fit_is_refused(make_case):
    case = make_case("gdn", [6], k=2)
    routing = route(case.tokens["logits"], 2)
    short = Routing(*(x[:5] for x in routing))
    with pytest.raises(ValueError, match=r"ids must be \[T, K\] = \[6, 2\], got \[5, 2\]"):
        call(case, routing=short)
    outside = routing._replace(ids=routing.ids + 3)
    with pytest.raises(ValueError, match=r"sse_gdn: ids must be in 0..3, got "):
        call(case, routing=outside)


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(3, 4), 5, r"k must be an integer from 1 to N = 4, got 5"),
        (torch.zeros(3, 4), 1.5, r"k must be an integer from 1 to N = 4, got 1.5"),
        (torch.zeros(3, 4), 0, r"k must be an integer from 1 to N = 4, got 0"),
        (torch.zeros(3, 257), 1, r"N must be 1 to 256, got 257"),
        (torch.zeros(4), 1, r"logits must be shape \[T, N\], got \[4\]"),
    ],
)
def test_routing_bounds(logits, k, message):
    with pytest.raises(ValueError, match=f"route: {message}"):
        route(logits, k)


def test_a_wrong_initial_state_is_named(make_case):
    case = make_case("gla", [4, 2])
    transposed = replace(case, initial_state=case.initial_state.mT)
    message = (
        r"initial_state must be \[B, 1\+N, Hv, Dv, Dk\] = \[2, 5, 2, 3, 5\], got \[2, 5, 2, 5, 3\]"
    )
    with pytest.raises(ValueError, match=message):
        call(transposed)


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_wrong_slots_and_states_are_named(variant, make_case):
    case = make_case(variant, [2])
    args = [x for name, x in case.tokens.items() if name != "logits"]
    routing, op = (
        route(case.tokens["logits"], 1),
        {"gla": sse_gla_step, "gdn": sse_gdn_step}[variant],
    )
    state = torch.zeros(3, 5, 2, 3, 5)
    with pytest.raises(ValueError, match=r"slots must be in 0..2, got 1..3"):
        op(*args, routing, state=state, slots=torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"slots must be \[B\] = \[2\], got \[1\]"):
        op(*args, routing, state=state, slots=torch.tensor([1]))
    with pytest.raises(TypeError, match=r"slots must be int64, got torch.int32"):
        op(*args, routing, state=state, slots=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k1 must be torch.float32 as q1, got torch.float64"):
        op(args[0].float(), *args[1:], routing, state=state, slots=torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"state must be \[S, \*\[5, 2, 3, 5\]\], got \[3, 4, 2, 3, 5\]"
    ):
        op(*args, routing, state=state[:, 1:], slots=torch.tensor([0, 1]))


def test_convolution_and_norm_name_their_arguments():
    x, weight, ends = torch.zeros(6, 2), torch.zeros(2, 1, 4), torch.tensor([0, 6])
    with pytest.raises(
        ValueError, match=r"weight must be \[C, 1, W\] = \[2, 1, 4\], got \[3, 1, 4\]"
    ):
        causal_conv(x, torch.zeros(3, 1, 4), cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"initial must be \[B, C, W-1\] = \[1, 2, 3\]"):
        causal_conv(x, weight, cu_seqlens=ends, initial=torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"state must be \[S, \*\[2, 3\]\], got \[4, 3, 2\]"):
        causal_conv_step(x, weight, state=torch.zeros(4, 3, 2), slots=torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"weight must be \[Dv\] = \[2\], got \[3\]"):
        gated_rms_norm(x, torch.zeros(3), eps=1e-6)
    with pytest.raises(ValueError, match=r"gate must be the shape of o = \[6, 2\], got \[6, 1\]"):
        gated_rms_norm(x, torch.zeros(2), x[:, :1], eps=1e-6)
    with pytest.raises(ValueError, match=r"o must be shape \[..., Dv\] with Dv >= 1, got \[6, 0\]"):
        gated_rms_norm(x[:, :0], torch.zeros(0), eps=1e-6)


def test_the_package_needs_torch_alone():
    """Importing and running it loads no other of our packages, and no triton if there is none."""
    script = """
import sys
sys.modules["triton"] = None
import torch, sse_kernels
routing = sse_kernels.route(torch.randn(3, 4), 1)
x = [torch.randn(3, 2, 8) for _ in range(5)]
g = [-torch.rand(3, 2, 8) for _ in range(2)]
sse_kernels.sse_gla(*x, *g, routing, cu_seqlens=torch.tensor([0, 3]))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"sse_rl", "sse_rewards", "sse_eval", "transformers"}, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
