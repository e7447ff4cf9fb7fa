"""Which normalization layer a network is built with: a name and a factory `channels -> module` for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from robustlayers.core.errors import UserError, one_of

__all__ = ["NormKind", "conv_bias", "make_norm", "norm_names", "register_norm"]


@dataclass(frozen=True)
class NormKind:
    """A kind of norm layer: its factory, and whether it shifts, which makes a bias of the convolution redundant."""

    make: Callable[[int], nn.Module]
    shifts: bool = True


_KINDS: dict[str, NormKind] = {
    "batch": NormKind(nn.BatchNorm2d),
    "none": NormKind(lambda channels: nn.Identity(), shifts=False),
}


def register_norm(name: str, kind: NormKind) -> None:
    """Make `kind` available to every architecture as `norm=name`; a name that is taken is a `UserError`."""
    if name in _KINDS:
        raise UserError(f"norm {name!r} is registered already")
    _KINDS[name] = kind


def norm_names() -> tuple[str, ...]:
    """Return the names that `norm` may have.

    >>> {"batch", "none"} <= set(norm_names())
    True
    """
    return tuple(_KINDS)


def make_norm(name: str, channels: int) -> nn.Module:
    """Return a new norm layer of the kind `name` for `channels` channels."""
    return _kind(name).make(channels)


def conv_bias(name: str) -> bool:
    """Return whether a convolution beside a norm layer of this kind needs a bias of its own."""
    return not _kind(name).shifts


def _kind(name: str) -> NormKind:
    if name not in _KINDS:
        raise UserError(one_of("norm", name, _KINDS))
    return _KINDS[name]
