"""Normalization: which statistics norm layers use and update, in each pass.

The package itself can be called: `with robustlayers.normalization(model, by="batch"): ...` is `context.normalization`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from robustlayers.normalization.context import Setting, inference, normalizing
from robustlayers.normalization.context import normalization as _normalization
from robustlayers.normalization.convert import convert, outermost_norms
from robustlayers.normalization.distances import norm_drift
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.habits import HABITS, habit
from robustlayers.normalization.policy import PASSES, NormPolicy, Switch, policy_table
from robustlayers.normalization.recalibration import Recalibration, recalibrate
from robustlayers.normalization.report import LayerPass, NormLayer, NormReport, effective_rates, norm_report

__all__ = [
    "HABITS",
    "PASSES",
    "CraftingForward",
    "LayerPass",
    "NormLayer",
    "NormPolicy",
    "NormReport",
    "Package",
    "Recalibration",
    "Setting",
    "Switch",
    "convert",
    "crafting_forward",
    "effective_rates",
    "habit",
    "inference",
    "norm_drift",
    "norm_report",
    "normalizing",
    "outermost_norms",
    "policy_table",
    "recalibrate",
]


class Package(ModuleType):
    """The type of this package: a module that can be called."""

    if TYPE_CHECKING:
        __call__ = staticmethod(_normalization)
    else:

        def __call__(self, model, *args, **named):
            """Return `context.normalization` of the same arguments."""
            return _normalization(model, *args, **named)


sys.modules[__name__].__class__ = Package
