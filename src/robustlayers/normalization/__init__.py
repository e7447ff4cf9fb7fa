"""Normalization: which statistics norm layers use and update, in each pass."""

from robustlayers.normalization.context import Setting, inference, normalizing
from robustlayers.normalization.policy import PASSES, NormPolicy, Switch

__all__ = ["PASSES", "NormPolicy", "Setting", "Switch", "inference", "normalizing"]
