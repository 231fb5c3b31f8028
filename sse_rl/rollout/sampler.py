"""Draws one token a row from logits, each row with its own parameters and its own random stream."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sse_rl.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM."""


class Knobs(NamedTuple):
    """Sampling parameters of B rows, on the host: [B] arrays."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray
    """Random numbers in (0, 1), see `uniforms`."""


def sample(logits: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability.

    The order is vLLM's: temperature, min-p (against the largest probability), top-k, then top-p
    over what is left, renormalised; ties at the k-th value stay. The log-probability is
    log_softmax(logits / temperature) over the whole vocabulary, whatever is cut; at temperature 0
    the token is the argmax and the log-probability that of temperature 1.

    logits [B, V] -> tokens [B] int64 and log-probs [B] fp32, on the logits' device.
    """
    greedy = knobs.temperature < GREEDY_BELOW
    temperature = _column(np.where(greedy, 1.0, knobs.temperature), logits)
    logprobs = (logits.float() / temperature).log_softmax(-1)
    if greedy.all():
        tokens = logprobs.argmax(-1)
    else:
        tokens = _draw(_truncate(logprobs, knobs), _column(knobs.uniform, logits))
        if greedy.any():
            tokens = torch.where(_column(greedy, logits)[:, 0] > 0, logprobs.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def check(params: SamplingParams) -> None:
    """ValueError naming the first parameter out of range."""
    rules = {
        "n": (params.n >= 1, "at least 1"),
        "temperature": (params.temperature >= 0, "at least 0"),
        "top_p": (0 < params.top_p <= 1, "in (0, 1]"),
        "top_k": (params.top_k >= -1, "at least 1, or 0 or -1 for all tokens"),
        "min_p": (0 <= params.min_p <= 1, "in [0, 1]"),
        "max_tokens": (params.max_tokens >= 1, "at least 1"),
        "stop": (all(params.stop), "strings that are not empty"),
        "seeds": (len(params.seeds) in (0, params.n), f"one for each of n = {params.n} samples"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(params, name)!r}")


def stream_key(*numbers: int) -> int:
    """A 64-bit key of a tuple of integers: a random stream of its own for each (seed, sample)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mix((key + _GOLDEN) ^ np.uint64(number % 2**64))
    return int(key[0])


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """The counters' numbers of the keys' streams, [B] float32 in (0, 1).

    Counter-based: a pure function of its arguments (SplitMix64, Steele, Lea and Flood 2014).
    """
    bits = _mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _truncate(logprobs: Tensor, knobs: Knobs) -> Tensor:
    """Sets to -inf what min-p, top-k and top-p cut, in the rows that ask for it."""
    floor = np.flatnonzero(knobs.min_p > 0)
    if floor.size:
        rows = torch.from_numpy(floor).to(logprobs.device)
        some = logprobs[rows]
        floors = np.log(knobs.min_p[floor].astype(np.float64))
        cut = some < some.amax(-1, keepdim=True) + _column(floors, logprobs)
        logprobs = logprobs.index_copy(0, rows, some.masked_fill(cut, -torch.inf))
    width = logprobs.shape[-1]
    top_k = np.where((knobs.top_k > 0) & (knobs.top_k < width), knobs.top_k, width)
    ranked = np.flatnonzero((top_k < width) | (knobs.top_p < 1))
    if ranked.size:
        rows = torch.from_numpy(ranked).to(logprobs.device)
        kept = _keep_top(logprobs[rows], top_k[ranked], knobs.top_p[ranked])
        logprobs = logprobs.index_copy(0, rows, kept)
    return logprobs


def _keep_top(logprobs: Tensor, top_k: np.ndarray, top_p: np.ndarray) -> Tensor:
    ascending, order = logprobs.sort(dim=-1, stable=True)
    kth = torch.from_numpy(logprobs.shape[-1] - top_k).to(logprobs.device)[:, None]
    ascending = ascending.masked_fill(ascending < ascending.gather(1, kth), -torch.inf)
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - _column(top_p, logprobs)
    cut &= _column(top_p < 1, logprobs) > 0
    cut[:, -1] = False
    ascending = ascending.masked_fill(cut, -torch.inf)
    return torch.empty_like(logprobs).scatter_(1, order, ascending)


def _draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """First token whose cumulated probability exceeds `uniform` of the total, never a cut one."""
    probs = logprobs.softmax(
        -1
    )  # works row by row, where exp() may round the end of a tensor apart
    cumulated = probs.cumsum(-1).masked_fill(probs == 0, -1.0)
    return (cumulated > uniform * cumulated.amax(-1, keepdim=True)).byte().argmax(-1)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """[B] numbers as an fp32 column [B, 1] on the device of `like`."""
    return torch.from_numpy(values.astype(np.float32)[:, None]).to(like.device)
