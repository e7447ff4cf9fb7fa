"""Normalization: which statistics norm layers use and update, in each pass."""

from robustlayers.normalization.context import Setting, inference, normalizing
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.policy import PASSES, NormPolicy, Switch

__all__ = [
    "PASSES",
    "CraftingForward",
    "NormPolicy",
    "Setting",
    "Switch",
    "crafting_forward",
    "inference",
    "normalizing",
]
