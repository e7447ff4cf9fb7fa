"""robustlayers: which layers should learn from adversarial examples, and how are normalization layers treated meanwhile.

Names are loaded on first use, so that `robustlayers --help` answers without importing torch.

>>> import robustlayers as rl
>>> rl.PGD(rl.Linf("8/255"), steps=10, step_size="2/255").describe()
'pgd-10, linf 8/255, step 2/255, 1 restart, best iterate'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustlayers import analysis, attacks, data, evaluation, models, selection, training
    from robustlayers.attacks import (
        APGD,
        FAB,
        FGSM,
        L1,
        L2,
        MIM,
        NFGSM,
        PGD,
        RFGSM,
        Gaussian,
        Linf,
        Noise,
        Square,
        TargetedAPGD,
        Threat,
        Transfer,
        WorstOf,
        guard,
    )
    from robustlayers.core.errors import UserError
    from robustlayers.evaluation import (
        accuracy,
        autoattack,
        branches,
        calibration,
        cascade,
        correct,
        corruption_accuracy,
        flags,
        interval,
        load_checkpoint,
        sanity,
        transfer,
        worst_case,
    )
    from robustlayers.normalization import (
        NormPolicy,
        Package,
        Switch,
        convert,
        crafting_forward,
        effective_rates,
        inference,
        norm_drift,
        norm_report,
        recalibrate,
    )
    from robustlayers.selection import Inventory, Partition, Selection, execution_order, select
    from robustlayers.training import (
        Ascent,
        Average,
        AverageSettings,
        GroupSettings,
        OptimizerSettings,
        PartialStep,
        Perturbation,
        PhaseTrainer,
        Schedule,
        Shards,
        build_optimizer,
        compare,
        interpolate,
        snapshot,
        swap,
    )

    normalization: Package  # which can be called: `with rl.normalization(model, by=...)`

__version__ = "0.1.0"

_HOMES = {
    "robustlayers.attacks": (
        "APGD",
        "FAB",
        "FGSM",
        "L1",
        "L2",
        "MIM",
        "NFGSM",
        "PGD",
        "RFGSM",
        "Gaussian",
        "Linf",
        "Noise",
        "Square",
        "TargetedAPGD",
        "Threat",
        "Transfer",
        "WorstOf",
        "guard",
    ),
    "robustlayers.core.errors": ("UserError",),
    "robustlayers.evaluation": (
        "accuracy",
        "autoattack",
        "branches",
        "calibration",
        "cascade",
        "correct",
        "corruption_accuracy",
        "flags",
        "interval",
        "load_checkpoint",
        "sanity",
        "transfer",
        "worst_case",
    ),
    "robustlayers.normalization": (
        "NormPolicy",
        "Switch",
        "convert",
        "crafting_forward",
        "effective_rates",
        "inference",
        "norm_drift",
        "norm_report",
        "recalibrate",
    ),
    "robustlayers.selection": ("Inventory", "Partition", "Selection", "execution_order", "select"),
    "robustlayers.training": (
        "Ascent",
        "Average",
        "AverageSettings",
        "GroupSettings",
        "OptimizerSettings",
        "PartialStep",
        "Perturbation",
        "PhaseTrainer",
        "Schedule",
        "Shards",
        "build_optimizer",
        "compare",
        "interpolate",
        "snapshot",
        "swap",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = ("analysis", "attacks", "data", "evaluation", "models", "normalization", "selection", "training")

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "L1",
    "L2",
    "MIM",
    "NFGSM",
    "PGD",
    "RFGSM",
    "Ascent",
    "Average",
    "AverageSettings",
    "Gaussian",
    "GroupSettings",
    "Inventory",
    "Linf",
    "Noise",
    "NormPolicy",
    "OptimizerSettings",
    "PartialStep",
    "Partition",
    "Perturbation",
    "PhaseTrainer",
    "Schedule",
    "Selection",
    "Shards",
    "Square",
    "Switch",
    "TargetedAPGD",
    "Threat",
    "Transfer",
    "UserError",
    "WorstOf",
    "__version__",
    "accuracy",
    "analysis",
    "attacks",
    "autoattack",
    "branches",
    "build_optimizer",
    "calibration",
    "cascade",
    "compare",
    "convert",
    "correct",
    "corruption_accuracy",
    "crafting_forward",
    "data",
    "effective_rates",
    "evaluation",
    "execution_order",
    "flags",
    "guard",
    "inference",
    "interpolate",
    "interval",
    "load_checkpoint",
    "models",
    "norm_drift",
    "norm_report",
    "normalization",
    "recalibrate",
    "sanity",
    "select",
    "selection",
    "snapshot",
    "swap",
    "training",
    "transfer",
    "worst_case",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"robustlayers.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'robustlayers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
