"""Normalization: which statistics norm layers use and update, in each pass.

The package itself can be called: `with robustlayers.normalization(model, by="batch"): ...` is `context.normalization`.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from torch import nn

from robustlayers.normalization.context import Setting, inference, normalizing
from robustlayers.normalization.context import normalization as _normalization
from robustlayers.normalization.convert import convert, outermost_norms
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.habits import HABITS, habit
from robustlayers.normalization.policy import PASSES, NormPolicy, Switch, policy_table
from robustlayers.normalization.recalibration import Recalibration, recalibrate

__all__ = [
    "HABITS",
    "PASSES",
    "CraftingForward",
    "NormPolicy",
    "Recalibration",
    "Setting",
    "Switch",
    "convert",
    "crafting_forward",
    "habit",
    "inference",
    "normalizing",
    "outermost_norms",
    "policy_table",
    "recalibrate",
]


class _Callable(ModuleType):
    def __call__(self, model: nn.Module, *args: Any, **named: Any) -> AbstractContextManager[None]:
        """Return `context.normalization` of the same arguments."""
        return _normalization(model, *args, **named)


sys.modules[__name__].__class__ = _Callable
