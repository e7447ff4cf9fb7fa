"""Ascent: perturbing weights toward a higher loss before the gradient of a step is taken, on any selector.

A step takes its gradient at the perturbed weights w + v and applies it to w. With G the gradient of the loss to be raised
(summed over the steps of an ascent that has several), and norms over the selected entries only:

| ascent | v | source |
|---|---|---|
| `awp` | size * norm(w_t) * G_t / norm(G_t) for each tensor t; `scaling: global`: one norm over all | Wu et al. 2020 |
| `rwp` | size * norm(w) * G / norm(G) over all; `scaling: tensor`: each for itself; 10 steps, loss-limited | Yu et al. 2022 |
| `sam` | size * G / norm(G); with `select: norm` it is SAM-ON (Mueller et al. 2023) | Foret et al. 2021 |
| `asam` | size * T^2 G / norm(T G), T = abs(w) + eta for each entry, 1 for biases | Kwon et al. 2021 |

The rules themselves, and their registry, are in `ascent_rules.py`. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.selectors import resolve
from robustlayers.training.ascent_rules import ASCENTS, SCALINGS, Method

__all__ = [
    "Ascent",
    "bind",
    "climb",
    "parse_ascent",
    "perturbation",
    "perturbed",
    "stationary",
]

Tensors = Mapping[str, Tensor]
Masks = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Ascent:
    """Settings of an ascent; None stands for the method's own default (below: of `awp`, `rwp`, `sam`, `asam`).

    | setting | what it is | default |
    |---|---|---|
    | `name` | the method: one of `ASCENTS` | |
    | `select` | selector of what is perturbed; buffers in it are ignored | `all` |
    | `size` | gamma (`awp`, `rwp`): share of the norm of the weights; rho (`sam`, `asam`): length | .01, .01, .05, .5 |
    | `scaling` | `awp`, `rwp`: norms per `tensor`, or one `global` norm | `tensor`, `global` |
    | `vectors` | whether tensors with fewer than two dimensions are perturbed: norm layers, biases | no, no, yes, yes |
    | `steps` | gradients, each taken at the weights as perturbed so far | 10 for `rwp`, else 1 |
    | `limit` | only samples whose cross-entropy in nats is below it raise the loss | 1.7 for `rwp`, else none |
    | `eta` | `asam`: added to the size of each weight | .01 |
    | `adaptive_bias` | `asam`: whether biases are scaled by their size too | no |
    | `warmup` | share of the phase, in [0, 1), before the first ascent | 0 |

    As published, `awp` and `rwp` leave vectors out without a word, batch norm's scales and shifts among them.

    Raises `UserError` for values that are not allowed, and for settings that the method does not take.

    >>> print(Ascent("awp").describe())
    awp on all, gamma 0.01 for each tensor, no vectors
    >>> print(Ascent("sam", select="norm", size=0.5, warmup=0.1).describe())
    sam on norm, rho 0.5, from 10 % of the phase on
    """

    name: str
    select: str = "all"
    size: float | str | None = None
    scaling: str | None = None
    vectors: bool | None = None
    steps: int | None = None
    limit: float | str | None = None
    eta: float | str | None = None
    adaptive_bias: bool | None = None
    warmup: float | str = 0.0

    def __post_init__(self) -> None:
        if self.name not in ASCENTS:
            raise UserError(one_of("ascent", str(self.name), ASCENTS))
        if not isinstance(self.select, str):
            raise UserError(f"ascent: select: {self.select!r} is not a selector; write all, norm or stage(1)")
        for option in ("scaling", "eta", "adaptive_bias"):
            if getattr(self, option) is not None and option not in self.method.options:
                takers = [name for name, method in ASCENTS.items() if option in method.options]
                raise UserError(f"ascent: {option}: {self.name} does not take it; only {', '.join(takers)}")
        for option in ("size", "limit", "eta", "warmup"):
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, number(value, f"ascent: {option}"))
        for option in ("size", "limit"):
            if getattr(self, option) is not None and getattr(self, option) <= 0:
                raise UserError(f"ascent: {option}: {getattr(self, option):g} is not allowed; allowed: more than 0")
        if isinstance(self.eta, float) and self.eta < 0:
            raise UserError(f"ascent: eta: {self.eta:g} is not allowed; allowed: 0 or more")
        if not 0 <= float(self.warmup) < 1:
            raise UserError(
                f"ascent: warmup: {self.warmup:g} is not allowed; allowed: a share of the phase, 0 to below 1"
            )
        if self.scaling is not None and self.scaling not in SCALINGS:
            raise UserError(one_of("scaling of an ascent", str(self.scaling), SCALINGS))
        for option in ("vectors", "adaptive_bias"):
            value = getattr(self, option)
            if value is not None and not isinstance(value, bool):
                raise UserError(f"ascent: {option}: {value!r} is not allowed; allowed: true, false")
        if self.steps is not None and (
            isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1
        ):
            raise UserError(f"ascent: steps: {self.steps!r} is not allowed; allowed: a whole number, 1 or more")

    @property
    def method(self) -> Method:
        """The rule and its defaults."""
        return ASCENTS[self.name]

    def resolved(self) -> Ascent:
        """Return the same ascent with every default filled in; what the method does not take stays None.

        >>> Ascent("rwp").resolved() == Ascent("rwp", size=0.01, scaling="global", vectors=False, steps=10, limit=1.7)
        True
        """
        common = {name: getattr(self.method, name) for name in ("size", "vectors", "steps", "limit")}
        defaults = {**common, **self.method.options}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def active(self, step: int, steps: int) -> bool:
        """Tell whether the warm-up is over at step `step` (from 0) of a phase of `steps`.

        >>> [Ascent("awp", warmup=0.5).active(step, 4) for step in range(4)]
        [False, False, True, True]
        """
        return step / steps >= float(self.warmup)

    @property
    def passes_per_step(self) -> tuple[int, int]:
        """(forward, backward) passes of a batch beyond those of a step without ascent, for each pass that it ascends."""
        steps = self.steps or self.method.steps
        return steps, steps

    def describe(self) -> str:
        """Return one line with everything that decides the perturbation."""
        own = self.resolved()
        size = f"{self.method.symbol} {own.size:g}"
        if own.scaling is not None:
            size += {"tensor": " for each tensor", "global": " over all tensors"}[own.scaling]
        parts = [f"{self.name} on {self.select}", size]
        if own.eta is not None:
            parts.append(f"eta {own.eta:g}")
        if own.adaptive_bias is not None:
            parts.append("biases by their size too" if own.adaptive_bias else "biases as they are")
        if own.steps != 1:
            parts.append(f"{own.steps} steps")
        if own.limit is not None:
            parts.append(f"losses below {own.limit:g}")
        if not own.vectors:
            parts.append("no vectors")
        if self.warmup:
            parts.append(f"from {100 * float(self.warmup):g} % of the phase on")
        return ", ".join(parts)


def parse_ascent(value: str | Mapping[str, Any] | Ascent) -> Ascent:
    """Return an ascent from a method's name, or from a mapping such as `{name: awp, select: norm, vectors: true}`.

    Raises `UserError` for unknown names and settings, with the nearest ones.

    >>> parse_ascent({"name": "sam", "size": 0.1}).size
    0.1
    """
    if isinstance(value, Ascent):
        return value
    if isinstance(value, str):
        return Ascent(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise UserError(f"an ascent is one of {', '.join(ASCENTS)}, or a mapping with such a name; got {value!r}")
    allowed = [entry.name for entry in fields(Ascent)]
    for key in value:
        if key not in allowed:
            raise UserError(one_of("setting of an ascent", str(key), allowed))
    return Ascent(**value)


def bind(ascent: Ascent, inventory: Inventory) -> dict[str, Tensor | None]:
    """Return what an ascent perturbs in a model: parameter name -> None for the whole tensor, else a bool mask of it.

    Masks are on the device of their tensor. Raises `UserError` where nothing is left, and says why.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> list(bind(Ascent("awp"), Inventory(net))), list(bind(Ascent("sam"), Inventory(net)))
    (['0.weight'], ['0.weight', '0.bias', '1.weight', '1.bias'])
    """
    selection = resolve(inventory, ascent.select)
    parameters = [name for name in selection if not inventory.entries[name].buffer]
    if not parameters:
        raise UserError(f"ascent {ascent.name}: selector {ascent.select!r} picks no parameters, only buffers")
    vectors = ascent.resolved().vectors
    kept = [name for name in parameters if vectors or inventory.entries[name].tensor.dim() > 1]
    if not kept:
        leaves = f"{ascent.name} leaves out" if ascent.vectors is None else "vectors: false leaves out"
        raise UserError(
            f"ascent {ascent.name}: {leaves} tensors with fewer than two dimensions, such as norm scales and shifts and "
            f"biases, and selector {ascent.select!r} picks no others; set vectors: true"
        )
    return {name: _on_device(selection.parts[name], inventory.entries[name].tensor) for name in kept}


def _on_device(mask: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(tensor.device)


@torch.no_grad()
def perturbation(
    ascent: Ascent, weights: Tensors, gradients: Tensors, masks: Masks, sofar: Tensors | None = None
) -> dict[str, Tensor]:
    """Return the perturbation v by tensor name, to be added to the unperturbed `weights`; it is 0 outside the masks.

    `gradients` are those of the loss to be raised, at w + v of the step before; `sofar` is the sum of the gradients of the
    earlier steps, None at the first. With G_k = g_1 + ... + g_k, step k returns the method's rule for G_k: v is scaled anew
    in each step, from the sum of the gradients as they are. For `rwp` that is the released algorithm (Yu et al. 2022),

        g_i = gradient at w + v_(i-1) of (1/n) sum_j [l_j < limit] l_j,    v_k = gamma * norm(w) / norm(G_k) * G_k,

    w being the unperturbed weights throughout, and both norms over all entries that are perturbed.

    `masks` is the result of `bind`. A tensor without a gradient is not perturbed, as if its gradient were 0; the norm of
    all weights counts it. A gradient of 0 gives a perturbation of 0, never NaN.

    >>> found = perturbation(Ascent("sam", size=1), {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}, {"w": None})
    >>> found["w"].tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    own = ascent.resolved()
    total = gradients if sofar is None else _summed(sofar, gradients)
    inside = {name: _inside(weights[name], mask) for name, mask in masks.items()}
    slopes = {name: _inside(total[name], mask) for name, mask in masks.items() if name in total}
    options = {name: getattr(own, name) for name in own.method.options}
    return own.method.perturb(inside, slopes, size=own.size, **options)


def climb(ascent: Ascent, tensors: Tensors, masks: Masks, gradients: Callable[[], Tensors]) -> dict[str, Tensor]:
    """Take all steps of an ascent from the present values of `tensors` and return the perturbation; they end as they were.

    `gradients()` is called `steps` times, each time with the tensors as perturbed so far, and returns by tensor name the
    gradients of the loss to be raised, which counts only `stationary` samples where the ascent has a limit. There may be
    more tensors and gradients than are perturbed.

    >>> w = torch.tensor([1.0], dtype=torch.float64)
    >>> climb(Ascent("sam", size=0.5, steps=2), {"w": w}, {"w": None}, lambda: {"w": 2 * w})["w"].item(), w.item()
    (0.5, 1.0)
    """
    v: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for _ in range(ascent.steps or ascent.method.steps):
        with perturbed(tensors, v):
            found = gradients()
        total = _summed(total, found)
        v = perturbation(ascent, tensors, total, masks)
    return v


@contextmanager
def perturbed(tensors: Tensors, v: Tensors) -> Iterator[None]:
    """Add `v` to the tensors of the same names in place, and put them back bit for bit on exit, also after an exception.

    They are put back from copies: subtracting `v` again, as published code does, leaves a rounding error in every step.
    A backward pass must end inside, since the values it needs are gone afterwards.

    >>> w = torch.tensor([0.5])
    >>> with perturbed({"w": w}, {"w": torch.tensor([1e9])}):
    ...     print(w.item())
    1000000000.0
    >>> w.item()
    0.5
    """
    copies = {name: tensors[name].detach().clone() for name in v}
    try:
        with torch.no_grad():
            for name, delta in v.items():
                tensors[name].add_(delta)
        yield
    finally:
        with torch.no_grad():
            for name, copy in copies.items():
                tensors[name].copy_(copy)


@torch.no_grad()
def stationary(logits: Tensor, y: Tensor, limit: float) -> Tensor:
    """Return which samples have a cross-entropy below `limit` in nats: logits [n, classes], y [n] -> bool [n].

    The loss stationary condition (Yu et al. 2022): only these samples count in the loss of the ascent, the mean of which
    is over the whole batch, as if the loss of the others were constant: `(cross_entropy * mask).mean()`.

    >>> stationary(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), 1.7)
    tensor([ True, False])
    """
    return functional.cross_entropy(logits, y, reduction="none") < limit


def _inside(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tensor with zeros outside the mask, in single precision at least, where `_TINY` is not zero."""
    tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor if mask is None else torch.where(mask, tensor, 0)


@torch.no_grad()
def _summed(one: Tensors, two: Tensors) -> dict[str, Tensor]:
    """Return new tensors, since the caller may use those of its gradients again."""
    return {
        name: one[name] + two[name] if name in one and name in two else (one if name in one else two)[name].clone()
        for name in {**one, **two}
    }
