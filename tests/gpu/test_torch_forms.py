"""The torch forms on a GPU give the definition's results: they serve where no kernel does."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import (
    causal_conv,
    chunk_sse_gdn,
    chunk_sse_gla,
    naive_sse_gdn,
    naive_sse_gla,
    recurrent_sse_gdn,
    recurrent_sse_gla,
    route,
)
from torch import Tensor

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-12
FORMS = {
    "gla": (naive_sse_gla, chunk_sse_gla, recurrent_sse_gla),
    "gdn": (naive_sse_gdn, chunk_sse_gdn, recurrent_sse_gdn),
}
LENGTHS = [1, 0, 65, 30]


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("strength", [0.1, 50.0])
def test_torch_forms_agree_on_a_gpu(variant, strength):
    rng = torch.Generator().manual_seed(0)
    tokens, heads, width = sum(LENGTHS), 2, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).cuda().requires_grad_()

    logits, q1, k1, q2, k2, v = draw(tokens, 4), *(draw(tokens, heads, width) for _ in range(5))
    state = draw(len(LENGTHS), 5, heads, width, width)
    shape = (tokens, heads, width) if variant == "gla" else (tokens, heads)
    raw = [draw(*shape) for _ in range(2 if variant == "gla" else 4)]
    gates = [-strength * x.sigmoid() for x in raw]
    if variant == "gdn":
        gates[1], gates[3] = raw[1].sigmoid(), raw[3].sigmoid()
    leaves = [logits, q1, k1, q2, k2, v, *raw, state]

    def results(form) -> list[Tensor]:
        o, final = form(
            q1,
            k1,
            q2,
            k2,
            v,
            *gates,
            route(logits, 2),
            cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).cuda(),
            initial_state=state,
            output_final_state=True,
        )
        loss = o.sin().sum() + final.cos().sum()
        return [o, final, *torch.autograd.grad(loss, leaves, retain_graph=True)]

    naive, *others = FORMS[variant]
    expected = results(naive)
    for form in others:
        for ours, theirs in zip(results(form), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_convolution_is_the_same_on_a_gpu():
    x, weight = torch.randn(100, 8), torch.randn(8, 1, 4)
    ends = torch.tensor([0, 1, 1, 40, 100])
    expected, _ = causal_conv(x, weight, cu_seqlens=ends)
    ours, _ = causal_conv(x.cuda(), weight.cuda(), cu_seqlens=ends.cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-5)
