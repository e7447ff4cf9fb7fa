"""Evaluation: clean and robust accuracy, their intervals, and flags for numbers that mean less than they say."""

from robustlayers.evaluation.accuracy import Progress, accuracy, correct, worst_case
from robustlayers.evaluation.flags import flags
from robustlayers.evaluation.intervals import interval

__all__ = ["Progress", "accuracy", "correct", "flags", "interval", "worst_case"]
