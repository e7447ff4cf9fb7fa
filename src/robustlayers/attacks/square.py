"""The Square attack: random search by squares of falling size, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, prepare, score
from robustlayers.attacks._draws import Generators, own_generator, uniform
from robustlayers.attacks._goal import Goal, make_goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks._squares import Windows, corner, pattern, tiles
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number

__all__ = ["Square", "share"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_BLOCK = 256  # queries whose draws are made at once: one image's own generator is slow to ask


def share(query: int, first: float) -> float:
    """Return the share of an image's pixels that the square of a query covers: `first`, halved at fixed queries.

    Halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries (Andriushchenko et al. 2020),
    whatever the budget, as in AutoAttack's standard: so the first queries of a longer attack are those of a shorter.

    >>> share(10, 0.8), share(11, 0.8), share(4500, 0.8)
    (0.8, 0.4, 0.00625)
    """
    return first / 2 ** sum(query > at for at in _HALVINGS)


@dataclass(frozen=True)
class Square:
    """Random search without a gradient (Andriushchenko et al. 2020, algorithms 1 to 3), for linf and l2.

    Starts from vertical stripes of +-eps (linf) or a grid of patterns (l2). Each query changes one square of an image,
    at a random place, to a random corner of the ball for each channel (linf), or moves the length of the perturbation
    from another square into a pattern there (l2), and keeps the change where the loss rises. A square covers `p` of
    the pixels at first; see `share`. `loss` is `margin` or `ce`. An image is done when it is broken, and that is
    what is returned; otherwise the point of the highest loss. A longer attack begins like a shorter one, so accuracy
    never rises with `queries`. Images are [n, c, h, w].

    Cost: at most 1 + queries forwards, no backward. Weaker than the gradient attacks on an honest model: it is there to
    break a model whose gradients are masked. Below 1000 queries it shows little; 5000 is the standard.

    Raises `UserError` for values that are not allowed.

    >>> attack = Square(Threat("linf", "8/255"))
    >>> attack.describe(), attack.forward_passes, attack.backward_passes
    ('square-5000, linf 8/255, p 0.8, stops when broken', 5001, 0)
    """

    threat: Threat
    queries: int = 5000
    p: float = 0.8
    loss: str = "margin"

    def __post_init__(self) -> None:
        count("queries", self.queries, 0)
        object.__setattr__(self, "p", number(self.p, "p"))
        if not 0 < self.p <= 1:
            raise UserError(f"p: {self.p} is not allowed; allowed: more than 0, at most 1")
        if self.loss not in ("margin", "ce"):
            find_loss(self.loss)
            raise UserError(f"loss {self.loss}: not offered for square; allowed: ce, margin")
        if self.threat.norm not in ("linf", "l2"):
            raise UserError(f"square: not offered for {self.threat.norm}; allowed: linf, l2")

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most; one that is broken costs less."""
        return self.queries + 1

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return 0

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        loss = f", loss {self.loss}" if self.loss != "margin" else ""
        return f"square-{self.queries}, {self.threat}, p {self.p:g}{loss}, stops when broken"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `forward` needs no gradient."""
        x, y = prepare(x, y)
        if x.ndim != 4:
            raise UserError(f"square: takes images [n, c, h, w]; got shape {list(x.shape)}")
        if x.numel() == 0:
            return x.clone()
        goal = make_goal(self.loss, y, target)
        with torch.no_grad():
            best = Best(x, stop=True)
            self._search(forward, x, goal, own_generator(x, generator), best)
        return best.x

    def _search(self, forward: Forward, x: Tensor, goal: Goal, generator: Generators, best: Best) -> None:
        linf = self.threat.norm == "linf"
        start = self._stripes(x, generator) if linf else self._grid(x, generator)
        best.update(goal, start, *score(forward, start, goal.losses))
        rows = torch.arange(len(x), device=x.device)
        project = self.threat.projector(x)
        for query, draws in enumerate(self._draws(x, generator)):
            places = best.compact(rows)
            if places is not None:
                if not len(places):
                    return
                rows, goal, x = rows[places], goal.take(places), x[places]
                project = self.threat.projector(x)
            change = self._paint if linf else self._move
            x_adv = project(change(x, best.x[rows], share(query, self.p), draws[rows]))
            best.update(goal, x_adv, *score(forward, x_adv, goal.losses), rows)

    def _draws(self, x: Tensor, generator: Generators) -> Iterator[Tensor]:
        """Yield for each query what it draws for every image: two places, a turn, and a sign for each channel.

        Made for all images of the batch: no image's draws depend on which others are broken.
        """
        shape = len(x), _BLOCK, 5 + x.shape[1]
        for first in range(0, self.queries, _BLOCK):
            # Always a whole block: the first queries of many are those of few.
            block = uniform(shape, generator).to(x.device)
            yield from block[:, : self.queries - first].unbind(1)

    def _stripes(self, x: Tensor, generator: Generators) -> Tensor:
        n, c, _, w = x.shape
        signs = _signs(uniform((n, c, 1, w), generator, x.dtype)).to(x.device)
        return self.threat.project(x + self.threat.eps * signs, x)

    def _grid(self, x: Tensor, generator: Generators) -> Tensor:
        n, c, h, w = x.shape
        side, corners = tiles(h, w)
        tile = pattern(side).to(x)
        draws = uniform((n, len(corners), c + 1), generator, x.dtype).to(x.device)
        delta = torch.zeros_like(x)
        for i, (top, left) in enumerate(corners):
            turned = _turned(tile, draws[:, i, 0])
            delta[:, :, top : top + side, left : left + side] = turned * _signs(draws[:, i, 1:])[:, :, None, None]
        return self.threat.project(x + self._to_length(delta), x)

    def _paint(self, x: Tensor, x_adv: Tensor, p: float, draws: Tensor) -> Tensor:
        """linf: set every pixel of a square to x + eps or x - eps, with one sign for each channel."""
        h, w = x.shape[2:]
        side = min(max(round(math.sqrt(p * h * w)), 1), h, w)
        top, left = corner(draws[:, 0], h - side), corner(draws[:, 1], w - side)
        inside = _span(top, side, h)[:, None, :, None] & _span(left, side, w)[:, None, None, :]
        corners = x + self.threat.eps * _signs(draws[:, 5:]).to(x.dtype)[:, :, None, None]
        return torch.where(inside, corners, x_adv)

    def _move(self, x: Tensor, x_adv: Tensor, p: float, draws: Tensor) -> Tensor:
        """l2: give the length of the perturbation in two squares, and what is unused, to a pattern in the first."""
        _, c, h, w = x.shape
        side = max(round(math.sqrt(p * h * w)), 3)
        side = min(side + (side % 2 == 0), h, w)
        delta = x_adv - x
        unused = (self.threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
        first, second = (
            Windows(corner(draws[:, i], h - side), corner(draws[:, i + 1], w - side), side, c) for i in (0, 2)
        )
        old = first.read(delta)
        new = _turned(pattern(side).to(x), draws[:, 4]) * _signs(draws[:, 5:]).to(x.dtype)[:, :, None, None]
        new = new + old / _norm(old)
        # Of both squares together: read the second, wipe it, read what the first has left.
        both = second.read(delta).square().sum((2, 3), keepdim=True)
        delta = delta.clone()
        second.write(delta, 0.0)
        both = both + first.read(delta).square().sum((2, 3), keepdim=True)
        first.write(delta, new / _norm(new) * (both + unused / c).sqrt())
        return x + self._to_length(delta)

    def _to_length(self, delta: Tensor) -> Tensor:
        size = self.threat.size(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * (self.threat.eps / size)[:, None, None, None]


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


def _span(first: Tensor, side: int, length: int) -> Tensor:
    """Return which of `length` places are among the `side` from `first` on: [n] -> [n, length]."""
    place = torch.arange(length, device=first.device) - first[:, None]
    return (place >= 0) & (place < side)


def _turned(tile: Tensor, u: Tensor) -> Tensor:
    """Return the tile for each image, for half of them with rows and columns exchanged: [n, 1, side, side]."""
    return torch.where(u[:, None, None, None] < 0.5, tile, tile.T)


def _norm(window: Tensor) -> Tensor:
    return window.square().sum((2, 3), keepdim=True).sqrt() + 1e-12
