"""Interpolation: clean and robust loss on the straight line of one group between two nets, and how sharp its end is.

On the line the group is (1 - t) its values at the start + t its values in the model, all other entries being the model's:
t = 0 is the model with the group from the start, t = 1 the model itself (Vlaar & Frankle 2022, layer-wise). With the
start an initial state the line shows what training did to one layer; with another run's state and the group `all`, it is
the line between two nets, and a barrier on it means that they do not lie in one valley (Frankle et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from robustlayers.analysis._axes import GRAY, MARKERS, SERIES, axes_or_new
from robustlayers.analysis._ground import KEPT, Bench, Groups, Quality, bind_groups, finite_row, put_back
from robustlayers.analysis.worst import WorstCase, robust_criticality
from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.evaluation import Progress
from robustlayers.selection import Selection
from robustlayers.training import copy_entries, interpolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "LinePoint", "interpolation", "on_line", "sharpness"]

METRICS = ("clean_accuracy", "clean_loss", "robust_accuracy", "robust_loss")
POSITIONS = tuple(place / 10 for place in range(11))


@dataclass(frozen=True)
class LinePoint:
    """The model with one group at `position` of its line; accuracies in [0, 1], losses in nats, robust ones or None."""

    group: str
    statistics: str
    position: float
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float | None
    robust_loss: float | None


@dataclass(frozen=True)
class Line:
    """The quality along the line of each group.

    How to read it: a line that falls evenly from left to right is a group that training moved on purpose; a flat one did
    not have to move; a hump between two good ends is a barrier, which separates two valleys.
    """

    points: tuple[LinePoint, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each point; what is not finite is None."""
        return [finite_row(asdict(point)) for point in self.points]

    def barriers(self, metric: str = "robust_loss", statistics: str = KEPT) -> dict[str, float]:
        """Return for each group the largest height of a loss over the chord between the line's ends, in nats.

        max over t of L(t) - ((1 - t) L(0) + t L(1)), with the first and the last position for 0 and 1; never below 0.
        Raises `UserError` for an accuracy, and for a robust loss without an attack.
        """
        if not metric.endswith("_loss"):
            raise UserError(f"barriers: {metric!r} is not allowed; allowed: clean_loss, robust_loss")
        found = {}
        for group, line in self._lines(metric, statistics).items():
            (first, low), (last, high) = line[0], line[-1]
            span = (last - first) or 1.0
            found[group] = max(loss - (low + (high - low) * (t - first) / span) for t, loss in line)
        return {group: max(0.0, height) for group, height in found.items()}

    def plot(self, axes: Axes | None = None, *, metric: str | None = None, statistics: str = KEPT) -> Axes:
        """Draw one metric along every line, from the start (0) to the model (1).

        Of more lines than there are colors, the five on which most changes have one, all others are gray.
        """
        measured = all(point.robust_loss is not None for point in self.points)
        metric = metric or ("robust_loss" if measured else "clean_loss")
        lines = self._lines(metric, statistics)
        axes = axes_or_new(axes, 5.0, 3.4)
        scale = 100 if metric.endswith("accuracy") else 1
        chosen = list(lines)
        if len(lines) > len(SERIES):
            most = sorted(lines, key=lambda group: -_reach(lines[group]))[: len(SERIES) - 1]
            chosen = [group for group in lines if group in most]  # in the order of execution
        for place, group in enumerate(group for group in lines if group not in chosen):
            name = None if place else f"{len(lines) - len(chosen)} others"
            axes.plot(*_scaled(lines[group], scale), color=GRAY, linewidth=0.7, alpha=0.6, label=name)
        for group, paint, mark in zip(chosen, SERIES, MARKERS, strict=False):
            axes.plot(*_scaled(lines[group], scale), color=paint, label=group, marker=mark, markersize=4)
        axes.set_xlabel("position of the group: 0 start, 1 the model")
        axes.set_ylabel(f"{metric.replace('_', ' ')}, {'%' if scale == 100 else 'nats'}")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize="small")
        return axes

    def _lines(self, metric: str, statistics: str) -> dict[str, list[tuple[float, float]]]:
        if metric not in METRICS:
            raise UserError(one_of("metric", metric, METRICS))
        kinds = {point.statistics for point in self.points}
        if statistics not in kinds:
            raise UserError(one_of("treatment of statistics", statistics, kinds))
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            value = getattr(point, metric)
            if value is None:
                raise UserError(f"{metric} was not measured: the analysis had no attack")
            if point.statistics == statistics:
                lines.setdefault(point.group, []).append((point.position, value))
        return lines


def _scaled(line: list[tuple[float, float]], scale: float) -> tuple[list[float], list[float]]:
    return [t for t, _ in line], [scale * value for _, value in line]


def _reach(line: list[tuple[float, float]]) -> float:
    """Return how much the finite values of a line differ; infinity where one is not finite."""
    values = [value for _, value in line]
    return max(values) - min(values) if all(map(math.isfinite, values)) else math.inf


def interpolation(
    model: nn.Module,
    start: Mapping[str, Tensor] | nn.Module,
    groups: Groups,
    x: Tensor,
    y: Tensor,
    *,
    positions: Sequence[float | str] = POSITIONS,
    attack: Attack | None = None,
    recalibrate_on: Tensor | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Line:
    """Return the model's clean and robust quality with each group in turn at each position of its line.

    Args:
        model: the line's end, t = 1; left bit for bit as it was.
        start: the line's beginning, t = 0: a state dict, such as the initial one, or another model.
        groups: `{name: selector}`, or a selector that is taken apart by module. `{"all": "all"}` with another run's net
            for the start is the line between two nets. A group of weights leaves running statistics as they are, one that
            holds them interpolates them too, variances linearly.
        x: images [n, c, h, w], uint8 or float in [0, 1]; y: integer labels [n].
        positions: t, in ascending order, each in [0, 1]. At 0 and 1 all entries are equal in every bit to those of the
            start and of the model.
        attack: run anew against the model at every point; None leaves out the robust numbers.
        recalibrate_on: training images. If given, each point is measured a second time with all running statistics
            estimated anew on them, the ends included: the middle of a line has none of its own.
        seed: of the attack's draws, the same at every point.

    Cost: an evaluation for each group, position and treatment of statistics.

    Raises `UserError` for wrong selectors or positions, and for a start that lacks a tensor of a group.
    """
    state = start.state_dict() if isinstance(start, nn.Module) else start
    places = [number(position, "position") for position in positions]
    if not places or places != sorted(set(places)) or places[0] < 0 or places[-1] > 1:
        raise UserError(f"positions: {places} is not allowed; allowed: numbers from 0 to 1, ascending, at least one")
    named = bind_groups(model, groups, x[:2])
    bench = Bench(
        x,
        y,
        attack,
        recalibrate_on=recalibrate_on,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        changes=len(named) * len(places),
    )
    for group in named.values():
        with put_back(model):
            _move(group.selection, state, 0.0)
    points = []
    # At t = 1 every group's line is the model itself.
    end: dict[str, Quality] | None = None
    for group in named.values():
        for place in places:
            if place == 1 and end is not None:
                found = end
                bench.skip(f"{group.name} at 1")
            else:
                found = bench.changed(
                    model, f"{group.name} at {place:g}", partial(_move, group.selection, state, place)
                )
            end = found if place == 1 else end
            points += [LinePoint(group.name, kind, place, **asdict(quality)) for kind, quality in found.items()]
    return Line(tuple(points))


@contextmanager
def on_line(
    model: nn.Module, start: Mapping[str, Tensor] | nn.Module, selection: Selection, position: float | str
) -> Iterator[nn.Module]:
    """Give the model with the selected entries at `position` inside the block; on exit it is bit for bit as it was.

    Raises `UserError` for a position outside [0, 1], and for a start that lacks a selected tensor.
    """
    place = number(position, "position")
    if not 0 <= place <= 1:
        raise UserError(f"position: {place:g} is not allowed; allowed: 0 (as at the start) to 1 (as it is)")
    with put_back(model):
        _move(selection, start.state_dict() if isinstance(start, nn.Module) else start, place)
        yield model


def _move(selection: Selection, state: Mapping[str, Tensor], position: float) -> None:
    if position == 0:
        copy_entries(selection, state, "the start", strict=True)  # what is missing or does not fit is found here, too
    else:
        interpolate(selection, state, 1 - position, "the start")


def sharpness(
    model: nn.Module,
    groups: Groups,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    *,
    size: float | str = 0.05,
    steps: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> WorstCase:
    """Return how much the loss rises at the point of sharpness-aware minimization around each group.

    R(theta + d) - R(theta) at d = size |theta_G|_2 g / |g|_2, g the gradient of R for the group: the first-order worst
    case in a ball relative to the group's norm (Foret et al. 2021, with the relative radius of Wu et al. 2020). More
    `steps` search the ball, which makes it `robust_criticality` with that radius. R is the mean cross-entropy on the clean
    images, or with an attack on a fixed set of adversarial ones. Arguments and errors as there.
    """
    step = 1.0 if steps == 1 else None
    options = {"batch_size": batch_size, "seed": seed, "progress": progress}
    return robust_criticality(model, groups, x, y, attack, eps=size, steps=steps, step_size=step, **options)
