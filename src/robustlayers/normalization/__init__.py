"""Normalization: which statistics norm layers use and update, in each pass."""

from robustlayers.normalization.context import Setting, inference, normalizing
from robustlayers.normalization.convert import convert, outermost_norms
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.policy import PASSES, NormPolicy, Switch
from robustlayers.normalization.recalibration import Recalibration, recalibrate

__all__ = [
    "PASSES",
    "CraftingForward",
    "NormPolicy",
    "Recalibration",
    "Setting",
    "Switch",
    "convert",
    "crafting_forward",
    "inference",
    "normalizing",
    "outermost_norms",
    "recalibrate",
]
