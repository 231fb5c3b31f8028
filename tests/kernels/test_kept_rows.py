"""What the Triton forms keep for the backward pass, at the benchmark's size, on fake tensors; and
the same forms compiled whole and recomputed, in triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from sse_kernels import route
from sse_kernels.delta.triton_chunk import triton_sse_gdn
from sse_kernels.delta.triton_layer import triton_sse_gdn_layer
from sse_kernels.gla.triton_chunk import triton_sse_gla
from sse_kernels.gla.triton_layer import triton_sse_gla_layer

FORMS = {
    "gla": triton_sse_gla,
    "gdn": triton_sse_gdn,
    "gla_layer": triton_sse_gla_layer,
    "gdn_layer": triton_sse_gdn_layer,
}
PARTITIONS = 4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases")


def make_leaves(variant, tokens, heads, width, dtype):
    """Tensors by position and by name that a form takes beside its routing; the router's logits."""
    torch.manual_seed(0)
    x = lambda *shape, like=dtype: torch.randn(tokens, *shape, dtype=like).requires_grad_()
    half = lambda: x(heads, width)
    decay = lambda *shape: (-x(*shape, like=torch.float32).detach().exp()).requires_grad_()
    leaves, named = [half() for _ in range(5)], {}
    if variant.endswith("layer"):
        named = {"gate": half(), "norm_weight": torch.ones(width, dtype=dtype, requires_grad=True)}
    if variant == "gla":
        leaves += [decay(heads, width), decay(heads, width)]
    elif variant == "gla_layer":
        leaves += [half(), half()]
    elif variant == "gdn":
        leaves += [y for _ in "12" for y in (decay(heads), x(heads, like=torch.float32))]
    else:
        leaves += [x(2 * heads), x(2 * heads)]
        named |= {n: torch.ones(2 * heads, requires_grad=True) for n in ("A_log", "dt_bias")}
    return leaves, named, x(PARTITIONS, like=torch.float32)


def call(variant, leaves, named, logits, cu_seqlens, k):
    eps = {"eps": 1e-6} if variant.endswith("layer") else {}
    routing = route(logits, k)
    return FORMS[variant](*leaves, routing, cu_seqlens=cu_seqlens, **named, **eps)[0]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("variant", "decays", "most"),
    # bf16 rows of width H * D. Router and plan take 0.01 of one, GDN's scalars a head 0.03 to 0.06,
    # a layer's norms 0.02. The activated inputs of SSE-GLA with fp32 decays are 9.004 themselves.
    [
        ("gla", torch.float32, 9.02),
        ("gla", torch.bfloat16, 7.02),
        ("gdn", torch.float32, 5.09),
        ("gla_layer", torch.float32, 8.04),
        ("gdn_layer", torch.float32, 6.08),
    ],
)
def test_rows_kept_for_the_backward_pass(variant, decays, most, k):
    tokens, heads, width = 16384, 16, 128
    kept: dict[int, int] = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode():
        leaves, named, logits = make_leaves(variant, tokens, heads, width, torch.bfloat16)
        if decays != torch.float32:
            leaves[5:] = [g.detach().to(decays).requires_grad_() for g in leaves[5:]]
        with saved_tensors_hooks(keep, lambda x: x):
            y = call(variant, leaves, named, logits, torch.arange(9) * 2048, k)
        for x in (*leaves, *named.values(), logits):
            keep(x)
        # What takes the output keeps it, be it asked for here or not.
        kept.pop(y.untyped_storage()._cdata, None)
    row = tokens * heads * width * 2
    assert sum(kept.values()) / row < most + 0.005 * (k - 1)
    assert sum(kept.values()) / row > int(most)


@pytest.mark.parametrize(
    "variant",
    ["gdn_layer", *(pytest.param(v, marks=pytest.mark.slow) for v in ("gdn", "gla_layer"))],
)
def test_a_form_compiles_whole_under_activation_checkpointing(variant):
    leaves, named, logits = make_leaves(variant, 5, 1, 16, torch.float32)
    names, cu_seqlens = list(named), torch.tensor([0, 2, 5])
    inputs = (*leaves, *named.values(), logits)

    def block(*values):
        by_name = dict(zip(names, values[len(leaves) : -1], strict=True))
        y = call(variant, values[: len(leaves)], by_name, values[-1], cu_seqlens, 2)
        return y * 2

    def step(form):
        y = form(*inputs)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)

    recomputed = lambda *values: checkpoint(block, *values, use_reentrant=False)
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    right = step(block)
    assert all(map(torch.equal, step(recomputed), right))
    for x, y in zip(step(compiled), right, strict=True):
        torch.testing.assert_close(x, y)
