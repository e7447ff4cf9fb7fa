"""Gaps between training and validation, epoch by epoch, and robust overfitting: what the best epoch is ahead of the last.

After the first decay of the learning rate, robust accuracy on unseen images falls while that on training images rises;
clean accuracy keeps rising on both (Rice, Wong & Kolter 2020, arXiv 2002.11569). So both have to be looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from robustlayers.analysis._axes import GRAY, SERIES, axes_or_new
from robustlayers.analysis._ground import finite_row
from robustlayers.core.errors import Fault, UserError, one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EpochGap", "Gaps", "gaps"]

_ACCURACIES = ("train_clean", "train_robust", "validation_clean", "validation_robust")


@dataclass(frozen=True)
class EpochGap:
    """Accuracies after one epoch, in [0, 1], and train minus validation; None where an epoch was not measured."""

    epoch: int
    phase: str
    train_clean: float | None
    train_robust: float | None
    validation_clean: float | None
    validation_robust: float | None
    clean_gap: float | None
    robust_gap: float | None


@dataclass(frozen=True)
class Gaps:
    """The gaps of one run.

    How to read it: a robust gap that opens while the clean one stays small is robust overfitting, and `robust_overfitting`
    is its price: what would be won by stopping at the best epoch. Several points of it are usual without a remedy.
    """

    epochs: tuple[EpochGap, ...]
    best_epoch: int  # of the highest robust accuracy on validation, the first of several
    best_robust: float
    last_epoch: int  # the last that was measured
    last_robust: float
    clean_at_best: float | None
    clean_at_last: float | None

    @property
    def robust_overfitting(self) -> float:
        """Robust validation accuracy at the best epoch minus that at the last, in [0, 1]; never below 0."""
        return self.best_robust - self.last_robust

    @property
    def clean_change(self) -> float | None:
        """Clean validation accuracy at the last epoch minus that at the best, which stopping early would give up."""
        if self.clean_at_best is None or self.clean_at_last is None:
            return None
        return self.clean_at_last - self.clean_at_best

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each epoch."""
        return [finite_row(asdict(epoch)) for epoch in self.epochs]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw both gaps over epochs in points, and where the robust accuracy on validation is best."""
        axes = axes_or_new(axes, 5.0, 3.2)
        for kind, paint, line in (("clean", SERIES[0], "--"), ("robust", SERIES[1], "-")):
            known = [(e.epoch, 100 * gap) for e in self.epochs if (gap := getattr(e, f"{kind}_gap")) is not None]
            axes.plot(
                [e for e, _ in known], [gap for _, gap in known], line, color=paint, label=f"{kind} gap", marker="."
            )
        axes.axvline(self.best_epoch, color=GRAY, linewidth=0.8, label="best robust validation accuracy")
        axes.set_xlabel("epoch")
        axes.set_ylabel("train minus validation, points")
        axes.legend(frameon=False, fontsize="small")
        return axes


def gaps(points: Iterable[Any], *, phase: str | None = None) -> Gaps:
    """Return the gaps of one run from its learning curve, and the best epoch against the last.

    `points` are mappings or objects with `epoch`, `phase`, and the accuracies `train_clean`, `train_robust`,
    `validation_clean` and `validation_robust` in [0, 1], such as the points of a study's curve; None and NaN are not
    measured. With `phase`, only the epochs of that phase count: a natural phase before it has no robustness to lose.

    Raises `UserError` for points that lack something, an unknown phase, a repeated epoch, and where no epoch has a robust
    accuracy on validation.

    >>> curve = [{"epoch": e, "phase": "main", "train_clean": 0.8, "train_robust": 0.5 + e / 10, "validation_clean": 0.8,
    ...           "validation_robust": robust} for e, robust in ((1, 0.4), (2, 0.5), (3, 0.45))]
    >>> found = gaps(curve)
    >>> found.best_epoch, round(found.robust_overfitting, 3), round(found.epochs[-1].robust_gap, 3)
    (2, 0.05, 0.35)
    """
    read = [_read(point, place) for place, point in enumerate(points)]
    phases = dict.fromkeys(epoch.phase for epoch in read)
    if phase is not None and phase not in phases:
        raise UserError(one_of("phase", phase, phases))
    epochs = sorted((epoch for epoch in read if phase in (None, epoch.phase)), key=lambda epoch: epoch.epoch)
    twice = [str(one.epoch) for one, two in itertools.pairwise(epochs) if one.epoch == two.epoch]
    if twice:
        raise UserError(f"gaps: epoch {twice[0]} is there more than once; give the curve of one run, of one seed")
    known = [(epoch, epoch.validation_robust) for epoch in epochs if epoch.validation_robust is not None]
    if not known:
        raise UserError("gaps: no epoch has a robust accuracy on validation")
    best, best_robust = max(known, key=lambda pair: (pair[1], -pair[0].epoch))
    last, last_robust = known[-1]
    return Gaps(
        tuple(epochs),
        best.epoch,
        best_robust,
        last.epoch,
        last_robust,
        best.validation_clean,
        last.validation_clean,
    )


def _read(point: Any, place: int) -> EpochGap:
    def get(name: str) -> Any:
        found = point.get(name, _read) if isinstance(point, Mapping) else getattr(point, name, _read)
        if found is _read:
            raise UserError(Fault(f"has no {name}", path=f"point {place}"))
        return found

    values: dict[str, float | None] = {}
    for name in _ACCURACIES:
        value = get(name)
        value = math.nan if value is None else float(value)
        if not math.isnan(value) and not 0 <= value <= 1:
            raise UserError(Fault(f"{name} is {value:g}; allowed: accuracies in [0, 1]", path=f"point {place}"))
        values[name] = None if math.isnan(value) else value
    return EpochGap(
        int(get("epoch")),
        str(get("phase")),
        **values,
        clean_gap=_difference(values["train_clean"], values["validation_clean"]),
        robust_gap=_difference(values["train_robust"], values["validation_robust"]),
    )


def _difference(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two
