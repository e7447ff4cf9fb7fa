from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.evaluation import interval


def at_least(k, n, p):
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.9, 0.95])
)
def test_at_its_ends_the_data_are_just_as_unlikely_as_allowed(counts, level):
    k, n = counts
    low, high = interval(k, n, level)
    assert 0 <= low <= k / n <= high <= 1
    if k > 0:
        assert at_least(k, n, low) == pytest.approx((1 - level) / 2, rel=1e-6)
    if k < n:
        assert 1 - at_least(k + 1, n, high) == pytest.approx((1 - level) / 2, rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_it_holds_the_true_share_at_least_as_often_as_it_says(n):
    ends = [interval(k, n, 0.9) for k in range(n + 1)]
    for step in range(101):
        p = step / 100
        held = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(ends) if low <= p <= high)
        assert held >= 0.9 - 1e-9


def test_none_and_all():
    # "Rule of three": the upper end of 0 of n is 1 - (0.025)^(1/n).
    assert interval(0, 100) == (0.0, pytest.approx(1 - 0.025**0.01))
    assert interval(100, 100) == (pytest.approx(0.025**0.01), 1.0)
    assert all(type(end) is float for end in interval(3, 10))


@pytest.mark.parametrize(("correct", "total", "level"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 0), (1, 5, 1)])
def test_mistakes_are_named(correct, total, level):
    with pytest.raises(UserError):
        interval(correct, total, level)
