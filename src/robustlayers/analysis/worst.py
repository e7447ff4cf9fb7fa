"""Worst-case criticality: how far the loss can rise when one group's weights move inside a small ball around themselves.

Module robust criticality (Zhu et al. 2023, RiFT, section 3.1, arXiv 2308.02533) of a group G of parameters:

    MRC(G) = max over |d|_2 <= eps |theta_G|_2 of R(theta + d) - R(theta),

R being the mean cross-entropy on a fixed set of adversarial images, crafted once against theta. With the clean images for
R it is the sharpness of a group, as sharpness-aware minimization means it, with a radius relative to the group's norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.analysis._axes import axes_or_new, dots
from robustlayers.analysis._ground import (
    Group,
    Groups,
    attacked,
    bind_groups,
    check_batch_size,
    finite_row,
    held,
    right_answers,
    slices,
)
from robustlayers.analysis.criticality import write_scores
from robustlayers.attacks import Attack
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.quantities import number
from robustlayers.evaluation import Progress
from robustlayers.training import Ascent, perturbation, perturbed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["WorstCase", "WorstCaseRow", "robust_criticality"]


@dataclass(frozen=True)
class WorstCaseRow:
    """The worst weights that were found in the ball around one group, on images that stay the same.

    `rise` is MRC in nats, `accuracy_drop` what the same perturbation costs, in [0, 1]; `norm` is |theta_G|_2 and `radius`
    eps times that, so a group of zeros has a rise of 0.
    """

    group: str
    selector: str
    names: tuple[str, ...]
    parameters: int
    norm: float
    radius: float
    distance: float  # |d|_2 of the worst point
    loss: float
    rise: float
    accuracy: float
    accuracy_drop: float


@dataclass(frozen=True)
class WorstCase:
    """The worst case of each group, in the order of the groups.

    How to read it: a group far to the right is critical, for a small change of its weights can break the answers; the
    group furthest to the left has the most room for other weights and is the one that RiFT fine-tunes.
    """

    eps: float
    steps: int
    attack: str  # in words; empty for clean images
    loss: float  # of the model as it is, on the same images
    accuracy: float
    results: tuple[WorstCaseRow, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each group; what is not finite is None."""
        return [finite_row(asdict(row)) for row in self.results]

    @property
    def least(self) -> WorstCaseRow:
        """The group with the smallest rise, the first of several."""
        return min(self.results, key=lambda row: row.rise)

    @property
    def most(self) -> WorstCaseRow:
        """The group with the largest rise, the first of several."""
        return max(self.results, key=lambda row: row.rise)

    def to_scores(self, path: Path | str) -> Path:
        """Write the rises as `name,score` for the selectors `top` and `bottom`; see `write_scores` for the names."""
        return write_scores(path, [(row.group, row.names, row.rise) for row in self.results])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the rise of each group in nats, on a scale that is logarithmic above 0.01: to the right is more critical."""
        axes = axes_or_new(axes, 5.0, 1.4 + 0.24 * len(self.results))
        images = "adversarial" if self.attack else "clean"
        label = f"rise of the loss on {images} images, nats,\nwithin {100 * self.eps:g} % of the group's norm"
        dots(axes, [row.group for row in self.results], {"rise": [row.rise for row in self.results]}, label)
        axes.set_xscale("symlog", linthresh=0.01)
        finite = [row.rise for row in self.results if math.isfinite(row.rise)]
        axes.set_xlim(-0.002, 1.6 * max([0.01, *finite]))
        return axes


def robust_criticality(
    model: nn.Module,
    groups: Groups,
    x: Tensor,
    y: Tensor,
    attack: Attack | None,
    *,
    eps: float | str = 0.1,
    steps: int = 10,
    step_size: float | str | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> WorstCase:
    """Return for each group the largest rise of the loss that projected gradient ascent on its weights finds.

    From d = 0, with r = eps |theta_G|_2 and g the gradient of R over all images at theta + d,

        d <- P_r(d + step_size r g / |g|_2),   P_r(d) = d min(1, r / |d|_2),

    `steps` times; the best of all iterates counts, so no rise is negative. This is a lower bound of the maximum. The paper
    takes stochastic steps of a learning rate instead, which mean another distance in every layer.

    Args:
        model: maps images to logits; differentiated in evaluation mode, by running statistics, and left as it was.
        groups: `{name: selector}`, or a selector that is taken apart by module, such as `conv | linear | norm`. Buffers
            in a group are not perturbed; a norm layer's scale and shift are, like any weight.
        x: images [n, c, h, w], uint8 or float in [0, 1], of a held-out split: the published code takes the test set,
            which then has chosen what it is to judge.
        y: integer labels [n].
        attack: crafts the fixed set, once, against the model as it is: `PGD(threat, steps=10)` in the paper. None takes
            the clean images, and the rise is a natural criticality.
        eps: radius relative to the norm of the group's parameters, which are all taken together.
        step_size: relative to the radius; None means 2.5 / steps, which reaches the boundary and moves along it.
        seed: of the attack's draws.

    Cost: the attack, and `steps` + 1 forwards and `steps` backwards of all images for each group.

    Raises `UserError` for wrong selectors, a group without parameters, and values that are not allowed.
    """
    check_batch_size(batch_size)
    eps = number(eps, "eps")
    if eps <= 0:
        raise UserError(f"eps: {eps:g} is not allowed; allowed: more than 0, as a share of the group's norm")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps: {steps!r} is not allowed; allowed: a whole number, 1 or more")
    length = 2.5 / steps if step_size is None else number(step_size, "step_size")
    if length <= 0:
        raise UserError(f"step_size: {length:g} is not allowed; allowed: more than 0, as a share of the radius")
    named = bind_groups(model, groups, x[:2])
    faults = [
        Fault("has no parameters to perturb", path=name) for name, g in named.items() if not g.selection.parameters
    ]
    if faults:
        raise UserError(faults)
    crafting = len(x) if attack is not None else 0
    total = crafting + len(x) * (1 + (steps + 1) * len(named))
    done = 0

    def report(what: str, images: int) -> None:
        if progress is not None:
            progress(what, done + images, total)

    x, y = attacked(
        model, x, y, attack, batch_size=batch_size, seed=seed, report=lambda images: report("crafting", images)
    )
    done += crafting
    with held(model, x.device):
        loss, right, _ = _evaluate(model, x, y, {}, batch_size)
        report("as it is", len(x))
        done += len(x)
        results = []
        for group in named.values():

            def passed(iterate: int, name: str = group.name) -> None:
                report(name, iterate * len(x))

            results.append(_worst(model, group, x, y, (loss, right), eps, steps, length, batch_size, passed))
            done += (steps + 1) * len(x)
    text = "" if attack is None else getattr(attack, "describe", lambda: type(attack).__name__)()
    return WorstCase(eps, steps, text, loss, right / len(x), tuple(results))


def _worst(
    model: nn.Module,
    group: Group,
    x: Tensor,
    y: Tensor,
    start: tuple[float, int],
    eps: float,
    steps: int,
    length: float,
    batch_size: int,
    passed: Callable[[int], None],
) -> WorstCaseRow:
    entries = group.selection.inventory.entries
    tensors = {name: entries[name].tensor for name in group.selection if not entries[name].buffer}
    masks = {name: _on(group.selection.parts[name], tensor) for name, tensor in tensors.items()}
    norm = _norm({name: _inside(tensor.detach(), masks[name]) for name, tensor in tensors.items()})
    radius = eps * norm
    # The rule of a relative ascent with one norm over all is the very step that is wanted.
    rule = Ascent("awp", size=eps * length, scaling="global", vectors=True)
    d = {name: torch.zeros_like(tensor, dtype=_wide(tensor)) for name, tensor in tensors.items()}
    best = (*start, 0.0)  # loss, right answers, distance
    for iterate in range(steps + 1):
        with perturbed(tensors, d):
            wanted = tensors if iterate < steps else {}
            loss, right, gradients = _evaluate(model, x, y, wanted, batch_size)
        passed(iterate + 1)
        if iterate and not loss <= best[0]:  # a loss that is not finite is worse than all others
            best = (loss, right, _norm(d))
        if not math.isfinite(loss) or iterate == steps:
            break
        with torch.no_grad():
            for name, move in perturbation(rule, tensors, gradients, masks).items():
                d[name] += move
            reach = _norm(d)
            if reach > radius:
                d = {name: delta * (radius / reach) for name, delta in d.items()}
    return WorstCaseRow(
        group=group.name,
        selector=group.selector,
        names=group.names,
        parameters=group.selection.parameters,
        norm=norm,
        radius=radius,
        distance=best[2],
        loss=best[0],
        rise=best[0] - start[0],
        accuracy=best[1] / len(x),
        accuracy_drop=(start[1] - best[1]) / len(x),
    )


def _evaluate(
    model: nn.Module, x: Tensor, y: Tensor, wanted: Mapping[str, Tensor], batch_size: int
) -> tuple[float, int, dict[str, Tensor]]:
    """Return the mean loss over all images, how many answers are right, and the gradient of `wanted` by name."""
    total, right = 0.0, 0
    gradients = {name: torch.zeros_like(tensor, dtype=_wide(tensor)) for name, tensor in wanted.items()}
    for tensor in wanted.values():
        tensor.requires_grad_(True)
    try:
        for part in slices(len(x), batch_size):
            with torch.set_grad_enabled(bool(wanted)):
                logits = model(x[part])
                loss = functional.cross_entropy(logits.double(), y[part], reduction="sum")
            if loss.requires_grad:  # a group that the forward does not use has no gradient
                found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                for name, gradient in zip(wanted, found, strict=True):
                    if gradient is not None:
                        gradients[name] += gradient / len(x)
            total += loss.item()
            right += right_answers(logits.detach(), y[part])
    finally:
        for tensor in wanted.values():
            tensor.requires_grad_(False)
    return total / len(x), right, gradients


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _on(mask: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(tensor.device)


def _inside(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else torch.where(mask, tensor, 0)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all entries together."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))
