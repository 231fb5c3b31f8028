import math

import numpy as np
import pytest
import torch

from sse_rl.rollout.sampler import Knobs, check, sample, stream_key, uniforms
from sse_rl.types import SamplingParams

VOCAB = 50


def naive_sample(logits, temperature, top_k, top_p, min_p, uniform):
    """One row in plain Python, in vLLM's order: temperature, min-p, top-k, top-p."""
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        return int(logits.argmax()), float(logprobs.max())
    logprobs = (logits / temperature).log_softmax(-1)
    probs = logprobs.exp().tolist()
    kept = set(range(len(probs)))
    kept = {i for i in kept if probs[i] >= min_p * max(probs)}
    if top_k > 0:
        kth = sorted((probs[i] for i in kept), reverse=True)[min(top_k, len(kept)) - 1]
        kept = {i for i in kept if probs[i] >= kth}
    total, below = sum(probs[i] for i in kept), 0.0
    for i in sorted(kept, key=lambda i: probs[i]):
        below += probs[i] / total
        if below <= 1 - top_p and len(kept) > 1:
            kept.remove(i)
    threshold, below = uniform * sum(probs[i] for i in kept), 0.0
    for i in sorted(kept):
        below += probs[i]
        if below > threshold:
            return i, float(logprobs[i])
    raise AssertionError("nothing drawn")


def column(value, rows):
    return np.full(rows, value)


def test_rows_with_different_parameters_equal_a_naive_loop():
    rng, rows = np.random.default_rng(0), 400
    logits = torch.from_numpy(rng.normal(size=(rows, VOCAB)).astype(np.float32) * 2)
    knobs = Knobs(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7], rows),
        top_k=rng.choice([-1, 0, 1, 5, 49, 50, 1000], rows),
        top_p=rng.choice([0.05, 0.5, 0.9, 1.0], rows),
        min_p=rng.choice([0.0, 0.1, 0.5, 1.0], rows),
        uniform=rng.random(rows).astype(np.float32),
    )
    tokens, logprobs = sample(logits, knobs)
    for i in range(rows):
        token, logprob = naive_sample(
            logits[i],
            *(float(column[i]) for column in knobs[:1]),
            int(knobs.top_k[i]),
            *(float(c[i]) for c in knobs[2:]),
        )
        assert tokens[i] == token, f"row {i}: {[column[i] for column in knobs]}"
        assert math.isclose(logprobs[i], logprob, abs_tol=2e-6)


def test_frequencies_follow_the_probabilities():
    rows = 100_000
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(rows, -1)
    uniform = uniforms(np.full(rows, stream_key(3, 1), np.uint64), np.arange(rows))
    tokens, _ = sample(
        logits,
        Knobs(column(1.0, rows), column(0, rows), column(1.0, rows), column(0.0, rows), uniform),
    )
    frequency = torch.bincount(tokens, minlength=8) / rows
    assert (frequency - logits[0].softmax(-1)).abs().max() < 0.006  # four standard deviations


def test_random_numbers_are_a_function_of_seed_sample_and_token():
    keys = np.array([stream_key(0, 7, i) for i in range(3)], np.uint64)
    table = np.stack([uniforms(keys, np.full(3, t)) for t in range(4)])
    assert len(np.unique(table)) == 12
    assert uniforms(keys[1:2], np.array([2]))[0] == table[2, 1]
    assert stream_key(0, 8, 0) != keys[0] != stream_key(1, 7, 0)
    assert stream_key(0, -1, 0) != stream_key(0, 1, 0)


def test_neighbouring_streams_are_uncorrelated():
    keys = np.array([stream_key(0, seed, 0) for seed in range(64)], np.uint64)
    table = np.stack([uniforms(keys, np.full(64, t)) for t in range(2000)])
    assert abs(table.mean() - 0.5) < 0.004
    off_diagonal = np.corrcoef(table.T) - np.eye(64)
    assert np.abs(off_diagonal).max() < 0.12
    assert np.abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.012


def test_extreme_logits_never_draw_an_impossible_token():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 2] = 0.0
    logits[:, 4] = -40.0
    uniform = np.array([2.0**-24, 1 - 2.0**-24], np.float32)
    ones, zeros = np.ones(2), np.zeros(2)
    tokens, logprobs = sample(logits, Knobs(ones, zeros.astype(int), ones, zeros, uniform))
    assert tokens.tolist() == [2, 2] and logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2),
     ("min_p", 1.5), ("max_tokens", 0), ("stop", ("a", ""))],
)  # fmt: skip
def test_a_parameter_out_of_range_is_named(name: str, value: object):
    with pytest.raises(ValueError, match=f"{name} must be"):
        check(SamplingParams(**{name: value}))
