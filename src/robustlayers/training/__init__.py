"""Training: objectives, the partial step, phases that can be stopped and resumed, and the ledger of what moved."""

from robustlayers.training.ascent import Ascent, parse_ascent, perturbation, perturbed, stationary
from robustlayers.training.ascent_rules import ASCENTS
from robustlayers.training.averaging import AVERAGES, Average, AverageSettings
from robustlayers.training.clipping import clip_gradients
from robustlayers.training.distributed import STATISTICS, Shards
from robustlayers.training.ledger import GroupChange, check_promises, compare, snapshot
from robustlayers.training.mixing import interpolate, swap
from robustlayers.training.multirate import Multirate, due
from robustlayers.training.objectives import FROZEN, OBJECTIVES, Objective, Signal, parse_signal, signal_text
from robustlayers.training.optimizers import (
    DECAYS,
    OPTIMIZERS,
    RATES,
    GroupSettings,
    OptimizerSettings,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
    owners,
)
from robustlayers.training.program import PERTURBATIONS, Perturbation, Program, check_windows
from robustlayers.training.rates import apply_rates, average_norms, relative_gradient_norms
from robustlayers.training.schedules import SCHEDULES, Schedule
from robustlayers.training.starts import STARTS, concerned, copy_entries, start_group
from robustlayers.training.step import Gradients, PartialStep, StepLog, Turn
from robustlayers.training.tally import EpochLog
from robustlayers.training.trainer import Diverged, PhaseTrainer
from robustlayers.training.update import Update

__all__ = [
    "ASCENTS",
    "AVERAGES",
    "DECAYS",
    "FROZEN",
    "OBJECTIVES",
    "OPTIMIZERS",
    "PERTURBATIONS",
    "RATES",
    "SCHEDULES",
    "STARTS",
    "STATISTICS",
    "Ascent",
    "Average",
    "AverageSettings",
    "Diverged",
    "EpochLog",
    "Gradients",
    "GroupChange",
    "GroupSettings",
    "Multirate",
    "Objective",
    "OptimizerSettings",
    "PartialStep",
    "Perturbation",
    "PhaseTrainer",
    "Program",
    "Schedule",
    "Shards",
    "Signal",
    "StepLog",
    "Turn",
    "Update",
    "apply_rates",
    "average_norms",
    "build_optimizer",
    "check_promises",
    "check_windows",
    "clip_gradients",
    "compare",
    "concerned",
    "copy_entries",
    "due",
    "interpolate",
    "load_optimizer",
    "optimizer_tensors",
    "owners",
    "parse_ascent",
    "parse_signal",
    "perturbation",
    "perturbed",
    "relative_gradient_norms",
    "signal_text",
    "snapshot",
    "start_group",
    "stationary",
    "swap",
]
