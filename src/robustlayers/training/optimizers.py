"""Optimizers from plain settings, and their state as named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of
from robustlayers.selection.inventory import is_norm
from robustlayers.selection.partition import Partition
from robustlayers.training.objectives import Signal
from robustlayers.training.schedules import Schedule

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "RATES",
    "GroupSettings",
    "OptimizerSettings",
    "build_optimizer",
    "load_optimizer",
    "optimizer_tensors",
    "owners",
]

OPTIMIZERS = ("adam", "adamw", "sgd")
DECAYS = ("all", "weights")
"""What weight decay reaches: every parameter, or neither norm layers nor biases."""
RATES = ("fixed", "rgn")
"""Rates of the layers of a group: all the same, or by relative gradient norm (`training.rates`)."""

_POSITIVE = ("a number of more than 0", lambda value: value > 0)
_COUNT = ("a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1)
_ALLOWED = {
    "lr": _POSITIVE,
    "scale": _POSITIVE,
    "momentum": ("a number from 0 to less than 1", lambda value: 0 <= value < 1),
    "weight_decay": ("a number of at least 0", lambda value: value >= 0),
    "clip": _POSITIVE,
    "every": _COUNT,
    "rates_batches": _COUNT,
}


@dataclass(frozen=True)
class GroupSettings:
    """What one group does otherwise than the rest; None is as the rest does.

    Args:
        lr: the group's own base rate.
        momentum: of SGD.
        weight_decay: the group's own.
        scale: in the place of `lr`, a multiple of the phase's rate.
        nesterov: of SGD; left out, as the phase says wherever the group has a momentum.
        clip: bound on the L2 norm of this group's gradient alone.
        every: update on every k-th step only (`training.multirate`); 1 unless given.
        drift: spread each update evenly over those k steps.
        schedule: the group's own, over the same steps.

    Raises `UserError` for a number out of its range, for `lr` together with `scale`, and for `drift` without an `every`
    of more than 1.
    """

    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    scale: float | None = None
    nesterov: bool | None = None
    clip: float | None = None
    every: int | None = None
    drift: bool | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        _check(self, "optimizer of a group")
        if self.lr is not None and self.scale is not None:
            raise UserError(
                f"optimizer of a group: lr {self.lr:g} and scale {self.scale:g} exclude each other; give one of them"
            )
        if self.drift and (self.every or 1) == 1:
            raise UserError(
                "optimizer of a group: drift needs an every of more than 1, the steps to spread an update over"
            )

    def __str__(self) -> str:
        every = "step" if self.every == 1 else f"{self.every} steps"
        parts = [
            (self.lr, f"lr {_text(self.lr)}"),
            (self.scale, f"lr x {_text(self.scale)}"),
            (self.momentum, f"momentum {_text(self.momentum)}"),
            (self.nesterov, "Nesterov" if self.nesterov else "no Nesterov"),
            (self.weight_decay, f"weight decay {_text(self.weight_decay)}"),
            (self.schedule, f"schedule {self.schedule}"),
            (self.clip, f"gradient norm at most {_text(self.clip)}"),
            (self.every, f"updated every {every}{' with linear drift' if self.drift else ''}"),
        ]
        return ", ".join(text for value, text in parts if value is not None)


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer and its constants; `momentum` and `nesterov` are SGD's, `betas` Adam's.

    `decay` is one of `DECAYS`; `groups` are exceptions by the name of a group. A schedule scales every group's own rate.
    `clip` bounds the L2 norm of the gradient of all groups without a clip of their own, taken together. With `rates`
    "rgn" each module has a rate of its own, measured on `rates_batches` batches.

    >>> print(OptimizerSettings(lr=0.1, groups={"norm": GroupSettings(scale=0.1, every=4, drift=True)}))
    sgd, lr 0.1, momentum 0.9, weight decay 0.0005; norm: lr x 0.1, updated every 4 steps with linear drift
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    decay: str = "all"
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)
    clip: float | None = None
    rates: str = "fixed"
    rates_batches: int = 5

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(one_of("optimizer", self.name, OPTIMIZERS))
        if self.decay not in DECAYS:
            raise UserError(one_of("decay", self.decay, DECAYS))
        if self.rates not in RATES:
            raise UserError(one_of("rates", self.rates, RATES))
        _check(self, "optimizer")
        for group, own in self.groups.items():
            if self.name != "sgd":
                for what, value in (("momentum", own.momentum), ("nesterov", own.nesterov)):
                    if value is not None:
                        raise UserError(f"optimizer: group {group!r} has a {what}, which only sgd takes; it has betas")
            elif own.nesterov and not self.of(group).momentum:
                raise UserError(f"optimizer: nesterov of group {group!r} needs a momentum above 0")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise UserError("optimizer: nesterov needs a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer: betas {list(self.betas)}; allowed: two numbers from 0 to less than 1")

    def __str__(self) -> str:
        extra = (
            f"momentum {self.momentum:g}{', Nesterov' if self.nesterov else ''}"
            if self.name == "sgd"
            else f"betas {self.betas[0]:g}, {self.betas[1]:g}"
        )
        text = f"{self.name}, lr {self.lr:g}, {extra}, weight decay {self.weight_decay:g}"
        if self.decay == "weights":
            text += " (none on norm layers and biases)"
        if self.clip is not None:
            text += f", gradient norm at most {self.clip:g}"
        if self.rates == "rgn":
            batches = "1 batch" if self.rates_batches == 1 else f"{self.rates_batches} batches"
            text += f", layer rates by relative gradient norm of {batches}"
        return "; ".join([text, *(f"{group}: {own}" for group, own in self.groups.items())])

    def of(self, group: str) -> GroupSettings:
        """Return the settings of a group, exceptions applied: `lr` is absolute, `scale` None.

        `clip` and `schedule` stay None where the group has none of its own.

        >>> OptimizerSettings(lr=0.5, groups={"norm": GroupSettings(scale=0.1)}).of("norm").lr
        0.05
        """
        own = self.groups.get(group, GroupSettings())
        momentum = self.momentum if own.momentum is None else own.momentum
        nesterov = self.nesterov and self.name == "sgd" and momentum > 0
        return GroupSettings(
            lr=self.lr * (1.0 if own.scale is None else own.scale) if own.lr is None else own.lr,
            momentum=momentum,
            weight_decay=self.weight_decay if own.weight_decay is None else own.weight_decay,
            nesterov=nesterov if own.nesterov is None else own.nesterov,
            clip=own.clip,
            every=own.every or 1,
            drift=bool(own.drift),
            schedule=own.schedule,
        )


def _check(settings: GroupSettings | OptimizerSettings, where: str) -> None:
    for name, (allowed, fits) in _ALLOWED.items():
        value = getattr(settings, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
            raise UserError(f"{where}: {name.replace('_', ' ')} {value}; allowed: {allowed}")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def build_optimizer(
    partition: Partition, signals: Mapping[str, Signal], settings: OptimizerSettings
) -> torch.optim.Optimizer | None:
    """Return one optimizer with parameter groups for each trained group, or None if only buffers learn.

    The groups are fixed for the phase: frozen parameters are never in it, and none is ever taken out. A tensor that two
    trained groups divide stands in the first of them. A group of the partition has one parameter group, two where weight
    decay spares some of its tensors, and with layer rates so many for each module. Beside torch's own keys each has
    `names`, `base_lr`, `group` and `schedule` (None: the phase's), and with layer rates `module` and `rate`.

    Raises `UserError` for settings of a group that is not trained, and for a divided tensor whose groups have different
    settings.
    """
    trained = [group for group in partition.groups if signals[group]]
    for group in settings.groups:
        if group not in partition.groups:
            raise UserError(one_of("group", group, partition.groups))
        if group not in trained:
            raise UserError(f"group {group!r} is frozen: it has no optimizer settings")
    owner: dict[str, str] = {}
    groups: list[dict[str, Any]] = []
    for group in trained:
        own = settings.of(group)
        names = []
        for name in partition[group]:
            if partition.inventory.entries[name].buffer:
                continue
            if name not in owner:
                owner[name] = group
                names.append(name)
            elif settings.of(owner[name]) != own:
                raise UserError(
                    f"{name} is divided between {owner[name]!r} and {group!r}: their settings must be equal"
                )
        for (decays, module), some in _parameter_groups(partition, names, settings).items():
            options: dict[str, Any] = {"lr": own.lr, "weight_decay": own.weight_decay if decays else 0.0}
            if settings.name == "sgd":
                options |= {"momentum": own.momentum, "nesterov": own.nesterov}
            if settings.rates == "rgn":
                options |= {"module": module, "rate": 1.0}
            tensors = [partition.inventory.entries[name].tensor for name in some]
            groups.append(
                {
                    "params": tensors,
                    "names": some,
                    "base_lr": own.lr,
                    "group": group,
                    "schedule": own.schedule,
                    **options,
                }
            )
    if not groups:
        return None
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def owners(optimizer: torch.optim.Optimizer | None) -> dict[str, str]:
    """Return {name of a tensor: the group whose settings it has} of an optimizer from `build_optimizer`."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {name: group["group"] for group in groups for name in group["names"]}


def _parameter_groups(
    partition: Partition, names: list[str], settings: OptimizerSettings
) -> dict[tuple[bool, str], list[str]]:
    """Divide a group's parameters by (whether weight decay reaches them, module), those it reaches first."""
    found: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        decays = settings.decay == "all" or _is_weight(partition, name)
        module = partition.inventory.entries[name].module_name if settings.rates == "rgn" else ""
        found.setdefault((decays, module), []).append(name)
    return dict(sorted(found.items(), key=lambda item: not item[0][0]))


def _is_weight(partition: Partition, name: str) -> bool:
    entry = partition.inventory.entries[name]
    # Gains of normalizer-free nets are as the scales of norm layers; those of Fixup are vectors.
    scales = entry.attribute in ("bias", "gain") or entry.tensor.dim() < 2
    return not scales and not any(is_norm(module) for module in entry.owners)


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return the optimizer's state as `{parameter name/slot: tensor}`; numbers become scalars of float64.

    A parameter group with a layer rate has it as the slot `rate` of its first parameter.
    """
    found: dict[str, Tensor] = {}
    if optimizer is None:
        return found
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    found[f"{name}/{slot}"] = tensor.detach().clone()
        if "rate" in group:
            found[f"{group['names'][0]}/rate"] = torch.tensor(group["rate"], dtype=torch.float64)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]) -> None:
    """Put a state from `optimizer_tensors` back, bit for bit; layer rates that it lacks are 1, as at the start."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        if "rate" in group:
            rate = tensors.get(f"{group['names'][0]}/rate")
            group["rate"] = 1.0 if rate is None else float(rate)
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slots = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
            slots.pop("rate", None)
            optimizer.state.pop(parameter, None)
            if slots:
                optimizer.state[parameter] = {
                    slot: tensor.clone() if slot == "step" else tensor.to(parameter.device, copy=True)
                    for slot, tensor in slots.items()
                }
