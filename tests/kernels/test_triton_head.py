"""The head's kernels in the interpreter: the passes over a block, against torch's."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import linear_logprob

pytest.importorskip("triton")
from sse_kernels.head import walk
from sse_kernels.head.torch_rows import TORCH
from sse_kernels.head.triton_op import head
from sse_kernels.head.triton_rows import TRITON

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds these cases")


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 40), (1, 1), (5, 16), (7, 40)])
def test_the_kernels_pass_over_blocks_as_torch_does(monkeypatch, tokens, vocabulary):
    monkeypatch.setattr(walk, "VOCAB_BLOCK", 16)
    monkeypatch.setattr(walk, "TOKEN_BLOCK", 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 3), torch.randn(vocabulary, 3)
    targets = torch.randint(0, vocabulary, (tokens,))
    x = walk.Operands(hidden, weight, targets, 0.7, torch.float32)
    results = []
    for rows in (TORCH, TRITON):
        logprobs, entropy, lse = walk.head_forward(x, rows)
        upstream = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
        found = walk.head_backward(x, rows, entropy, lse, *upstream)
        results.append((logprobs, entropy, lse, *found))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)  # measured 1e-6


def test_a_target_outside_the_vocabulary_gives_nan_and_nothing_to_its_neighbours():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    x = walk.Operands(hidden, weight, torch.tensor([-100, 3, 9]), 1.0, torch.float32)
    logprobs, entropy, _ = walk.head_forward(x, TRITON)
    assert logprobs.isnan().tolist() == [True, False, True]
    assert entropy.isfinite().all()


def test_the_operator_has_a_fake_and_a_gradient():
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 9))
    targets = torch.tensor([1, 0, 8])
    torch.library.opcheck(
        head,
        (hidden, weight, targets, 0.7, torch.float32),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    found, expected = (
        head(hidden, weight, targets, 0.7, torch.float32),
        linear_logprob(hidden, weight, targets, temperature=0.7),
    )
    for x, y in zip(found[:2], expected, strict=True):
        left, right = (
            torch.autograd.grad(z.sum(), (hidden, weight), retain_graph=True) for z in (x, y)
        )
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
