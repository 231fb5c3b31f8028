"""Log-probs and entropies of the language-model head, in blocks of logits."""

from __future__ import annotations

import pytest
import torch
from sse_kernels import linear_logits, linear_logprob
from sse_kernels.head import op, walk
from sse_kernels.head.torch_rows import TORCH


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(walk, "VOCAB_BLOCK", 8)
    monkeypatch.setattr(walk, "TOKEN_BLOCK", 4)


def problem(tokens=10, width=6, vocabulary=19, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


def gradients(logprobs, entropy, hidden, weight):
    sines = torch.arange(len(hidden), dtype=torch.float64).sin()
    loss = (logprobs * sines).sum() + (entropy * sines.flip(0)).sum()
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 5), (1, 1), (1, 8), (4, 9), (10, 19)])
def test_values_and_gradients_are_those_of_the_whole_softmax(tokens, vocabulary):
    hidden, weight, targets = problem(tokens, vocabulary=vocabulary)
    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature=0.7)
    exact = torch.distributions.Categorical(logits=hidden @ weight.T / 0.7, validate_args=False)
    expected = exact.log_prob(targets), exact.entropy()
    found = logprobs, entropy, *gradients(logprobs, entropy, hidden, weight)
    expected = *expected, *gradients(*expected, hidden, weight)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)  # measured 4e-15


def test_large_logits_cost_no_digits():
    """The entropy sums e^(z - m) (z - m): with z itself two large numbers would cancel."""
    hidden, weight, targets = problem(dtype=torch.float32)
    wide = torch.cat([hidden.detach(), torch.full((10, 1), 1000.0)], 1)
    heavy = torch.cat([weight.detach(), torch.ones(19, 1)], 1)
    exact = torch.distributions.Categorical(logits=wide.double() @ heavy.double().T)
    logprobs, entropy = linear_logprob(wide, heavy, targets)
    assert float((logprobs - exact.log_prob(targets)).abs().max()) < 3e-4  # measured 1.2e-4
    assert float((entropy - exact.entropy()).abs().max()) < 3e-4


@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "bfloat16"),
        ("float16", "bfloat16"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
def test_inputs_of_any_dtype_give_fp32_log_probs_and_gradients_of_their_own(dtypes):
    hidden, weight, targets = problem()
    rounded = [
        x.detach().to(getattr(torch, name)).requires_grad_()
        for x, name in zip((hidden, weight), dtypes, strict=True)
    ]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    found, expected = linear_logprob(*rounded, targets), linear_logprob(*exact, targets)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=2e-6)
    for x, y, name in zip(
        gradients(*found, *rounded), gradients(*expected, *exact), dtypes, strict=True
    ):
        assert x.dtype == getattr(torch, name)
        assert float((x.double() - y).norm() / y.norm()) < 3e-3  # rounding of the result, 1.7e-3


def test_one_gradient_alone_is_the_same_as_with_the_other():
    hidden, weight, targets = problem()
    both = torch.autograd.grad(linear_logprob(hidden, weight, targets)[0].sum(), (hidden, weight))
    for frozen in (0, 1):
        leaves = [hidden.detach(), weight.detach()]
        leaves[1 - frozen].requires_grad_()
        linear_logprob(*leaves, targets)[0].sum().backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, both[1 - frozen])


def test_logits_multiply_for_the_gradients_that_are_wanted_alone(monkeypatch):
    products = []

    def multiply(a, b, out):  # the CPU has no product of bf16 with sums of fp32
        products.append(out.shape)
        return out.copy_(a.float() @ b.float())

    monkeypatch.setattr(op, "multiply", multiply)
    hidden, weight, _ = problem(dtype=torch.bfloat16)
    for leaves in ((hidden.detach(), weight), (hidden, weight.detach())):
        op._Bf16Logits.apply(*leaves).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert products == [(10, 19), weight.shape, (10, 19), hidden.shape]


def test_tied_embeddings_gather_both_gradients():
    _, weight, targets = problem()
    linear_logprob(weight[targets], weight, targets)[0].sum().backward()
    logits = weight[targets] @ weight.T
    expected = torch.autograd.grad(logits.log_softmax(1).gather(1, targets[:, None]).sum(), weight)
    torch.testing.assert_close(weight.grad, expected[0])


def test_no_more_logits_live_than_a_block(monkeypatch):
    sizes = []

    def reduce(z, *others):
        sizes.append(tuple(z.shape))
        TORCH.reduce(z, *others)

    monkeypatch.setattr(op, "TORCH", TORCH._replace(reduce=reduce))
    linear_logprob(*problem())
    assert max(sizes) == (4, 8) and len(sizes) == 9


def test_logits_are_those_of_the_log_probs():
    hidden, weight, targets = problem(dtype=torch.float32)
    logits = linear_logits(hidden, weight)
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(linear_logprob(hidden, weight, targets)[0], logprobs)
    hidden, weight = (x.detach().bfloat16() for x in (hidden, weight))
    low = linear_logits(hidden[None], weight)
    exact = hidden.double() @ weight.double().T
    assert low.shape == (1, 10, 19) and low.dtype == torch.float32
    assert float((low[0] - exact).abs().max()) < 3e-6  # logits rounded to bf16: 3e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must be shape \[T, d\], got \[2, 3, 4\]"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be shape \[V, d\] with d = 4, got \[5, 3\]"),
        (
            {"targets": torch.zeros(3, dtype=torch.long)},
            r"targets must be \[T\] = \[2\], got \[3\]",
        ),
        ({"targets": torch.tensor([0, 5])}, r"targets must be in 0..4, got 0..5"),
        ({"targets": torch.tensor([-100, 1])}, r"targets must be in 0..4, got -100..1"),
        ({"targets": torch.zeros(2)}, "targets must have an integer dtype, got torch.float32"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(2, dtype=torch.long),
    } | change
    with pytest.raises((ValueError, TypeError), match=f"linear_logprob: {message}"):
        linear_logprob(**arguments)
