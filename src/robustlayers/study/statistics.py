"""Statistics over seeds: intervals of a mean, paired tests, and the correction for several claims.

A handful of seeds is normal here, so everything rests on the t distribution of paired differences; an exact sign-flip
test that assumes no normality stands beside it as a cross-check. Reference: S. Holm, "A simple sequentially rejective
multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustlayers.core.errors import UserError

__all__ = ["holm", "identical", "paired_t", "sign_flip_p", "t_interval"]

ROUNDING = 1e-12  # differences below this share of the largest value are rounding of floats
MOST_FLIPPED = 20  # seeds: 2^20 sign patterns


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Return mean, low and high of the two-sided t interval of the mean; one value has a mean and no interval.

    mean ± t_{n-1, (1 + level)/2} · s / √n with s the standard deviation with n - 1 in the denominator.

    >>> mean, low, high = t_interval([0.50, 0.52, 0.54])
    >>> print(f"{mean:.3f} {low:.3f} {high:.3f}")
    0.520 0.470 0.570
    """
    if not 0 < level < 1:
        raise UserError(f"confidence level must be between 0 and 1, such as 0.95; it is {level}")
    _check(values)
    mean, error = _mean_and_error(values)
    if error is None:
        return mean, None, None
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return mean, mean - half, mean + half


def paired_t(differences: Sequence[float]) -> float | None:
    """Return the one-sided p of a paired t-test: how likely a mean this large or larger is if the true mean is 0.

    t = mean / (s / √n) with n - 1 degrees of freedom. None where no test is possible: fewer than two differences, or
    all of them equal up to rounding, for which t would be infinite and p = 0, which no number of seeds can justify.

    >>> round(paired_t([0.10, 0.12, 0.14]), 5)
    0.00457
    >>> paired_t([0.1, 0.1]) is None
    True
    """
    _check(differences)
    if len(differences) < 2 or identical(differences):
        return None
    mean, error = _mean_and_error(differences)
    if not error:  # subnormal spread that squares to zero
        return None
    from scipy.special import stdtr

    # The lower tail at -t keeps its digits where 1 - F(t) would lose them.
    return float(stdtr(len(differences) - 1, -mean / error))


def identical(values: Sequence[float], scale: float = 1.0) -> bool:
    """Return whether all values are equal up to the rounding of floats of the size `scale`, or their own if larger.

    >>> identical([0.3 - 0.2, 0.4 - 0.3]), identical([0.1, 0.1001])
    (True, False)
    """
    return max(values) - min(values) <= ROUNDING * max(scale, *(abs(value) for value in values))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given: p_(i) becomes max over j ≤ i of min(1, (m - j + 1) p_(j)).

    Rejecting where the adjusted p is below α keeps the chance of one or more false rejections among m tests below α,
    whatever the dependence between them.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in pvalues):
        raise UserError("p values must lie in [0, 1]")
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = largest
    return adjusted


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact one-sided p of the sign-flip test: the share of all 2^n sign patterns with at least this mean.

    It assumes only that each difference is symmetric about 0 under the null. With n seeds p is at least 2^-n, so it can
    never fall below 0.05 with four seeds or fewer: a cross-check of `paired_t`, not a replacement. n is at most 20.

    >>> sign_flip_p([0.1, 0.2, 0.3])
    0.125
    """
    _check(differences)
    if len(differences) > MOST_FLIPPED:
        raise UserError(f"the sign-flip test takes up to {MOST_FLIPPED} differences; there are {len(differences)}")
    import numpy as np

    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    slack = ROUNDING * math.fsum(abs(difference) for difference in differences)
    return float(np.mean(sums >= math.fsum(differences) - slack))


def _check(values: Sequence[float]) -> None:
    if len(values) == 0:
        raise UserError("there are no values")
    if not all(math.isfinite(value) for value in values):
        raise UserError("values must be finite")


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error (None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
