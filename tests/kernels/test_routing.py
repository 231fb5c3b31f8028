"""The router's choice, its weights and their gradients."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import route


def test_ties_go_to_the_lowest_index():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0], [0.0, 3.0, 1.0, 3.0]])
    assert route(logits, 1).ids.tolist() == [[0], [1], [1]]
    assert route(logits, 2).ids.tolist() == [[0, 1], [1, 2], [1, 3]]


def test_ids_ascend_and_weights_are_not_renormalised():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    routing = route(logits, 3)
    assert (routing.ids.diff(dim=-1) > 0).all()
    assert torch.equal(routing.weights, logits.softmax(-1).gather(1, routing.ids))
    best = logits.topk(3).indices.sort().values
    assert torch.equal(routing.ids, best)


def test_logits_of_low_precision_are_routed_in_fp32():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = route(logits, 2)
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.probs, logits.float().softmax(-1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_replayed_ids_take_live_weights_with_a_gradient(dtype):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[3, 0], [1, 2], [0, 1], [2, 3], [0, 3]], dtype=dtype)
    routing = route(logits, 2, ids=ids)
    assert routing.ids.dtype == torch.int64
    assert torch.equal(routing.ids, ids.long().sort().values)
    assert torch.equal(routing.weights, logits.softmax(-1).gather(1, routing.ids))
    (gradient,) = torch.autograd.grad(routing.weights[:, 0].sum(), logits)
    assert (gradient != 0).all()


def test_no_tokens_are_routed_too():
    routing = route(torch.zeros(0, 4), 2)
    assert routing.ids.shape == routing.weights.shape == (0, 2)
