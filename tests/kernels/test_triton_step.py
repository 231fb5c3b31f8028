"""Decoding in Triton: one token a sequence, states changed in place at their slots."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import sse_kernels
from sse_kernels.delta.triton_step import triton_sse_gdn_step
from sse_kernels.gla.triton_step import triton_sse_gla_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("variant", "options"), [("gla", {}), ("gdn", {}), ("gdn", {"gate_after_norm": True})]
)
def test_the_step_changes_states_in_place(variant, options, k, make_case):
    shape = {"value_heads": 4, "dk": 16, "dv": 24, "partitions": 5, "k": k}
    case = make_case(variant, [3], dtype=torch.float32, **shape, **options)
    routing = sse_kernels.route(case.tokens["logits"], k)
    args = [x for name, x in case.tokens.items() if name != "logits"]
    states = torch.randn(6, *case.initial_state.shape[1:])
    expected, slots = states.clone(), torch.tensor([4, 1, 5])
    torch_step = getattr(sse_kernels, f"recurrent_sse_{variant}_step")
    o = torch_step(*args, routing, state=expected, slots=slots, **options)
    step = triton_sse_gla_step if variant == "gla" else triton_sse_gdn_step
    found = step(*args, routing, state=states, slots=slots, **options)
    torch.testing.assert_close(found, o)
    torch.testing.assert_close(states, expected)
