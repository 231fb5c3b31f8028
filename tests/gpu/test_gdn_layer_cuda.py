"""SSE-GDN's whole layer on a GPU: bf16 at real widths against fp64, bits, graphs, compilation."""

from __future__ import annotations

import pytest
import sse_kernels
import torch
from sse_kernels import route, sse_gdn_layer
from torch.nn.functional import silu, softplus
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu

# Relative Frobenius error against fp64 on the same rounded projections.
OUTPUT, GRADIENT, RATES = 5e-3, 1e-2, 2.5e-2
TOKENS = ["q1", "k1", "q2", "k2", "v", "a", "b"]
NAMES = [*TOKENS, "logits", "gate", "norm_weight", "A_log", "dt_bias"]


def problem(lengths, h, d, *, value_heads=None, dv=None, n=4, dtype=torch.bfloat16):
    """Leaves by name, router logits among them, and cu_seqlens."""
    torch.manual_seed(0)
    tokens, hv = sum(lengths), value_heads or h
    half = lambda *s: torch.randn(tokens, *s, device="cuda").to(dtype)
    values = hv, dv or d
    leaves = [half(h, d), half(h, d), half(h, d), half(h, d), half(*values)]
    leaves += [half(2 * hv), half(2 * hv), half(n).float(), half(*values)]
    leaves.append(1 + 0.1 * torch.randn(values[1], device="cuda"))
    leaves += [torch.rand(2 * hv, device="cuda"), torch.randn(2 * hv, device="cuda") - 3]
    named = dict(zip(NAMES, leaves, strict=True))
    return named, torch.tensor([0, *lengths], device="cuda").cumsum(0)


def exact_layer(
    q1, k1, q2, k2, v, a, b, routing, *, A_log, dt_bias, norm_weight, gate, eps,
    allow_neg_eigval=False, **rest,
):  # fmt: skip
    g1, g2 = (-A_log.exp() * softplus(a + dt_bias)).chunk(2, -1)
    beta1, beta2 = ((1 + allow_neg_eigval) * b.sigmoid()).chunk(2, -1)
    inputs = (silu(q1), silu(k1), silu(q2), silu(k2), silu(v), g1, beta1, g2, beta2, routing)
    o, state = sse_kernels.chunk_sse_gdn(*inputs, **rest)
    return sse_kernels.gated_rms_norm(o, norm_weight, gate, eps=eps), state


def run(layer, leaves, cu_seqlens, k, **options):
    named = {n: leaves[n] for n in NAMES[8:]}
    tokens, routing = (leaves[n] for n in TOKENS), route(leaves["logits"], k)
    return layer(*tokens, routing, eps=1e-6, cu_seqlens=cu_seqlens, **named, **options)[0]


def results(layer, leaves, *rest, **options):
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    y = run(layer, leaves, *rest, **options)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, device="cuda").bfloat16().to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)


@pytest.mark.parametrize(
    ("h", "d", "k", "shape", "options"),
    [
        (2, 128, 1, {}, {}),
        (2, 128, 2, {}, {"gate_after_norm": True, "allow_neg_eigval": True}),
        (2, 64, 3, {"value_heads": 4, "n": 8}, {"gate_after_norm": True}),
        (1, 256, 2, {}, {}),
        (2, 32, 1, {"dv": 48}, {"gate_after_norm": True}),
        (1, 128, 1, {"dtype": torch.float16}, {}),
    ],
)
def test_errors_stay_at_the_rounding_of_bf16(h, d, k, shape, options):
    leaves, cu_seqlens = problem([1, 63, 0, 200], h, d, **shape)
    double = {n: x.double() for n, x in leaves.items()}
    right = results(exact_layer, double, cu_seqlens, k, **options)
    found = results(sse_gdn_layer, leaves, cu_seqlens, k, **options)
    limits = {"y": OUTPUT, "a": RATES, "b": RATES, "A_log": RATES, "dt_bias": RATES}
    for name, x, y in zip(("y", *NAMES), found, right, strict=True):
        if name == "logits" and "gate_after_norm" not in options:
            continue  # the norm cancels the router's weight: rounding alone
        error = float((x.double() - y).norm() / y.norm())
        print(f"{name} {error:.1e}")
        assert error < limits.get(name, GRADIENT), (name, error)


def test_a_gate_of_zero_has_its_gradient():
    leaves, cu_seqlens = problem([1, 63, 200], 2, 128)
    leaves["gate"][::2] = 0
    leaves["gate"][1::4] = -200
    leaves["norm_weight"][5] = 0
    double = {n: x.double() for n, x in leaves.items()}
    right = results(exact_layer, double, cu_seqlens, 1)
    found = results(sse_gdn_layer, leaves, cu_seqlens, 1)
    for name, x, y in zip(("y", *NAMES), found, right, strict=True):
        if name != "logits":
            error = float((x.double() - y).norm() / y.norm())
            assert error < RATES, (name, error)


def test_runs_and_packings_are_equal_to_the_bit():
    leaves, cu_seqlens = problem([130, 63, 257], 2, 128)
    first = results(sse_gdn_layer, leaves, cu_seqlens, 1)
    again = results(sse_gdn_layer, leaves, cu_seqlens, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    shared = ("norm_weight", "A_log", "dt_bias")
    alone = {n: x if n in shared else x[130:193] for n, x in leaves.items()}
    with torch.no_grad():
        y = run(sse_gdn_layer, alone, torch.tensor([0, 63], device="cuda"), 1)
    assert torch.equal(y, first[0][130:193])


def test_a_captured_forward_and_backward_replays():
    leaves, cu_seqlens = problem([130, 70], 2, 128)
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}

    def step():
        y = run(sse_gdn_layer, leaves, cu_seqlens, 1)
        return y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_it_compiles_whole_under_activation_checkpointing():
    leaves, cu_seqlens = problem([130, 70], 2, 128)

    def block(*values):
        return run(sse_gdn_layer, dict(zip(NAMES, values, strict=True)), cu_seqlens, 1) * 2

    def step(form):
        values = [x.detach().requires_grad_() for x in leaves.values()]
        y = form(*values)
        return y.detach(), *torch.autograd.grad(y.float().sum(), values)

    kept = lambda *values: checkpoint(block, *values, use_reentrant=False)
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    for x, y in zip(step(compiled), step(block), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
