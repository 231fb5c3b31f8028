"""The numbers of an evaluation, from right and wrong: plain functions of arrays.

`scores` is one array a problem, [samples there are] of 0..1. Problems without any sample are left
out by the caller. Everything random is seeded here: the same scores give the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

Scores = Sequence[np.ndarray]
Interval = tuple[float, float]

_NORMAL = NormalDist()
_SEED = 0
_CHUNK = 500  # resamples at a time


def average(scores: Scores) -> float:
    """avg@k: mean over problems of the mean over samples."""
    return float(np.mean([s.mean() for s in scores]))


def pass_at(scores: Scores, k: int) -> float:
    """Unbiased pass@k, 1 - C(n-c, k)/C(n, k), mean over problems (Chen et al., arXiv:2107.03374).

    Raises ValueError if a problem has fewer than k samples.
    """
    return float(np.mean([_pass_at(len(s), int(s.sum()), k) for s in scores]))


def _pass_at(n: int, c: int, k: int) -> float:
    if n < k:
        raise ValueError(f"pass@{k} needs {k} samples of each problem, one has {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[Sequence[Hashable | None]], right: Sequence[Hashable]) -> float:
    """maj@k: the score of each problem's most frequent answer; a tie is split among the tied.

    votes: a problem's answers, None where a sample gave none (it does not vote; with no vote at
    all the problem scores 0). right: each problem's right answer.
    """
    return float(np.mean([_majority(v, r) for v, r in zip(votes, right, strict=True)]))


def _majority(votes: Sequence[Hashable | None], right: Hashable) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    return (right in leaders) / len(leaders)


def sampling_interval(scores: Scores, *, level: float = 0.95) -> Interval | None:
    """Where avg@k would fall if the same problems were asked again; None if one has 1 sample.

    Var = sum_i p_i (1 - p_i)/(n_i - 1) / P^2, unbiased, then Wilson's interval with the number of
    samples that would give that variance: near 0 and 1 it stays inside and never has width 0.
    """
    if min(len(s) for s in scores) < 2:
        return None
    problems = len(scores)
    p = average(scores)
    variance = sum(s.mean() * (1 - s.mean()) / (len(s) - 1) for s in scores) / problems**2
    # No estimate is finer than half of one sample's weight.
    finest = max(1 / len(s) for s in scores) / problems / 2
    effective = float(p * (1 - p) / max(variance, finest**2))
    return _wilson(p, max(effective, sum(len(s) for s in scores)), level)


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95) -> Interval | None:
    """Where the mean over problems would fall with other problems of their kind, values [P] in
    0..1; None for one problem.

    The problem bootstrap of `_resampled`; Wilson's interval where the problems are mere trials,
    all of them 0 or 1, or equal.
    """
    if len(values) < 2:
        return None
    if np.ptp(values) == 0 or set(values.tolist()) <= {0.0, 1.0}:
        return _wilson(float(values.mean()), len(values), level)
    low, high = _resampled(values, level)
    return max(0.0, low), min(1.0, high)


def difference_interval(values: np.ndarray, *, level: float = 0.95) -> Interval | None:
    """The same for paired differences [P] in -1..1."""
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    low, high = _resampled(values, level)
    return max(-1.0, low), min(1.0, high)


def _resampled(values: np.ndarray, level: float) -> Interval:
    """The hull of two intervals from 10,000 resamples of the problems.

    Bootstrap-t (Efron and Tibshirani 1993, 12.5) covers skewed scores, where percentiles of 30
    problems cover as little as 86 %; percentiles, widened to Student's t with P-1 degrees
    (Hesterberg, arXiv:1411.5279), cover a handful of problems, where bootstrap-t degenerates.
    """
    count, mean = len(values), values.mean()
    random = np.random.default_rng(_SEED)
    moments = [_moments(values[random.integers(count, size=(_CHUNK, count))]) for _ in range(20)]
    means, errors = np.concatenate(moments, axis=1)
    sound = errors > 1e-9
    tail = (1 - level) / 2
    t_low, t_high = np.quantile((means[sound] - mean) / errors[sound], [tail, 1 - tail])
    student = math.sqrt(count / (count - 1)) * _student(1 - tail, count - 1)
    low, high = np.quantile(means, [_NORMAL.cdf(-student), _NORMAL.cdf(student)])
    spread = values.std()
    return float(min(low, mean - t_high * spread)), float(max(high, mean - t_low * spread))


def _moments(draws: np.ndarray) -> np.ndarray:
    return np.stack([draws.mean(1), draws.std(1)])


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p-value that paired differences [P] are symmetric about 0, by flipping signs.

    All 2^P flips for up to 14 problems that differ, else 20,000 random ones, (1 + hits)/20001.
    """
    differences = differences[differences != 0]
    count = len(differences)
    if count == 0:
        return 1.0
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if count <= 14:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float(np.mean(np.abs(signs @ differences) >= observed))
    random = np.random.default_rng(_SEED)
    hits = sum(
        int((np.abs(_signs(random, count) @ differences) >= observed).sum())
        for _ in range(20_000 // _CHUNK)
    )
    return (1 + hits) / (1 + 20_000)


def _signs(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(0, 2, size=(_CHUNK, count), dtype=np.int8) * 2.0 - 1.0


def _wilson(p: float, n: float, level: float) -> Interval:
    """Wilson's score interval of a rate p seen in n trials (1927)."""
    z = _NORMAL.inv_cdf(1 - (1 - level) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half if p > 0 else 0.0), (centre + half if p < 1 else 1.0)


def _student(probability: float, degrees: int) -> float:
    """Quantile of Student's t; exact for 1 and 2 degrees, else Cornish-Fisher (A&S 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        a = 4 * probability * (1 - probability)
        return 2 * (probability - 0.5) * math.sqrt(2 / a)
    z = _NORMAL.inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * degrees**4)
    )
