"""How far an accuracy on n images can be from the accuracy on all: an exact binomial interval."""

from __future__ import annotations

from robustlayers.core.errors import UserError

__all__ = ["interval"]


def interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval for a share of which `correct` of `total` were seen.

    The interval holds the true share with a probability of `level` or more, whatever the share is (Clopper & Pearson
    1934). Its ends are quantiles of beta distributions. It speaks about the choice of images, not about seeds.

    Raises `UserError` unless 0 <= correct <= total, total >= 1 and 0 < level < 1.

    >>> low, high = interval(50, 100)
    >>> round(low, 4), round(high, 4)
    (0.3983, 0.6017)
    """
    from scipy.special import betaincinv  # takes long to import, and most uses of this package never need it

    if total < 1 or not 0 <= correct <= total:
        raise UserError(f"interval: {correct} of {total} is not a share; allowed: 0 <= correct <= total, total >= 1")
    if not 0 < level < 1:
        raise UserError(f"level: {level} is not allowed; allowed: more than 0 and less than 1")
    tail = (1 - level) / 2
    low = 0.0 if correct == 0 else float(betaincinv(correct, total - correct + 1, tail))
    high = 1.0 if correct == total else float(betaincinv(correct + 1, total - correct, 1 - tail))
    return low, high
