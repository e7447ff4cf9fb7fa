"""Which normalization layer a network is built with: a name, its options, and a factory for each kind.

A kind is written by its name alone, `group`, or with options: `{name: group, groups: 8}`, or as text `group(groups=8)`,
which is the canonical form and stands in the options of a model.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.models.options import Option

__all__ = [
    "NormKind",
    "NormOption",
    "conv_bias",
    "find_norm",
    "finish_norms",
    "make_norm",
    "norm_names",
    "norm_options",
    "norm_text",
    "register_norm",
]


@dataclass(frozen=True)
class NormKind:
    """A kind of norm layer: its factory, and whether it shifts, which makes a bias of the convolution redundant.

    `make(channels, **options)` returns a new layer. `options` are what a person may set. `replace(norm, **options)`
    returns the layer that takes the place of an existing norm layer, with what can be carried over; without it a
    conversion takes `make` and the scale and shift. `finish(network, **options)` is called once with the whole network,
    for kinds that are more than their layers.
    """

    make: Callable[..., nn.Module]
    shifts: bool = True
    options: Mapping[str, Option] = field(default_factory=dict)
    replace: Callable[..., nn.Module] | None = None
    finish: Callable[..., object] | None = None


# Most kinds live in `robustlayers.normalization`, which stands above this package and may not be imported by it. So the
# table holds where a kind is, as "module:attribute"; it is imported when it is first used.
_LAYERS = "robustlayers.normalization.layers"
_KINDS: dict[str, NormKind | str] = {
    "batch": f"{_LAYERS}.batch:BATCH",
    "batch-no-affine": f"{_LAYERS}.batch:BATCH_NO_AFFINE",
    "batch-at-test": f"{_LAYERS}.batch:BATCH_AT_TEST",
    "group": f"{_LAYERS}.group:GROUP",
    "group-ws": f"{_LAYERS}.weight_standardization:GROUP_WS",
    "instance": f"{_LAYERS}.instance:INSTANCE",
    "layer": f"{_LAYERS}.layer:LAYER",
    "none": f"{_LAYERS}.none:NONE",
    "robust": f"{_LAYERS}.robust:ROBUST",
    "dual": f"{_LAYERS}.dual:DUAL",
    "joint": f"{_LAYERS}.joint:JOINT",
    "random": f"{_LAYERS}.random_norm:RANDOM",
    "adapter": f"{_LAYERS}.adapter:ADAPTER",
    "film": f"{_LAYERS}.film:FILM",
}


def register_norm(name: str, kind: NormKind) -> None:
    """Make `kind` available to every architecture as `norm=name`; a name that is taken is a `UserError`."""
    if name in _KINDS:
        raise UserError(f"norm {name!r} is registered already")
    if not _NAME.fullmatch(name):
        raise UserError(f"norm {name!r} is no name; allowed: letters, digits, '-' and '_'")
    _KINDS[name] = kind


def norm_names() -> tuple[str, ...]:
    """Return the names that `norm` may have.

    >>> {"batch", "group", "none"} <= set(norm_names())
    True
    """
    return tuple(_KINDS)


def make_norm(norm: str | Mapping[str, Any], channels: int) -> nn.Module:
    """Return a new norm layer for images [n, channels, h, w].

    >>> make_norm("group(groups=4)", 16).num_groups
    4
    """
    name, options = norm_options(norm)
    return find_norm(name).make(channels, **options)


def conv_bias(norm: str | Mapping[str, Any]) -> bool:
    """Return whether a convolution beside a norm layer of this kind needs a bias of its own."""
    return not find_norm(norm_options(norm)[0]).shifts


def finish_norms(norm: str | Mapping[str, Any], network: nn.Module) -> None:
    """Do to a whole new network what its kind of norm layer asks for beyond its layers, in place."""
    name, options = norm_options(norm)
    kind = find_norm(name)
    if kind.finish is not None:
        kind.finish(network, **options)


def find_norm(name: str) -> NormKind:
    """Return the kind of that name; an unknown one is a `UserError`."""
    if name not in _KINDS:
        raise UserError(one_of("norm", name, _KINDS, most=_MOST))
    kind = _KINDS[name]
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        assert isinstance(kind, NormKind)
        _KINDS[name] = kind
    return kind


_MOST = 24  # kinds up to which a message lists all of them, a person's own included
_NAME = re.compile(r"[\w-]+")
_TEXT = re.compile(r"\s*([\w-]+)\s*(?:\(([^()]*)\)\s*)?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


def norm_options(norm: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options (those that differ from their defaults) of a norm kind; mistakes are a `UserError`.

    >>> norm_options({"name": "group", "groups": 8})
    ('group', {'groups': 8})
    >>> norm_options("group(groups=32)")  # the default
    ('group', {})
    """
    name, given = _read(norm)
    known = find_norm(name).options
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            if not known:
                raise UserError(f"norm {name} has no options, not {key!r}")
            raise UserError(one_of(f"option of norm {name}", str(key), known))
        problem = known[key].problem(value)
        if problem is not None:
            raise UserError(f"option {key} of norm {name}: {problem}")
        value = known[key].resolve(value, options)
        if value != known[key].default:
            options[key] = value
    return name, {key: options[key] for key in sorted(options)}


def norm_text(norm: str | Mapping[str, Any]) -> str:
    """Return the one canonical text of a norm kind.

    >>> norm_text({"name": "dual", "own_affine": False})
    'dual(own_affine=false)'
    """
    name, options = norm_options(norm)
    return f"{name}({', '.join(f'{key}={_shown(value)}' for key, value in options.items())})" if options else name


def _read(norm: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(norm, Mapping):
        name = norm.get("name")
        if not isinstance(name, str):
            raise UserError(f"norm: {dict(norm)!r} has no name, as in {{name: group, groups: 8}}")
        name, options = _read(name)
        twice = [key for key in norm if key in options]
        if twice:
            raise UserError(f"norm {norm['name']!r}: {twice[0]} stands there twice")
        return name, {**options, **{key: value for key, value in norm.items() if key != "name"}}
    if not isinstance(norm, str):
        raise UserError(f"{norm!r} is not a name; allowed: {', '.join(sorted(_KINDS))}")
    if norm in _KINDS:
        return norm, {}
    match = _TEXT.fullmatch(norm)
    if match is None or match[1] not in _KINDS:
        raise UserError(one_of("norm", match[1] if match else norm, _KINDS, most=_MOST))
    options: dict[str, Any] = {}
    for piece in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not value:
            raise UserError(f"norm {norm!r}: {piece!r} is no option; write {match[1]}(name=value, ...)")
        if key in options:
            raise UserError(f"norm {norm!r}: {key} stands there twice")
        options[key] = _value(value)
    return match[1], options


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _shown(value: Any) -> str:
    return next((word for word, meant in _WORDS.items() if value is meant), str(value))


@dataclass(frozen=True)
class NormOption(Option):
    """The option `norm` of an architecture: a kind of norm layer by its name, with options of its own if wanted.

    >>> NormOption().problem("bach").partition("; allowed: ")[0]
    "unknown norm 'bach'; nearest: batch"
    >>> NormOption().resolve({"name": "group", "groups": 8}, {})
    'group(groups=8)'
    """

    default: str = "batch"

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        try:
            norm_options(value)
        except UserError as error:
            return error.faults[0].message
        return None

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> str:
        """Return the canonical text."""
        return norm_text(value)

    def allowed(self) -> str:
        """Return the names, in alphabetical order."""
        return ", ".join(sorted(norm_names()))
