"""The norm layers that the literature compares, one module for each; every one is a word, `norm=NAME`, for all models."""

from robustlayers.normalization.layers.adapter import AdapterNorm
from robustlayers.normalization.layers.common import ScaleShift
from robustlayers.normalization.layers.dual import DualBatchNorm
from robustlayers.normalization.layers.film import Film, FilmNorm, conditioned
from robustlayers.normalization.layers.group import group_count
from robustlayers.normalization.layers.joint import JointBatchNorm
from robustlayers.normalization.layers.random_norm import RandomNorm, held_draws, seed_draws
from robustlayers.normalization.layers.robust import RobustNorm
from robustlayers.normalization.layers.weight_standardization import (
    WeightStandardizedConv2d,
    plain_convolutions,
    standardize_convolutions,
)

__all__ = [
    "AdapterNorm",
    "DualBatchNorm",
    "Film",
    "FilmNorm",
    "JointBatchNorm",
    "RandomNorm",
    "RobustNorm",
    "ScaleShift",
    "WeightStandardizedConv2d",
    "conditioned",
    "group_count",
    "held_draws",
    "plain_convolutions",
    "seed_draws",
    "standardize_convolutions",
]
