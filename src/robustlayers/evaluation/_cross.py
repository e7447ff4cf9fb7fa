"""Adversarial images crafted on each of several views of models, and measured on each: one table of accuracies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustlayers.attacks import Attack, is_correct, is_own, label
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation._drawing import grid
from robustlayers.evaluation._still import Forward, check_labels, device_of, images, untouched
from robustlayers.evaluation._views import held, seed_draws
from robustlayers.evaluation.accuracy import Progress, _check
from robustlayers.evaluation.intervals import interval
from robustlayers.normalization.fold import crafting_forward

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CrossTable", "View", "check_batch_size", "cross", "described", "slices"]


@dataclass(frozen=True)
class View:
    """A model, and how it is held while it is used."""

    forward: Forward
    by: str = "running"
    branch: str | None = None

    def hold(self, device: torch.device) -> AbstractContextManager[None]:
        """Return a context in which the model runs so; it undoes everything."""
        return held(self.forward, device, self.by, self.branch)


@dataclass(frozen=True)
class CrossTable:
    """Right images of `total`: measured on each name clean, and under what the attack made on each name.

    `counts[crafted][measured]`: images that are right on `measured`, both clean and as crafted on `crafted`.
    """

    names: tuple[str, ...]
    clean: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]
    total: int
    attack: str

    def accuracy(self, crafted: str, measured: str) -> float:
        """Return the accuracy, in [0, 1], on `measured` under images crafted on `crafted`."""
        return self.counts[crafted][measured] / self.total

    @property
    def matrix(self) -> Tensor:
        """Accuracies [crafted on, measured on] in the order of `names`, float64."""
        found = [[self.accuracy(crafted, measured) for measured in self.names] for crafted in self.names]
        return torch.tensor(found, dtype=torch.float64)

    @property
    def worst(self) -> dict[str, str]:
        """For each name, on which one images were crafted that it stands worst, the first of several.

        A model that stands images worse which were crafted on another model than those crafted on itself masks
        its gradients (Athalye et al. 2018, section 3.1).
        """
        return {m: min(self.names, key=lambda crafted: self.counts[crafted][m]) for m in self.names}

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each cell, those without an attack first, with exact intervals."""
        cells = [("", name, "", self.clean[name]) for name in self.names]
        cells += [(a, b, self.attack, self.counts[a][b]) for a in self.names for b in self.names]
        found = []
        for crafted, measured, attack, count in cells:
            low, high = interval(count, self.total)
            found.append(
                {
                    "crafted_on": crafted,
                    "measured_on": measured,
                    "attack": attack,
                    "accuracy": count / self.total,
                    "low": low,
                    "high": high,
                    "count": count,
                    "total": self.total,
                }
            )
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw accuracies in percent: crafted on from the top down, measured on from left to right, clean first."""
        values = [[self.clean[name] / self.total for name in self.names]]
        values += [[self.accuracy(crafted, measured) for measured in self.names] for crafted in self.names]
        return grid(axes, values, ["no attack", *self.names], self.names, "measured on", "crafted on")


def cross(
    views: Mapping[str, View],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    batch_size: int,
    seed: int,
    progress: Progress | None,
) -> CrossTable:
    """Craft each batch on every view, with the same draws, and measure it on every view.

    Batches are of nearly equal size, so that none is too small for statistics of its own.
    """
    check_labels(x, y)
    check_batch_size(batch_size)
    names = tuple(views)
    clean = dict.fromkeys(names, 0)
    counts = {crafted: dict.fromkeys(names, 0) for crafted in names}
    for batch in slices(len(x), batch_size):
        right = {}
        for name, view in views.items():
            seed_draws(view.forward, seed, "cross", "clean", batch.start)
            right[name] = _verdict(view, x[batch], y[batch])
            clean[name] += int(right[name].sum())
        for crafted, view in views.items():
            device = device_of(view.forward, x)
            natural, labels = images(x[batch], device), y[batch].to(device)
            generator = stream(seed, "cross", label(attack), batch.start)
            seed_draws(view.forward, seed, "cross", label(attack), batch.start)
            with view.hold(device):
                forward = view.forward
                if is_own(attack) and view.by == "running" and isinstance(forward, nn.Module):
                    forward = crafting_forward(forward)  # costs less; the verdict is the model's own
                with untouched(view.forward):
                    adversarial = attack(forward, natural, labels, generator=generator)
            _check(label(attack), attack, adversarial, natural)
            for measured, other in views.items():
                seed_draws(other.forward, seed, "cross", "verdict", label(attack), batch.start)
                standing = right[measured] & _verdict(other, adversarial.to(natural.dtype), y[batch])
                counts[crafted][measured] += int(standing.sum())
            if progress is not None:
                progress(crafted, batch.stop, len(x))
    return CrossTable(names, clean, counts, len(x), described(attack))


def described(attack: Attack) -> str:
    """Return one line about an attack; a foreign one may have a label only."""
    return str(attack.describe()) if hasattr(attack, "describe") else label(attack)  # pyright: ignore


def slices(n: int, batch_size: int) -> Iterator[slice]:
    """Yield slices of n places, of nearly equal size and at most `batch_size`."""
    parts = -(-n // batch_size)
    for part in range(parts):
        yield slice(part * n // parts, (part + 1) * n // parts)


def check_batch_size(batch_size: object) -> None:
    """Raise `UserError` unless it is a whole number, 1 or more."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r} is not allowed; allowed: a whole number, 1 or more")


@torch.no_grad()
def _verdict(view: View, x: Tensor, y: Tensor) -> Tensor:
    device = device_of(view.forward, x)
    with view.hold(device):
        return is_correct(view.forward(images(x, device)), y.to(device)).cpu()
