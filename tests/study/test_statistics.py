"""Statistics over seeds against scipy, hand computation and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.study.statistics import holm, identical, paired_t, sign_flip_p, t_interval


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_interval_is_the_one_of_scipy(count: int, level: float) -> None:
    values = np.random.default_rng(count).normal(0.4, 0.05, count)
    mean, low, high = t_interval(list(values), level)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("shift", [-0.2, 0.0, 0.05, 5.0])
def test_the_paired_test_is_the_one_of_scipy(count: int, shift: float) -> None:
    generator = np.random.default_rng(count)
    left, right = generator.normal(shift, 0.1, count), generator.normal(0, 0.1, count)
    expected = scipy.stats.ttest_rel(left, right, alternative="greater").pvalue
    assert paired_t(list(left - right)) == pytest.approx(expected, rel=1e-8)
    assert paired_t(list(right - left)) == pytest.approx(1 - expected, rel=1e-8)


def test_a_tiny_p_keeps_its_digits() -> None:
    differences = [1.0 + 0.001 * k for k in range(12)]
    p = paired_t(differences)
    assert p is not None and 0 < p < 1e-25
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(12))
    assert p == pytest.approx(scipy.stats.t.sf(t, 11), rel=1e-6)


def test_what_one_value_or_equal_values_can_say() -> None:
    assert t_interval([0.3]) == (0.3, None, None)
    assert t_interval([0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert paired_t([0.3]) is None
    assert paired_t([0.3, 0.3, 0.3]) is None
    assert paired_t([0.3 - 0.2, 0.4 - 0.3, 0.9 - 0.8]) is None  # equal but for rounding
    assert paired_t([0.1, 0.1 + 1 / 100_000]) is not None  # one image of a hundred thousand is no rounding
    assert identical([1e6, 1e6 + 1e-7])
    assert identical([1e-9, 2e-9], scale=1e6)
    assert not identical([1e-9, 2e-9], scale=1e-9)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    trials = 4000
    for count in (2, 3, 5):
        samples = generator.normal(0.5, 0.02, (trials, count))
        covered = 0
        for row in samples:
            _, low, high = t_interval(row.tolist())
            assert low is not None and high is not None
            covered += low <= 0.5 <= high
        # three standard deviations of a share of 4000 trials: 1.0 points
        assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04, made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(pvalues: list[float]) -> None:
    adjusted = holm(pvalues)
    for p, q in zip(pvalues, adjusted, strict=True):
        assert p <= q <= min(1.0, len(pvalues) * p)
    for (p, q), (r, s) in itertools.combinations(zip(pvalues, adjusted, strict=True), 2):
        assert (p <= r) <= (q <= s)


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_sign_flips_are_counted_as_scipy_counts_them(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.1, 0.1, count)
    reference = scipy.stats.permutation_test(
        (differences, np.zeros(count)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10**5,
        alternative="greater",
    )
    assert sign_flip_p(list(differences)) == pytest.approx(reference.pvalue, abs=1e-12)


def test_sign_flips_at_their_ends() -> None:
    assert sign_flip_p([0.1] * 5) == 1 / 32
    assert sign_flip_p([-0.1] * 5) == 1.0
    assert sign_flip_p([0.1]) == 0.5
    assert sign_flip_p([0.0] * 3) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, -0.6]) > 0.4  # sums to zero but for rounding
    # on data that are normal, both tests agree roughly
    differences = np.random.default_rng(3).normal(0.05, 0.1, 14).tolist()
    t = paired_t(differences)
    assert t is not None and sign_flip_p(differences) == pytest.approx(t, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([]), "there are no values"),
        (lambda: paired_t([0.1, math.nan]), "values must be finite"),
        (lambda: sign_flip_p([math.inf]), "values must be finite"),
        (lambda: sign_flip_p([0.1] * 21), "the sign-flip test takes up to 20 differences; there are 21"),
        (lambda: t_interval([0.1], 95), "confidence level must be between 0 and 1, such as 0.95; it is 95"),
        (lambda: holm([0.5, math.nan]), r"p values must lie in \[0, 1\]"),
        (lambda: holm([1.5]), r"p values must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_computed_is_said(call, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        call()
