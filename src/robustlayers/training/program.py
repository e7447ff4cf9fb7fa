"""The program of a phase: which groups learn in each step, whose gradients are due, how large the perturbations are.

The same program drives the training and predicts its cost, so that a plan's passes are those that are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from robustlayers.core.errors import UserError, one_of
from robustlayers.training.objectives import Signal
from robustlayers.training.step import WHOLE, PartialStep, Turn

__all__ = ["PERTURBATIONS", "Perturbation", "Program", "Window", "check_windows"]

Window = tuple[float, float]
"""(begin, end): the part of a phase, in fractions of its steps, in which a group learns"""

PERTURBATIONS = ("constant", "hinge", "ramp")


@dataclass(frozen=True)
class Perturbation:
    """The factor of the attack's eps, and of its step size, at progress t in [0, 1] of a phase.

    `constant` 1; `ramp` rises linearly from `low` at t = 0 to 1 at t = `until`; `hinge` stays at `low` until t = `since`,
    then rises linearly to 1 at t = `until`. At 0 nothing is crafted: the adversarial images are the natural ones.

    A hinge helps adversarial fine-tuning from natural weights (Ngnawé et al. 2026, arXiv 2509.23325); `since` and `until`
    are fractions of our own choice.

    >>> [Perturbation("hinge", since=0.25, until=0.75).factor_at(t) for t in (0.1, 0.5, 0.9)]
    [0.0, 0.5, 1.0]
    """

    name: str = "constant"
    low: float = 0.0
    since: float = 0.25  # of hinge
    until: float = 0.75

    def __post_init__(self) -> None:
        if self.name not in PERTURBATIONS:
            raise UserError(one_of("perturbation schedule", self.name, PERTURBATIONS))
        begin = self.since if self.name == "hinge" else 0.0
        if not 0 <= begin < self.until <= 1:
            raise UserError(
                f"perturbation: it rises from {begin:g} until {self.until:g} of the phase; "
                "allowed: fractions from 0 to 1, since before until"
            )
        if not 0 <= self.low <= 1:
            raise UserError(f"perturbation: low {self.low:g}; allowed: a factor from 0 to 1")

    def factor_at(self, t: float) -> float:
        """Return the factor at progress t."""
        if self.name == "constant":
            return 1.0
        begin = self.since if self.name == "hinge" else 0.0
        share = min(1.0, max(0.0, (t - begin) / (self.until - begin)))
        return self.low + (1 - self.low) * share

    def __str__(self) -> str:
        if self.name == "constant":
            return "constant"
        since = f" from {self.since:g}" if self.name == "hinge" else ""
        return f"{self.name} of eps{since} until {self.until:g} of the phase, starting at {self.low:g}"


def check_windows(signals: Mapping[str, Signal], windows: Mapping[str, Window]) -> None:
    """Raise `UserError` for windows of groups that do not learn, for empty ones, and for a time in which none learns."""
    for group, (begin, end) in windows.items():
        if group not in signals:
            raise UserError(one_of("group", group, signals))
        if not signals[group]:
            raise UserError(f"group {group!r} is frozen: it has no window to learn in")
        if not 0 <= begin < end <= 1:
            raise UserError(
                f"window of {group!r} is {begin:g} to {end:g}; allowed: from 0 to 1, the first below the second"
            )
    trained = [windows.get(group, (0.0, 1.0)) for group, signal in signals.items() if signal]
    at = 0.0
    for begin, end in sorted(trained):
        if begin > at:
            break
        at = max(at, end)
    if trained and at < 1:
        raise UserError(f"no group learns after {at:g} of the phase; let the windows cover it")


class Program:
    """The turns of all steps of a phase.

    Args:
        step: bound to the phase's groups, attack and ascent.
        sizes: images in each batch of an epoch.
        steps: of the whole phase.
        windows: group -> the part of the phase in which it learns; all of it unless given.
        perturbation: schedule of the attack's eps.
        due: `due(step) -> groups whose gradients are taken`; all unless given.
    """

    def __init__(
        self,
        step: PartialStep,
        sizes: Sequence[int],
        steps: int,
        *,
        windows: Mapping[str, Window] | None = None,
        perturbation: Perturbation | None = None,
        due: Callable[[int], frozenset[str]] | None = None,
    ) -> None:
        self.step, self.sizes, self.steps = step, tuple(sizes), steps
        self.windows = dict(windows or {})
        self.perturbation = perturbation or Perturbation()
        self.groups = frozenset(group for group, signal in step.signals.items() if signal)
        check_windows(step.signals, self.windows)
        self._due = due
        warm = step.ascent is not None and float(step.ascent.warmup) > 0
        self.steady = not self.windows and due is None and self.perturbation.name == "constant" and not warm

    def turn(self, index: int) -> Turn:
        """Return the turn of step `index`, from 0."""
        if self.steady:
            return WHOLE
        t = index / self.steps
        learning = frozenset(group for group in self.groups if _within(t, self.windows.get(group, (0.0, 1.0))))
        due = learning if self._due is None else learning & self._due(index)
        return Turn(
            learning=None if learning == self.groups else learning,
            due=None if due == learning else due,
            eps=self.perturbation.factor_at(t),
            ascend=self.step.ascent is None or self.step.ascent.active(index, self.steps),
        )

    def learned(self, index: int) -> dict[str, int]:
        """Return for each group the backward passes of step `index` that its gradient was taken from."""
        turn = self.turn(index)
        due = turn.due if turn.due is not None else turn.learning if turn.learning is not None else self.groups
        return {group: len(self.step.signals[group]) for group in due}

    def passes(self) -> tuple[int, int]:
        """Return (forward, backward) passes of single images over the whole phase."""
        forward = backward = 0
        if self.steady:
            one, two = self.step.passes_per_batch()
            images = self.images
            return one * images, two * images
        known: dict[Turn, tuple[int, int]] = {}
        for index in range(self.steps):
            turn = self.turn(index)
            key = Turn(turn.learning, turn.due, float(turn.eps > 0), turn.ascend)
            if key not in known:
                known[key] = self.step.passes_per_batch(key)
            size = self.sizes[index % len(self.sizes)]
            forward += known[key][0] * size
            backward += known[key][1] * size
        return forward, backward

    @property
    def images(self) -> int:
        """Images seen in the whole phase."""
        epochs, rest = divmod(self.steps, len(self.sizes))
        return epochs * sum(self.sizes) + sum(self.sizes[:rest])


def _within(t: float, window: Window) -> bool:
    return window[0] <= t < window[1]
