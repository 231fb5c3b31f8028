from itertools import combinations

import numpy as np
import pytest
from sse_eval import statistics


def scores(*counts: tuple[int, int]) -> list[np.ndarray]:
    """(right, samples) of each problem as arrays."""
    return [np.array([1.0] * right + [0.0] * (n - right)) for right, n in counts]


def test_average_is_the_mean_over_problems_however_many_samples_each_has():
    assert statistics.average(scores((1, 2), (0, 4), (4, 4))) == pytest.approx(0.5)


def test_pass_at_k_by_hand():
    # 1 of 4 right: any 2 of 4 hold it in 3 of 6 cases; never and always right give 0 and 1.
    assert statistics.pass_at(scores((1, 4)), 2) == pytest.approx(0.5)
    assert statistics.pass_at(scores((1, 4), (0, 4), (4, 4)), 2) == pytest.approx(0.5)
    assert statistics.pass_at(scores((3, 4)), 1) == pytest.approx(0.75)


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right: int, k: int):
    (one,) = scores((right, 6))
    subsets = [any(one[i] for i in subset) for subset in combinations(range(6), k)]
    assert statistics.pass_at([one], k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_refuses_problems_with_fewer_samples():
    with pytest.raises(ValueError, match="pass@4 needs 4 samples"):
        statistics.pass_at(scores((1, 4), (1, 3)), 4)


@pytest.mark.parametrize(
    ("votes", "score"),
    [
        (["7", "7", "3"], 1.0),
        (["7", "3", "3"], 0.0),
        (["7", "3", None], 0.5),
        (["7", "3", "5", None], 1 / 3),
        (["3", "5", "5", "3", "7"], 0.0),
        ([None, None, "7"], 1.0),
        ([None, None], 0.0),
    ],
)
def test_a_tie_of_the_majority_is_split(votes: list[str | None], score: float):
    assert statistics.majority([votes], ["7"]) == pytest.approx(score)


def test_the_sampling_interval_by_hand():
    # Two problems, 1 of 2 and 2 of 2: variance (0.25/1 + 0)/4 = 1/16, so p = 3/4 is worth
    # 3/16 * 16 = 3 trials, and the four samples there are, 4: Wilson of 3 in 4.
    low, high = statistics.sampling_interval(scores((1, 2), (2, 2)))
    assert (low, high) == pytest.approx((0.3006, 0.9544), abs=1e-4)


def test_one_sample_a_problem_has_no_sampling_interval_and_one_problem_no_bootstrap():
    assert statistics.sampling_interval(scores((1, 1), (0, 1))) is None
    assert statistics.bootstrap_interval(np.array([0.5])) is None


@pytest.mark.parametrize("right", [0, 8])
def test_an_interval_is_never_empty_nor_beyond_0_and_1(right: int):
    everything = scores(*[(right, 8)] * 30)
    for low, high in (
        statistics.sampling_interval(everything),
        statistics.bootstrap_interval(np.array([right / 8] * 30)),
    ):
        assert 0 <= low <= right / 8 <= high <= 1
        assert (low == 0) == (right == 0) and (high == 1) == (right == 8)
        assert high - low > 0.01


def test_the_same_scores_give_the_same_interval():
    values = np.random.default_rng(5).random(30)
    assert statistics.bootstrap_interval(values) == statistics.bootstrap_interval(values)


@pytest.mark.parametrize(("shape", "samples"), [((0.5, 0.5), 8), ((2, 2), 16), ((0.3, 2), 8)])
def test_the_sampling_interval_covers_95_percent(shape: tuple[float, float], samples: int):
    random = np.random.default_rng(11)
    rates = random.beta(*shape, size=30)
    hits = 0
    for _ in range(1000):
        drawn = scores(*((int(c), samples) for c in random.binomial(samples, rates)))
        low, high = statistics.sampling_interval(drawn)
        hits += low <= rates.mean() <= high
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(("shape", "samples"), [((0.5, 0.5), 1), ((2, 2), 16), ((0.3, 3), 8)])
def test_the_bootstrap_interval_covers_95_percent(shape: tuple[float, float], samples: int):
    random = np.random.default_rng(12)
    hits = 0
    for _ in range(400):
        rates = random.beta(*shape, size=30)
        low, high = statistics.bootstrap_interval(random.binomial(samples, rates) / samples)
        hits += low <= shape[0] / sum(shape) <= high
    assert 0.93 <= hits / 400 <= 0.975  # 400 trials: standard error 1.1 points


def test_the_permutation_p_value_by_hand():
    # Of the 8 sign flips of (1, 1, 1), two are as extreme; zeros do not count.
    assert statistics.permutation_p(np.array([1.0, 1.0, 0.0, 1.0])) == pytest.approx(2 / 8)
    assert statistics.permutation_p(np.array([1.0, -1.0])) == 1.0
    assert statistics.permutation_p(np.zeros(5)) == 1.0


def test_random_flips_agree_with_all_flips():
    differences = np.random.default_rng(3).normal(0.35, 1, size=15)
    signs = 1 - 2 * ((np.arange(2**15)[:, None] >> np.arange(15)) & 1)
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    assert statistics.permutation_p(differences) == pytest.approx(exact, abs=0.01)


def test_equal_models_are_called_different_in_5_percent():
    random = np.random.default_rng(4)
    p_values = [statistics.permutation_p(random.normal(size=12)) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (29, 2.0452)]
)
def test_student_quantiles(degrees: int, exact: float):
    assert statistics._student(0.975, degrees) == pytest.approx(exact, abs=5e-3)
