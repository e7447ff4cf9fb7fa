"""All flags of one model at once, with what they were read from: accuracy against eps, and against steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from robustlayers.attacks import FGSM, PGD, NamedAttack, Square, Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import pixels_text
from robustlayers.evaluation._drawing import GRAY, MARKERS, SERIES, axes_or_new
from robustlayers.evaluation._still import Forward, device_of, still
from robustlayers.evaluation._views import seed_draws
from robustlayers.evaluation.accuracy import Progress, worst_case
from robustlayers.evaluation.flags import (
    black_box,
    flags,
    huge_eps,
    larger_eps,
    meaning,
    more_steps,
    single_step,
)
from robustlayers.evaluation.intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "SanityReport", "sanity"]

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the threat's eps
_STEPS = (1, 2, 4, 8, 16, 32)
_FLAG_FORWARDS, _FLAG_BACKWARDS = 31, 12  # of `flags`


@dataclass(frozen=True)
class Curve:
    """How many of `total` images are right as one setting of an attack grows: `eps` in pixel units, or `steps`."""

    setting: str
    values: tuple[float, ...]
    counts: tuple[int, ...]
    total: int
    attack: str

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each point, with exact intervals."""
        found = []
        for value, count in zip(self.values, self.counts, strict=True):
            low, high = interval(count, self.total)
            row = {"setting": self.setting, "value": value, "attack": self.attack, "accuracy": count / self.total}
            found.append({**row, "low": low, "high": high, "count": count, "total": self.total})
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw accuracy in percent against the setting, with 95 % intervals for the choice of images.

        How to read it: the line has to fall, against eps down to 0; where it is flat above 0, the attack fails.
        """
        axes = axes_or_new(axes, 4.4, 3.0)
        rows, place = self.rows(), int(self.setting == "steps")
        heights = [100 * row["accuracy"] for row in rows]
        low, high = [100 * row["low"] for row in rows], [100 * row["high"] for row in rows]
        axes.fill_between(self.values, low, high, color=SERIES[place], alpha=0.18, linewidth=0)
        axes.plot(self.values, heights, color=SERIES[place], marker=MARKERS[place], markersize=5, linewidth=1.5)
        if self.setting == "eps":
            axes.set_xscale("symlog", linthresh=min(value for value in self.values if value > 0))
            labels = [pixels_text(value) for value in self.values]
        else:
            axes.set_xscale("log", base=2)
            labels = [str(int(value)) for value in self.values]
        axes.set_xticks(list(self.values), labels, rotation=45)
        axes.minorticks_off()
        axes.axhline(0, color=GRAY, linewidth=0.8)
        axes.set_ylim(-3, 103)
        axes.set_xlabel(self.setting)
        axes.set_ylabel("right, %")
        axes.set_title(self.attack, fontsize="small")
        return axes


@dataclass(frozen=True)
class SanityReport:
    """What `sanity` found: `flags`, empty for an honest model, and the numbers behind them.

    `counts`: attack -> images of `total` that are right under it, `clean` first, in the threat. `by_eps` and `by_steps`
    are None for a model without a gradient. `skipped`: what could not be run, and why. `forward_passes` and
    `backward_passes`: the most that an image cost.
    """

    threat: Threat
    total: int
    flags: tuple[str, ...]
    counts: Mapping[str, int]
    by_eps: Curve | None
    by_steps: Curve | None
    skipped: tuple[str, ...]
    forward_passes: int
    backward_passes: int

    @property
    def meanings(self) -> dict[str, str]:
        """The text of each flag, and what it means."""
        return {text: meaning(text) for text in self.flags}

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each accuracy in the threat, then those of both curves."""
        rows: list[dict[str, Any]] = []
        for attack, count in self.counts.items():
            low, high = interval(count, self.total)
            row = {"setting": "", "value": None, "attack": attack, "accuracy": count / self.total}
            rows.append({**row, "low": low, "high": high, "count": count, "total": self.total})
        for curve in (self.by_eps, self.by_steps):
            rows += curve.rows() if curve is not None else []
        return rows

    def plot(self, axes: tuple[Axes, Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw accuracy against eps and against steps; both axes are in one figure, `axes[0].figure` saves it.

        Raises `UserError` for a model without a gradient, which has no curves.
        """
        if self.by_eps is None or self.by_steps is None:
            raise UserError("plot: there are no curves; the model has no gradient")
        if axes is None:
            from matplotlib.figure import Figure  # takes long to import, and most uses never draw

            left, right = Figure(figsize=(9.0, 3.4), layout="constrained").subplots(1, 2)
        else:
            left, right = axes
        return self.by_eps.plot(left), self.by_steps.plot(right)

    def __str__(self) -> str:
        lines = [f"sanity on {self.total} images, {self.threat}: {len(self.flags) or 'no'} flags"]
        lines += [f"{text}. {meaning(text)}" for text in self.flags]
        lines += [f"skipped: {text}" for text in self.skipped]
        return "\n".join(lines)


def sanity(
    model: Forward,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    batch_size: int = 500,
    *,
    steps: int = 20,
    queries: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> SanityReport:
    """Run every flag on a model, and measure accuracy against eps and against steps.

    `model`: an `nn.Module`, held in evaluation mode with norm layers by running statistics and left without a trace, or
    a function from images to logits, used as it is. `x`: some hundred images [n, c, h, w], uint8 or floats in [0, 1];
    `y`: labels [n]. `steps`: of PGD, 10 or more; `queries`: of Square, below 1000 of which it shows little.

    What runs, each on the images that are right clean: `flags` on the first batch; FGSM, PGD on the cross-entropy and on
    the margin, and Square, in the threat; PGD at eps/4 to 4 eps, and with twice the steps at a huge eps (0.5 in linf,
    0.5 sqrt(d) in l2, 0.5 d in l1, d the values of an image: each ball holds plain gray); and PGD of 1 to 32 steps of
    length eps/4, last iterate.
    The steps are tried at the threat's eps, or where fewer than a tenth of the images fall there, at the next larger of
    those above. With random outputs, black-box attacks and rising accuracies count above 10 % of the images, since each
    verdict is one draw. It says nothing against a defense that a better attack breaks: it is no substitute for AutoAttack.

    Cost: at most 280 forwards, 236 backwards, and `queries` forwards of Square, for each image with the defaults.

    Raises `UserError` as `accuracy` does, and for an eps of 0.
    """
    if threat.eps == 0:
        raise UserError("sanity: eps is 0; allowed: more than 0")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 10:
        raise UserError(f"steps: {steps!r} is not allowed; allowed: a whole number, 10 or more")
    seed_draws(model, seed, "sanity")
    found = flags(model, x[:batch_size], y[:batch_size], threat)
    square, skipped = _square(threat, queries, x)
    run = _Runs(model, x, y, batch_size, seed, progress)
    if any(text.startswith("no gradient") for text in found):
        verdicts = run(square)
        found += black_box({"clean": verdicts["clean"]}, {name: verdicts[name] for name in square})
        skipped += ("gradient attacks: the model has no gradient",)
        return _report(threat, x, found, _counts(verdicts, ["clean", *square]), None, None, skipped, run.cost)

    white: dict[str, NamedAttack] = {
        "fgsm": FGSM(threat),
        f"pgd-{steps}": PGD(threat, steps=steps),
        f"pgd-margin-{steps}": PGD(threat, steps=steps, loss="margin"),
    }
    grid = _grid(threat, x[0].numel())
    at = _at_each(grid, threat, steps)
    verdicts = run({**white, **dict(at.values()), **square})
    counts = _counts(verdicts, ["clean", *white, *square])
    right, falls = counts["clean"], [int(verdicts[name].sum()) for name, _ in at.values()]
    text = f"pgd-{steps}, {threat.norm}, best iterate, {2 * steps} steps at the last"
    by_eps = Curve("eps", (0.0, *grid), (right, *falls), len(x), text)
    inside = [(eps, fall) for eps, fall in zip(grid, falls, strict=True) if eps >= threat.eps]
    chosen = next((eps for eps, fall in inside if fall <= 0.9 * right), inside[-1][0])
    by_steps = _by_steps(run, Threat(threat.norm, chosen))

    luck = {"tolerance": 0.1} if any(text.startswith("random output") for text in found) else {}
    found += black_box({name: verdicts[name] for name in white}, {name: verdicts[name] for name in square}, **luck)
    found += more_steps(_STEPS, by_steps.counts, len(x), **luck)
    found += larger_eps(by_eps.values, by_eps.counts, len(x), **luck)
    found += huge_eps(grid[-1], falls[-1], len(x))
    if not any(text.startswith("single step") for text in found):  # which the first batch may have shown
        found += single_step(right, counts["fgsm"], counts[f"pgd-{steps}"], len(x))
    return _report(threat, x, found, counts, by_eps, by_steps, skipped, run.cost)


class _Runs:
    """Attacks on the images that are right clean, and what they cost an image at most, with that of the flags."""

    def __init__(
        self, model: Forward, x: Tensor, y: Tensor, batch_size: int, seed: int, progress: Progress | None
    ) -> None:
        self.model, self.y, self.batch_size, self.seed, self.progress = model, y, batch_size, seed, progress
        self.device = device_of(model, x)
        self.x = x.to(self.device)
        self.cost = [(_FLAG_FORWARDS, _FLAG_BACKWARDS)]

    def __call__(self, attacks: Mapping[str, NamedAttack]) -> dict[str, Tensor]:
        self.cost.append((1, 0))  # clean
        self.cost.extend((attack.forward_passes + 1, attack.backward_passes) for attack in attacks.values())
        with still(self.model, self.device):
            return worst_case(
                # As a function: the flags are about the gradient of the model itself, not of a folded equivalent.
                lambda z: self.model(z.to(self.device)),
                self.x,
                self.y,
                attacks,
                self.batch_size,
                seed=self.seed,
                progress=self.progress,
            )


def _at_each(grid: list[float], threat: Threat, steps: int) -> dict[float, tuple[str, NamedAttack]]:
    """Return PGD at each eps, with its name: of twice the steps at the last, the attack on the threat at its own eps."""
    found: dict[float, tuple[str, NamedAttack]] = {}
    for eps in grid:
        n = 2 * steps if eps == grid[-1] else steps
        name = f"pgd-{n}" if eps == threat.eps and n == steps else f"pgd-{n} at {pixels_text(eps)}"
        found[eps] = name, PGD(Threat(threat.norm, eps), steps=n)
    return found


def _by_steps(run: _Runs, ball: Threat) -> Curve:
    length = ball.eps / 4
    tried = {f"pgd-{n}, step eps/4": PGD(ball, steps=n, step_size=length, keep="last") for n in _STEPS}
    verdicts = run(tried)
    text = f"pgd, {ball}, step {pixels_text(length)}, last iterate"
    counts = tuple(_counts(verdicts, list(tried)).values())
    return Curve("steps", tuple(map(float, _STEPS)), counts, len(run.x), text)


def _square(threat: Threat, queries: int, x: Tensor) -> tuple[dict[str, NamedAttack], tuple[str, ...]]:
    if threat.norm == "l1":
        return {}, ("square: not offered for l1, so nothing looks for masked gradients without a gradient",)
    if x.ndim != 4:
        return {}, ("square: takes images [n, c, h, w]",)
    return {f"square-{queries}": Square(threat, queries=queries)}, ()


def _grid(threat: Threat, values: int) -> list[float]:
    """Return the eps of the curve, the last of which holds plain gray around every image."""
    huge = {"linf": 0.5, "l2": 0.5 * values**0.5, "l1": 0.5 * values}[threat.norm]
    return [*(f * threat.eps for f in _FACTORS if f * threat.eps < huge or f == 1), *([huge] * (huge > threat.eps))]


def _counts(verdicts: Mapping[str, Tensor], names: list[str]) -> dict[str, int]:
    return {name: int(verdicts[name].sum()) for name in names}


def _report(
    threat: Threat,
    x: Tensor,
    found: list[str],
    counts: dict[str, int],
    by_eps: Curve | None,
    by_steps: Curve | None,
    skipped: tuple[str, ...],
    cost: list[tuple[int, int]],
) -> SanityReport:
    forwards, backwards = (sum(column) for column in zip(*cost, strict=True))
    return SanityReport(threat, len(x), tuple(found), counts, by_eps, by_steps, skipped, forwards, backwards)
