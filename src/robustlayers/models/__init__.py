"""Architectures: networks for small images with their input normalization inside and a layout of their parts."""

from robustlayers.models.architecture import Architecture
from robustlayers.models.factory import (
    build_factory,
    check_factory,
    factory_digest,
    find_factory,
    fit_options,
    is_factory,
)
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import NormKind, norm_names, register_norm
from robustlayers.models.parts import Normalize
from robustlayers.models.registry import build, check, names, options_of, resolve
from robustlayers.models.weights import load_weights, read_weights

__all__ = [
    "Architecture",
    "Layout",
    "Network",
    "NormKind",
    "Normalize",
    "build",
    "build_factory",
    "check",
    "check_factory",
    "factory_digest",
    "find_factory",
    "fit_options",
    "is_factory",
    "load_weights",
    "names",
    "norm_names",
    "options_of",
    "read_weights",
    "register_norm",
    "resolve",
]
