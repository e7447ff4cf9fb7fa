"""What was measured in an arm and what was not: the one place that decides which seeds enter a mean.

A mean is taken over the seeds whose run is finished and whose value is finite. Every other seed is named, never dropped
in silence.
"""

from __future__ import annotations

import math

from robustlayers.report.statistics import Interval, interval
from robustlayers.study.summary import Arm, LedgerLine, Summary

__all__ = ["absent", "accuracy", "broken", "metrics", "primary", "status", "values"]


def primary(summary: Summary) -> str:
    """Return the checkpoint that the answer is given for: `best` where it is there, else the first one."""
    if "best" in summary.checkpoints or not summary.checkpoints:
        return "best"
    return summary.checkpoints[0]


def metrics(summary: Summary) -> list[str]:
    """Return the accuracies in the order of the columns: clean, robust, every attack."""
    return list(dict.fromkeys(["clean", "robust", *summary.attacks]))


def status(arm: Arm, seed: int) -> str:
    """Return what became of a seed; one that the arm does not know is `missing`."""
    return arm.status.get(seed, "missing")


def values(arm: Arm, checkpoint: str, metric: str) -> dict[int, float]:
    """Return seed -> value for the seeds that enter a mean."""
    found = arm.results.get(checkpoint, {}).get(metric, {})
    return {
        seed: value for seed, value in sorted(found.items()) if status(arm, seed) == "finished" and math.isfinite(value)
    }


def accuracy(arm: Arm, checkpoint: str, metric: str) -> Interval:
    """Return the mean accuracy over the seeds of `values`, with its interval."""
    return interval(values(arm, checkpoint, metric).values())


def absent(summary: Summary, arm: Arm) -> dict[int, str]:
    """Return seed -> why it is in no mean, in words, for the planned seeds that did not finish."""
    found = {}
    for seed in summary.seeds:
        word = status(arm, seed)
        if word != "finished":
            reason = arm.reasons.get(seed, "")
            found[seed] = f"{word} ({reason})" if reason else word
    return found


def broken(arm: Arm) -> list[LedgerLine]:
    """Return the lines of the ledger whose promise was not kept."""
    return [line for line in arm.ledger if not line.kept]
