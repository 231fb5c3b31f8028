"""SSE-GLA's whole layer on a GPU: bf16 at real widths against fp64, bits, graphs, compilation."""

from __future__ import annotations

import pytest
import sse_kernels
import torch
from sse_kernels import route, sse_gla_layer
from torch.nn.functional import logsigmoid, silu
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu

# Relative Frobenius error against fp64 on the same rounded projections.
OUTPUT, GRADIENT = 4e-3, 8e-3
NAMES = ["q1", "k1", "q2", "k2", "v", "gk1", "gk2", "logits", "gate", "norm_weight"]


def problem(lengths, h, d, *, value_heads=None, dv=None, n=4, steep=1.0):
    """Leaves by name, router logits among them, and cu_seqlens."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    half = lambda *s: torch.randn(tokens, *s, device="cuda").bfloat16()
    values = value_heads or h, dv or d
    leaves = [half(h, d), half(h, d), half(h, d), half(h, d), half(*values)]
    leaves += [half(h, d) * steep, half(h, d) * steep, half(n).float(), half(*values)]
    leaves.append(1 + 0.1 * torch.randn(values[1], device="cuda"))
    named = dict(zip(NAMES, leaves, strict=True))
    return named, torch.tensor([0, *lengths], device="cuda").cumsum(0)


def exact_layer(q1, k1, q2, k2, v, gk1, gk2, routing, *, norm_weight, gate, row_topk, eps, **rest):
    def classes(k):
        order = k.detach().sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.zeros_like(k, dtype=torch.bool).scatter(-1, order[..., row_topk:], True)
        return k.masked_fill(dropped, -torch.inf).softmax(-1)

    g1, g2 = (logsigmoid(x) / 16 for x in (gk1, gk2))
    inputs = (silu(q1), classes(k1), silu(q2), classes(k2), silu(v), g1, g2, routing)
    o, state = sse_kernels.chunk_sse_gla(*inputs, **rest)
    return sse_kernels.gated_rms_norm(o, norm_weight, gate, eps=eps), state


def run(layer, leaves, cu_seqlens, k, row_topk=None):
    return layer(
        *(leaves[n] for n in NAMES[:7]),
        route(leaves["logits"], k),
        norm_weight=leaves["norm_weight"],
        gate=leaves["gate"],
        eps=1e-6,
        row_topk=row_topk,
        cu_seqlens=cu_seqlens,
    )[0]


def results(layer, leaves, *rest):
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    y = run(layer, leaves, *rest)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, device="cuda").bfloat16().to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)


@pytest.mark.parametrize(
    ("h", "d", "k", "row_topk", "options"),
    [
        (2, 128, 1, None, {}),
        (2, 128, 2, 20, {}),
        (2, 64, 3, None, {"value_heads": 4, "n": 8}),
        (1, 256, 2, 64, {}),
        (2, 32, 1, None, {"dv": 48}),
        (1, 128, 2, None, {"steep": 600.0}),
    ],
)
def test_errors_stay_at_the_rounding_of_bf16(h, d, k, row_topk, options):
    leaves, cu_seqlens = problem([1, 63, 0, 200], h, d, **options)
    double = {n: x.double() for n, x in leaves.items()}
    right = results(exact_layer, double, cu_seqlens, k, row_topk or d)
    found = results(sse_gla_layer, leaves, cu_seqlens, k, row_topk)
    for name, x, y in zip(("y", *NAMES), found, right, strict=True):
        error = float((x.double() - y).norm() / y.norm())
        assert error < (OUTPUT if name == "y" else GRADIENT), (name, error)


def test_runs_and_packings_are_equal_to_the_bit():
    leaves, cu_seqlens = problem([130, 63, 257], 2, 128)
    first = results(sse_gla_layer, leaves, cu_seqlens, 1)
    again = results(sse_gla_layer, leaves, cu_seqlens, 1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    alone = {n: x if n == "norm_weight" else x[130:193] for n, x in leaves.items()}
    with torch.no_grad():
        y = run(sse_gla_layer, alone, torch.tensor([0, 63], device="cuda"), 1)
    assert torch.equal(y, first[0][130:193])


def test_a_captured_forward_and_backward_replays():
    leaves, cu_seqlens = problem([130, 70], 2, 128)
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}

    def step():
        y = run(sse_gla_layer, leaves, cu_seqlens, 1)
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
        return run(sse_gla_layer, dict(zip(NAMES, values, strict=True)), cu_seqlens, 1) * 2

    def step(form):
        values = [x.detach().requires_grad_() for x in leaves.values()]
        y = form(*values)
        return y.detach(), *torch.autograd.grad(y.float().sum(), values)

    kept = lambda *values: checkpoint(block, *values, use_reentrant=False)
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    for x, y in zip(step(compiled), step(block), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gated", [False, True])
def test_the_norm_is_torchs(gated):
    torch.manual_seed(0)
    o, gate = (torch.randn(300, 3, 200, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(200, device="cuda")
    y = sse_kernels.gated_rms_norm(o, weight, gate if gated else None, eps=1e-6)
    double = gate.double() if gated else None
    exact = sse_kernels.gated_rms_norm(o.double(), weight.double(), double, eps=1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=4e-3, atol=1e-6)
