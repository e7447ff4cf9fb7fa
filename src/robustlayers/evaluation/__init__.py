"""Evaluation: clean and robust accuracy, their intervals, and flags for numbers that mean less than they say.

Besides: calibration, accuracy by class, on common corruptions, under transfer, and in each way to normalize.
"""

from robustlayers.evaluation.accuracy import Progress, accuracy, correct, worst_case
from robustlayers.evaluation.autoattack import autoattack
from robustlayers.evaluation.branches import branches, policies
from robustlayers.evaluation.calibration import Calibration, calibration, expected_calibration_error
from robustlayers.evaluation.cascade import Moment, Outcome, Turn, cascade
from robustlayers.evaluation.checkpoints import load_checkpoint
from robustlayers.evaluation.corruptions import CORRUPTIONS, CorruptionTable, corrupt, corruption_accuracy
from robustlayers.evaluation.flags import MEANINGS, beyond_final, flags, meaning
from robustlayers.evaluation.intervals import interval
from robustlayers.evaluation.per_class import ClassAccuracy, per_class
from robustlayers.evaluation.sanity import SanityReport, sanity
from robustlayers.evaluation.transfer import CrossTable, transfer

__all__ = [
    "CORRUPTIONS",
    "MEANINGS",
    "Calibration",
    "ClassAccuracy",
    "CorruptionTable",
    "CrossTable",
    "Moment",
    "Outcome",
    "Progress",
    "SanityReport",
    "Turn",
    "accuracy",
    "autoattack",
    "beyond_final",
    "branches",
    "calibration",
    "cascade",
    "correct",
    "corrupt",
    "corruption_accuracy",
    "expected_calibration_error",
    "flags",
    "interval",
    "load_checkpoint",
    "meaning",
    "per_class",
    "policies",
    "sanity",
    "transfer",
    "worst_case",
]
