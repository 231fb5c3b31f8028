from __future__ import annotations

import pytest
import torch

from sse_rl.learner.logprobs import token_logprobs


def test_chunks_change_neither_values_nor_gradients() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11)
    hidden, targets = torch.randn(10, 6), torch.randint(0, 11, (10,))
    results = []
    for max_logits in (1000, 33, 1):
        states = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(
            head, states, targets, vocab_size=11, temperature=0.7, max_logits=max_logits
        )
        head.zero_grad()
        (logprobs * torch.arange(10)).sum().backward()
        results.append((logprobs, entropy, states.grad, head.weight.grad.clone()))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    exact = torch.distributions.Categorical(logits=head(hidden) / 0.7)
    torch.testing.assert_close(results[0][0], exact.log_prob(targets))
    torch.testing.assert_close(results[0][1], exact.entropy())


def test_no_more_logits_live_than_allowed() -> None:
    sizes = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ torch.ones(4, 8)

    hidden = torch.randn(10, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(
        logits,
        hidden,
        torch.zeros(10, dtype=torch.long),
        vocab_size=8,
        temperature=1,
        max_logits=30,
    )
    assert max(sizes) == 3 and not entropy.requires_grad
    logprobs.sum().backward()
    assert len(sizes) == 8  # each chunk once more in the backward pass


@pytest.mark.parametrize("rows", [0, 1])
def test_few_tokens(rows: int) -> None:
    logprobs, entropy = token_logprobs(
        lambda h: h, torch.zeros(rows, 5), torch.zeros(rows, dtype=torch.long),
        vocab_size=5, temperature=1,
    )  # fmt: skip
    assert logprobs.shape == entropy.shape == (rows,)
