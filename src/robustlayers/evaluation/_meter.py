"""The passes that an attack makes, and from them how long the rest of an evaluation will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlayers.attacks import NamedAttack
from robustlayers.evaluation._shards import Shard

__all__ = ["PAUSE", "Meter", "Moment", "Outlook", "units_of"]

PAUSE = 0.5
"""Seconds between two reports, at least."""


@dataclass(frozen=True)
class Moment:
    """Where an evaluation stands: images that `attack` is done with, `of` how many, and how many are still `robust`.

    `left`: seconds that all attacks will still take, if as many images are broken as so far; None before it can be told.
    `begun`: what is done of the batch under way, in images.
    """

    attack: str
    done: int
    of: int
    robust: int
    left: float | None
    begun: float = 0.0


def units_of(attack: NamedAttack) -> int:
    """Return the most that an image costs under an attack, in forward passes; a backward counts as two."""
    return max(1, attack.forward_passes + 2 * attack.backward_passes)


class Outlook:
    """Counts what is done, in forward passes of single images, and tells `progress` twice a second what is left.

    A backward counts as two forwards. Before any image is done, all are expected to stand an attack to its end.
    """

    def __init__(self, progress: Callable[[Moment], None] | None) -> None:
        self._progress = progress
        self._units: list[int] = []  # of the attacks to come, for an image that stands
        self._name = ""
        self._done = self._of = self._broken = 0
        self._made, self._seconds, self._under_way = 0, 0.0, 0
        self._began = self._told = 0.0

    def start(self, units: Sequence[int]) -> None:
        """Take note of what each attack costs at most for an image."""
        self._units = [0, *units]

    def begin(self, name: str, images: int, kept: Sequence[Shard]) -> None:
        """Begin an attack, some of whose shards may be there already."""
        self._units = self._units[1:]
        self._name, self._of, self._done, self._broken = name, images, 0, 0
        for shard in kept:
            self._count(shard)
        self._began = time.monotonic()
        self._tell(always=True)

    def add(self, shard: Shard) -> None:
        """Count a shard that is done."""
        self._count(shard)
        self._under_way, self._began = 0, time.monotonic()
        self._tell(always=True)

    def tick(self, units: int) -> None:
        """Count passes of the shard that is under way."""
        self._under_way += units
        self._tell()

    def left(self) -> float | None:
        """Return the seconds that are left, None before it can be told."""
        made = self._made + self._under_way
        seconds = self._seconds + (time.monotonic() - self._began if self._under_way else 0.0)
        if not made or seconds < 1:
            return None
        standing = 1 - self._broken / self._done if self._done else 1.0
        rest = self._of - self._done
        units = max(0.0, rest * standing * self._units[0] - self._under_way)
        survivors = self._done - self._broken + rest * standing
        units += survivors * sum(self._units[1:])
        return seconds / made * units

    def _count(self, shard: Shard) -> None:
        self._done += len(shard.places)
        self._broken += int(shard.broken.sum())
        self._made += shard.forwards + 2 * shard.backwards
        self._seconds += shard.seconds

    def _tell(self, *, always: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (always or now - self._told >= PAUSE):
            self._told = now
            begun = min(self._under_way / self._units[0], self._of - self._done) if self._units else 0.0
            moment = Moment(self._name, self._done, self._of, self._of - self._broken, self.left(), begun)
            self._progress(moment)


class Meter:
    """A forward that counts the passes it makes: one for each image, and a backward where a gradient is asked for.

    `tick` is called before each of them with its cost, in forward passes of single images.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], tick: Callable[[int], None]) -> None:
        self._forward, self._tick = forward, tick
        self.forwards = self.backwards = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits."""
        backward = torch.is_grad_enabled() and x.requires_grad
        self.forwards += len(x)
        self.backwards += len(x) if backward else 0
        self._tick(len(x) * (3 if backward else 1))
        return self._forward(x)
