"""The head's kernels in the interpreter: the passes over a block, against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sse_kernels.head import torch_rows, triton_rows, walk

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
    for rows in (torch_rows, triton_rows):
        logprobs, entropy, lse = walk.head_forward(x, rows)
        upstream = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
        found = walk.head_backward(x, entropy, lse, *upstream, rows=rows)
        results.append((logprobs, entropy, lse, *found))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)  # measured 1e-6


def test_a_target_outside_the_vocabulary_gives_nan_and_nothing_to_its_neighbours():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    x = walk.Operands(hidden, weight, torch.tensor([-100, 3, 9]), 1.0, torch.float32)
    logprobs, entropy, _ = walk.head_forward(x, triton_rows)
    assert logprobs.isnan().tolist() == [True, False, True]
    assert entropy.isfinite().all()
