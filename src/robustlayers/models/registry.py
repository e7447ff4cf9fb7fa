"""The architectures by name: which there are, whether given options are right, and building one from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.random import stream_seed
from robustlayers.models import fixup, mlp, nf, preact, resnet, resnet_imagenet, small, vgg, wide
from robustlayers.models.architecture import Architecture
from robustlayers.models.layout import Network
from robustlayers.models.norms import finish_norms
from robustlayers.models.options import Option, check_options, resolve_options

__all__ = ["build", "check", "names", "options_of", "resolve"]

_ARCHITECTURES: dict[str, Architecture] = {
    "resnet": resnet.ARCHITECTURE,
    "preact-resnet": preact.ARCHITECTURE,
    "wide-resnet": wide.ARCHITECTURE,
    "resnet18": resnet_imagenet.RESNET18,
    "resnet34": resnet_imagenet.RESNET34,
    "resnet50": resnet_imagenet.RESNET50,
    "vgg": vgg.ARCHITECTURE,
    "nf-resnet": nf.ARCHITECTURE,
    "fixup-resnet": fixup.ARCHITECTURE,
    "small-cnn": small.ARCHITECTURE,
    "mlp": mlp.ARCHITECTURE,
}


def names() -> tuple[str, ...]:
    """Return the names of all architectures.

    >>> {"resnet", "resnet18", "wide-resnet", "small-cnn"} <= set(names())
    True
    """
    return tuple(_ARCHITECTURES)


def options_of(name: str) -> Mapping[str, Option]:
    """Return the options that a model takes, by name; an unknown model is a `UserError`.

    >>> "norm" in options_of("resnet"), "norm" in options_of("nf-resnet")
    (True, False)
    """
    return dict(_find(name).options)


def check(name: str, options: Mapping[str, Any]) -> list[Fault]:
    """Return every mistake in `name` (path `name`) or `options` (path: the option), without building anything.

    >>> [str(fault) for fault in check("resnet", {"depth": 21})]
    ['depth: 21 is not allowed; nearest: 20; allowed: 8, 14, 20, ...']
    """
    if name not in _ARCHITECTURES:
        return [Fault(one_of("model", name, _ARCHITECTURES), path="name")]
    return check_options(name, _ARCHITECTURES[name].options, options)


def resolve(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of the model in canonical form, defaults filled in; mistakes are one `UserError`.

    >>> resolve("small-cnn", {"channels": 1})["mean"]
    [0.5]
    """
    return resolve_options(name, _find(name).options, options)


def build(name: str, *, seed: int | None = None, **options: Any) -> Network:
    """Return a newly initialized network.

    With a `seed` the weights are a pure function of name, options and seed, drawn on the CPU whatever torch's default
    device is, and no global random state changes. Without one they are drawn as torch draws them.

    >>> model = build("resnet", seed=0, depth=8, classes=10)
    >>> model(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    Raises `UserError` for an unknown name, option or value.
    """
    architecture = _find(name)
    resolved = resolve_options(name, architecture.options, options)
    if seed is None:
        return _made(architecture, resolved)
    # Only the CPU's generator is forked and seeded: torch.manual_seed would also reseed every accelerator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(stream_seed(seed, "initialization"))
        return _made(architecture, resolved)


def _made(architecture: Architecture, options: Mapping[str, Any]) -> Network:
    model = architecture.make(**options)
    architecture.initialize(model)
    if "norm" in options:
        finish_norms(options["norm"], model)
    return model


def _find(name: str) -> Architecture:
    if name not in _ARCHITECTURES:
        raise UserError(one_of("model", name, _ARCHITECTURES))
    return _ARCHITECTURES[name]
