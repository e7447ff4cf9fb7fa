"""Random normalization: each forward goes through one of several kinds of normalization, drawn at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.models.options import Option
from robustlayers.normalization.layers.common import (
    ScaleShift,
    batch_class,
    batch_norm_like,
    channels_of,
    check_channels,
    chosen,
    kind,
    plain,
    settle,
)
from robustlayers.normalization.layers.group import group_count

__all__ = ["RANDOM", "RandomNorm", "held_draws", "random_norm", "seed_draws"]

_DEFAULT = "batch+instance+layer+group-8"
_GROUP = re.compile(r"group-([1-9][0-9]{0,5})")


class _Draws:
    """Where a layer's stream is and how many draws were made: an object, so that a draw does not look like a change."""

    def __init__(self, position: tuple[int | str, ...]) -> None:
        self.position, self.count = position, 0


class RandomNorm(nn.Module):
    """Batch, instance, layer or group norm, drawn anew for each forward.

    **What.** `kinds` are what is drawn from, alike: `batch`, `instance`, `layer`, `group-8` (with the rule of
    `group_count`). `branch = "random"`, the default, draws for each forward; a kind's name holds that kind. An attack does
    not know what the next forward will be, so one gradient is not the gradient of what predicts.

    **Maths.** y = weight norm_k(x) + bias, k uniform. The running statistics of `batch` move when it is drawn in training.

    **Cost.** 2 c parameters, 2 c + 1 numbers of state, time of the kind drawn. Robust accuracy means something under
    attacks that average the gradient over draws only (EOT, AutoAttack's `rand`).

    **Source.** Dong et al. 2022, "Random normalization aggregation" (RNA). In its code the caller draws before a pass, for
    each layer or for the whole network: `held_draws` does the former.

    **Not known.** Whether each kind has a scale and shift of its own; here all share one, so that only the normalization is
    random.

    **Draws.** The d-th draw of a layer is a function of (seed, layer's position, d): no global random state, also in
    evaluation. `seed_draws` sets the seed and the positions for a whole model and starts the count anew; a model from
    `models.build` or `convert` has seed 0 and the layers' names. Draws are not part of the state dict.

    Input and output: [n, channels, ...].

    >>> layer = RandomNorm(nn.BatchNorm2d(4), kinds=("batch", "group-2"))
    >>> layer.branches
    ('random', 'batch', 'group-2')
    """

    is_normalization = True
    stands_for: type[nn.Module] = nn.BatchNorm2d  # the batch norm for the same inputs

    def __init__(self, norm: nn.Module, *, kinds: str | Sequence[str] = _DEFAULT) -> None:
        super().__init__()
        self.kinds = _kinds(kinds)
        self.channels = channels_of(norm)
        self.branches = ("random", *self.kinds)
        self.branch = "random"
        self.batch = batch_norm_like(norm, affine=False) if "batch" in self.kinds else None
        self.affine = settle(ScaleShift(self.channels), norm)
        self.stands_for = batch_class(norm)
        self.eps = 1e-5
        self._draws = _Draws((0,))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`."""
        check_channels(x, self.channels, "RandomNorm")
        name = chosen(self)
        return self.affine(self._normalized(x, self.draw() if name == "random" else name))

    def draw(self) -> str:
        """Return the kind that the next draw gives, and count it."""
        generator = stream(*self._seeded(), self._draws.count)
        self._draws.count += 1
        return self.kinds[int(torch.randint(len(self.kinds), (1,), generator=generator))]

    def _seeded(self) -> tuple[Any, ...]:
        seed, *position = self._draws.position
        return (seed, "random-norm", *position)

    def seed(self, seed: int, *position: int | str) -> None:
        """Start the draws anew as a function of `seed` and `position`."""
        self._draws = _Draws((seed, *position))

    def _normalized(self, x: Tensor, name: str) -> Tensor:
        if self.batch is not None and name == "batch":
            return self.batch(x)
        if name == "instance":
            return functional.instance_norm(x, eps=self.eps)
        return functional.group_norm(x, _groups(name, self.channels), eps=self.eps).to(x.dtype)

    def plain(self) -> nn.Module:
        """Return the kind that is held, or batch norm while the kind is drawn, with the scale, shift and statistics."""
        name = chosen(self)
        if name in ("random", "batch"):
            layer = self.stands_for(self.channels) if self.batch is None else batch_norm_like(self.batch)
        elif name == "instance":
            layer = nn.InstanceNorm2d(self.channels, affine=True)
        else:
            layer = nn.GroupNorm(_groups(name, self.channels), self.channels)
        settle(layer, self.affine)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Return the kinds, for `print(model)`."""
        return f"{self.channels}, kinds={'+'.join(self.kinds)}, branch={self.branch}"


def seed_draws(model: nn.Module, seed: int, *position: int | str) -> int:
    """Make the draws of all random norms of `model` a function of (seed, position, layer's name); return how many.

    To be called where draws shall be repeatable: at each step of a training with (epoch, step), at each batch of an
    evaluation.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RandomNorm)}
    for name, layer in layers.items():
        layer.seed(seed, name, *position)
    return len(layers)


@contextmanager
def held_draws(model: nn.Module) -> Iterator[dict[str, str]]:
    """Draw a kind for every random norm of `model` once, and hold it for the passes inside; yields name -> kind.

    Layers whose branch is set to a kind already stay with it.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RandomNorm)}
    drawn = {name: layer.draw() for name, layer in layers.items() if layer.branch == "random"}
    try:
        for name, choice in drawn.items():
            layers[name].branch = choice
        yield drawn
    finally:
        for name in drawn:
            layers[name].branch = "random"


def _groups(name: str, channels: int) -> int:
    match = _GROUP.fullmatch(name)
    return 1 if match is None else group_count(channels, int(match[1]))


def _kinds(kinds: Any) -> tuple[str, ...]:
    names = tuple(kinds.split("+")) if isinstance(kinds, str) else tuple(kinds)
    for name in names:
        if name not in ("batch", "instance", "layer") and not (isinstance(name, str) and _GROUP.fullmatch(name)):
            raise UserError(one_of("kind of random norm", str(name), ("batch", "instance", "layer", "group-8")))
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"kinds of random norm: {'+'.join(names) or 'none'} is not allowed; allowed: two or more, each once"
        )
    return names


@dataclass(frozen=True)
class _Kinds(Option):
    """The kinds to draw from: a list, or names joined by `+`."""

    default: str = _DEFAULT

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, str | list | tuple):
            return f"{value!r} is not allowed; allowed: {self.allowed()}"
        try:
            _kinds(value)
        except UserError as error:
            return error.faults[0].message
        return None

    def allowed(self) -> str:
        return "two or more of batch, instance, layer, group-8 (any number), joined by +"

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> str:
        return "+".join(_kinds(value))


def random_norm(norm: nn.Module, kinds: str | Sequence[str] = _DEFAULT) -> nn.Module:
    """Return a random norm in the place of `norm`. Scale and shift are carried over, and the statistics of batch norm."""
    return RandomNorm(plain(norm), kinds=kinds)


def _finish(network: nn.Module, **options: Any) -> None:
    seed_draws(network, 0)


RANDOM = kind(random_norm, options={"kinds": _Kinds()}, finish=_finish)
