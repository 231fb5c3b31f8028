"""The Triton kernels on a GPU: bf16 at real widths against fp64, bits, graphs, no waiting."""

from __future__ import annotations

import functools

import pytest
import sse_kernels
import torch

pytestmark = pytest.mark.gpu

# Relative Frobenius error against fp64 on the same rounded inputs.
OUTPUT, GRADIENT = 3e-3, 6e-3
SOFTMAX = functools.partial(torch.softmax, dim=-1)
NAMES = ("o", "dq1", "dk1", "dq2", "dk2", "dv", "dg1", "dg2", "dlogits")


def problem(lengths, h, d, n, *, value_heads=None, steep=False, dtype=torch.bfloat16):
    """Leaves q1 k1 q2 k2 v g1 g2 logits and cu_seqlens."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    normal = lambda *s: torch.randn(tokens, *s, device="cuda")
    silu = torch.nn.functional.silu
    # Activated, as in a model: products of queries of mixed sign cancel, their error does not.
    keys = [f(normal(h, d)) for f in (silu, SOFTMAX, silu, SOFTMAX)]
    leaves = [x.to(dtype) for x in (*keys, normal(value_heads or h, d))]
    decays = [torch.nn.functional.logsigmoid(normal(h, d)) / 16 for _ in range(2)]
    if steep:
        decays = [x * torch.tensor([1, 600.0], device="cuda").repeat(d // 2) for x in decays]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    return [*leaves, *decays, normal(n)], cu_seqlens


def results(form, leaves, cu_seqlens, k):
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = form(*leaves[:-1], sse_kernels.route(leaves[-1], k), cu_seqlens=cu_seqlens)[0]
    torch.manual_seed(1)
    do = torch.randn(o.shape, device="cuda", dtype=torch.bfloat16).to(o.dtype)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize(
    ("h", "value_heads", "d", "n", "k", "steep"),
    [
        (2, 2, 128, 4, 1, False),
        (2, 4, 64, 8, 3, False),
        (1, 1, 256, 4, 2, False),
        (2, 2, 32, 4, 1, False),
        (1, 1, 128, 4, 2, True),
    ],
)
def test_errors_stay_at_the_rounding_of_bf16(h, value_heads, d, n, k, steep):
    leaves, cu_seqlens = problem([1, 63, 0, 200], h, d, n, value_heads=value_heads, steep=steep)
    exact = results(sse_kernels.chunk_sse_gla, [x.double() for x in leaves], cu_seqlens, k)
    found = results(sse_kernels.sse_gla, leaves, cu_seqlens, k)
    for name, x, y in zip(NAMES, found, exact, strict=True):
        error = float((x.double() - y).norm() / y.norm())
        assert error < (OUTPUT if name == "o" else GRADIENT), (name, error)


def test_inputs_of_several_dtypes_are_read_in_the_widest():
    leaves, cu_seqlens = problem([100, 200], 1, 128, 4)
    wide = [leaves[0], leaves[1], *(x.double() for x in leaves[2:])]
    with pytest.raises(ValueError, match=r"q2 must be torch.bfloat16 as q1, got torch.float64"):
        results(sse_kernels.sse_gla, wide, cu_seqlens, 1)
    for i in (2, 3):  # q2 and k2 hold more than bf16 does
        leaves[i] = leaves[i].float() * 1.001
    exact = results(sse_kernels.chunk_sse_gla, [x.double() for x in leaves], cu_seqlens, 1)
    found = results(sse_kernels.sse_gla, leaves, cu_seqlens, 1)
    for name, x, y in zip(NAMES, found, exact, strict=True):
        error = float((x.double() - y).norm() / y.norm())
        assert error < (3e-3 if x.dtype == torch.bfloat16 else 1e-5), (name, error)


def test_runs_and_packings_are_equal_to_the_bit():
    leaves, cu_seqlens = problem([130, 63, 257], 2, 128, 4)
    first = results(sse_kernels.sse_gla, leaves, cu_seqlens, 1)
    again = results(sse_kernels.sse_gla, leaves, cu_seqlens, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    rows = slice(130, 193)
    alone, bounds = [x[rows] for x in leaves], torch.tensor([0, 63], device="cuda")
    with torch.no_grad():
        routing = sse_kernels.route(alone[-1], 1)
        o, _ = sse_kernels.sse_gla(*alone[:-1], routing, cu_seqlens=bounds)
    assert torch.equal(o, first[0][rows])


def test_nothing_waits_for_the_device():
    leaves, cu_seqlens = problem([130, 70], 2, 128, 4)
    results(sse_kernels.sse_gla, leaves, cu_seqlens, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(sse_kernels.sse_gla, leaves, cu_seqlens, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", ["gla", "gdn"])
def test_a_captured_step_changes_the_states_in_place(variant):
    torch.manual_seed(0)
    h, d, n, batch = 2, 128, 4, 3
    normal = lambda *s: torch.randn(batch, h, *s, device="cuda", dtype=torch.bfloat16)
    width = (d,) if variant == "gla" else ()
    decays = [-torch.rand(batch, h, *width, device="cuda") for _ in range(2)]
    gates = decays if variant == "gla" else [decays[0], decays[0].exp(), decays[1], decays[1].exp()]
    args = [*(normal(d) for _ in range(5)), *gates]
    routing = sse_kernels.route(torch.randn(batch, n, device="cuda"), 2)
    state = torch.randn(6, 1 + n, h, d, d, device="cuda")
    expected, slots = state.clone(), torch.tensor([4, 1, 5], device="cuda")
    step = getattr(sse_kernels, f"sse_{variant}_step")
    step(*args, routing, state=state.clone(), slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(*args, routing, state=state, slots=slots)
    graph.replay()
    torch_step = getattr(sse_kernels, f"recurrent_sse_{variant}_step")
    right = torch_step(*args, routing, state=expected, slots=slots)
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)


def test_the_operator_compiles_without_a_break():
    leaves, cu_seqlens = problem([130, 70], 2, 128, 4)

    def loss(*leaves):
        routing = sse_kernels.route(leaves[-1], 1)
        return sse_kernels.sse_gla(*leaves[:-1], routing, cu_seqlens=cu_seqlens)[0].float().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in leaves]
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for x, y in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, y)
