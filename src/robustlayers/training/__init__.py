"""Training: objectives, the partial step, phases that can be stopped and resumed, and the ledger of what moved."""

from robustlayers.training.ledger import GroupChange, compare, snapshot
from robustlayers.training.objectives import FROZEN, OBJECTIVES, Objective, Signal, parse_signal, signal_text
from robustlayers.training.optimizers import (
    DECAYS,
    OPTIMIZERS,
    GroupSettings,
    OptimizerSettings,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
)
from robustlayers.training.schedules import SCHEDULES, Schedule
from robustlayers.training.starts import STARTS, concerned, copy_entries, start_group
from robustlayers.training.step import Gradients, PartialStep, StepLog
from robustlayers.training.trainer import Diverged, EpochLog, PhaseTrainer

__all__ = [
    "DECAYS",
    "FROZEN",
    "OBJECTIVES",
    "OPTIMIZERS",
    "SCHEDULES",
    "STARTS",
    "Diverged",
    "EpochLog",
    "Gradients",
    "GroupChange",
    "GroupSettings",
    "Objective",
    "OptimizerSettings",
    "PartialStep",
    "PhaseTrainer",
    "Schedule",
    "Signal",
    "StepLog",
    "build_optimizer",
    "compare",
    "concerned",
    "copy_entries",
    "load_optimizer",
    "optimizer_tensors",
    "parse_signal",
    "signal_text",
    "snapshot",
    "start_group",
]
