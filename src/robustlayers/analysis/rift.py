"""RiFT: fine-tune the group that robustness needs least on clean images, and go as far towards it as robustness allows.

    1. theta_FT: the group of the lowest module robust criticality learns from clean images; all else is frozen.
    2. theta_alpha = (1 - alpha) theta_AT + alpha theta_FT.
    3. alpha is the one with the best clean accuracy whose robust accuracy is at most `tolerance` below that at alpha 0.

Zhu et al. 2023, "Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning", section 3,
arXiv 2308.02533. Here everything but the group is frozen, running statistics included, which the published code lets
drift to clean images; and alpha is chosen on images that the caller hands in, which must not be the test set. What is
chosen on some images looks better on them than it is, so the line can be measured on others too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import GRAY, SERIES, axes_or_new
from robustlayers.analysis._ground import Bench, Quality, finite_row, put_back
from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.data import Augment, Images, batch_count
from robustlayers.evaluation import Progress
from robustlayers.selection import Inventory, Selection, resolve
from robustlayers.training import OptimizerSettings, PhaseTrainer, Schedule, interpolate, snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Rift", "RiftPoint", "rift"]

ALPHAS = tuple(place / 20 for place in range(21))


@dataclass(frozen=True)
class RiftPoint:
    """Accuracies in [0, 1] and losses in nats at one alpha; `allowed` if robustness is within the tolerance there."""

    alpha: float
    allowed: bool
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float
    robust_loss: float


@dataclass(frozen=True)
class Rift:
    """A robust critical fine-tuning: what it reached along the line, and the weights that were chosen.

    How to read it: clean accuracy rises with alpha until the group is fully fine-tuned (1); alpha is as far along as the
    robust line stays level. An alpha of 0 means that no step was worth its price. Where some lines are dashed, they are the
    images that alpha was chosen on; the solid ones are others, which neither learned nor chose, and count.
    """

    group: str
    alpha: float
    tolerance: float
    points: tuple[RiftPoint, ...]  # on the images that alpha was chosen on
    state: dict[str, Tensor] = field(repr=False, compare=False)  # of the whole model at the chosen alpha
    measured: tuple[RiftPoint, ...] = ()  # on other images, the same alphas; `allowed` is that of the choice

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each alpha on each kind of images, and whether it is the chosen one."""
        found = []
        for kind, points in (("selection", self.points), ("measurement", self.measured)):
            found += [
                {"group": self.group, "on": kind, "chosen": point.alpha == self.alpha, **asdict(point)}
                for point in points
            ]
        return [finite_row(row) for row in found]

    @property
    def before(self) -> RiftPoint:
        """The model before the fine-tuning, on the images that neither learned nor chose where there are some."""
        return (self.measured or self.points)[0]

    @property
    def after(self) -> RiftPoint:
        """The model at the chosen alpha, on the same images as `before`."""
        return next(point for point in self.measured or self.points if point.alpha == self.alpha)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw what clean and robust accuracy win or lose with alpha, in points, and the chosen one."""
        axes = axes_or_new(axes, 5.0, 3.2)
        alphas = [point.alpha for point in self.points]
        axes.axhline(0, color=GRAY, linewidth=0.8)
        for kind, paint, mark in (("clean", SERIES[0], "o"), ("robust", SERIES[1], "s")):
            axes.plot(
                alphas, _won(self.measured or self.points, kind), color=paint, marker=mark, markersize=4, label=kind
            )
            if self.measured:
                dashed = {"color": paint, "linewidth": 1, "linestyle": (0, (4, 3))}
                axes.plot(alphas, _won(self.points, kind), label=f"{kind}, choosing", **dashed)
        axes.axvline(self.alpha, color=GRAY, linewidth=0.8)
        axes.set_xlabel(f"alpha: 0 before, 1 fine-tuned; chosen: {self.alpha:g}")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -1), max(high, 1))  # one image more or less is not to look like much
        axes.set_ylabel("accuracy won, points")
        axes.legend(frameon=False, fontsize="small")
        return axes


def rift(
    model: nn.Module,
    group: str,
    train: Images,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    epochs: int = 10,
    optimizer: OptimizerSettings | None = None,
    schedule: Schedule | None = None,
    train_batch_size: int = 128,
    augment: Augment | None = None,
    alphas: Sequence[float | str] = ALPHAS,
    tolerance: float | str = 0.001,
    measure_on: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rift:
    """Return the fine-tuned weights and all that was measured on the way; the model itself is left bit for bit as it was.

    `model.load_state_dict(result.state)` takes the result over.

    Args:
        model: adversarially trained.
        group: selector of what is fine-tuned, such as `robust_criticality(...).least.selector`. Running statistics in it
            stay frozen: a norm layer learns its scale and shift.
        train: images that it learns from, on the device of the model or not.
        x: images [n, c, h, w] of the validation split, on which alpha is chosen; y: integer labels [n].
        attack: measures robust accuracy at each alpha, anew.
        epochs: of fine-tuning.
        optimizer: None is the paper's: SGD with learning rate 0.001, momentum 0.9 and weight decay 5e-4.
        schedule: None is the paper's: a tenth of the rate from half of the epochs on.
        alphas: numbers from 0 on, ascending, up to 1; 0 is taken in any case.
        tolerance: the drop of robust accuracy that is allowed, in [0, 1]; the paper's is 0.1 points. On fewer than 1,000
            validation images 0.001 is less than one image, and so nothing.
        measure_on: other held-out images and their labels; the line is measured on them too, and nothing chosen.
        seed: of the order of images, their augmentation, and the attack's draws.
        progress: called with images done, training images and measured ones.

    Of alphas with the same clean accuracy, the one with the higher robust accuracy is chosen, then the smaller one.

    Raises `UserError` for a selector without parameters and values that are not allowed; `training.Diverged` where the
    fine-tuning does.
    """
    places = sorted({0.0, *(number(alpha, "alpha") for alpha in alphas)})
    if places[0] < 0 or places[-1] > 1:
        raise UserError(f"alphas: {places} is not allowed; allowed: numbers from 0 to 1")
    allowed = number(tolerance, "tolerance")
    if not 0 <= allowed <= 1:
        raise UserError(f"tolerance: {allowed:g} is not allowed; allowed: a drop of accuracy, from 0 to 1")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise UserError(f"epochs: {epochs!r} is not allowed; allowed: a whole number, 1 or more")
    inventory = Inventory(model)
    picked = resolve(inventory, group)
    selection = Selection(
        inventory, {name: mask for name, mask in picked.parts.items() if not inventory.entries[name].buffer}
    )
    if not selection:
        raise UserError(f"rift: selector {group!r} picks no parameters, only buffers")
    tuning = epochs * batch_count(len(train), train_batch_size) * train_batch_size
    looked = [(x, y), *([] if measure_on is None else [measure_on])]
    sizes = [Bench(*some, attack, batch_size=batch_size, changes=len(places)).total for some in looked]
    begins = [tuning, tuning + sizes[0]]
    total = tuning + sum(sizes)
    benches = [
        Bench(
            *some,
            attack,
            batch_size=batch_size,
            seed=seed,
            progress=_shifted(progress, begin, total),
            changes=len(places),
        )
        for some, begin in zip(looked, begins, strict=False)
    ]

    def trained(epoch: int, batches: int) -> None:
        if progress is not None:
            done = (epoch * batch_count(len(train), train_batch_size) + batches) * train_batch_size
            progress("fine-tuning", done, total)

    with put_back(model):
        trainer = PhaseTrainer(
            model,
            {"tuned": _selector(group, picked, selection), "frozen": "rest"},
            {"tuned": "natural", "frozen": "frozen"},
            train,
            epochs=epochs,
            batch_size=train_batch_size,
            optimizer=optimizer or OptimizerSettings(lr=0.001),
            schedule=schedule or Schedule("piecewise", milestones=(0.5,), factor=0.1),
            augment=augment,
            seed=seed,
            device=_device(model, x),
        )
        for epoch in range(epochs):
            trainer.train_epoch(lambda batches, _, epoch=epoch: trained(epoch, batches))
        trainer.verify()
        tuned = snapshot(model)
    qualities: list[dict[float, Quality]] = []
    for bench in benches:
        qualities.append({})
        for alpha in places:
            change = partial(_move, selection, tuned, alpha)
            (qualities[-1][alpha],) = bench.changed(model, f"alpha {alpha:g}", change).values()
    points = judged(qualities[0], allowed)
    chosen = choose(points)
    measured = tuple(
        RiftPoint(point.alpha, point.allowed, **asdict(quality))
        for other in qualities[1:]
        for point, quality in zip(points, other.values(), strict=True)
    )
    with put_back(model):
        _move(selection, tuned, chosen.alpha)
        state = snapshot(model)
    return Rift(group, chosen.alpha, allowed, points, state, measured)


def judged(qualities: Mapping[float, Quality], tolerance: float) -> tuple[RiftPoint, ...]:
    """Return a point for each alpha: allowed where robust accuracy is at most `tolerance` below that at the first."""
    robust = [quality.robust_accuracy or 0.0 for quality in qualities.values()]
    # A share of images is exact to a few times 1e-16 only, and a drop of just the tolerance is allowed.
    allowed = [one >= robust[0] - tolerance - 1e-12 for one in robust]
    return tuple(
        RiftPoint(alpha, fits, **asdict(quality))
        for (alpha, quality), fits in zip(qualities.items(), allowed, strict=True)
    )


def choose(points: Sequence[RiftPoint]) -> RiftPoint:
    """Return the allowed point of the best clean accuracy; of several that of the best robust one, then the first."""
    return max((p for p in points if p.allowed), key=lambda p: (p.clean_accuracy, p.robust_accuracy, -p.alpha))


def _won(points: Sequence[RiftPoint], kind: str) -> list[float]:
    """Return the accuracy of each point minus that of the first, in points."""
    values = [getattr(point, f"{kind}_accuracy") for point in points]
    return [100 * (value - values[0]) for value in values]


def _move(selection: Selection, tuned: dict[str, Tensor], alpha: float) -> None:
    interpolate(selection, tuned, alpha, "the fine-tuned model")


def _selector(group: str, picked: Selection, selection: Selection) -> str:
    """Return the selector of the parameters alone."""
    if picked == selection:
        return group
    names = " | ".join(f'"{name}"' for name in selection)
    return f"({group}) & ({names})"


def _device(model: nn.Module, x: Tensor) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), x.device)


def _shifted(progress: Progress | None, before: int, whole: int) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, _: progress(what, before + done, whole)
