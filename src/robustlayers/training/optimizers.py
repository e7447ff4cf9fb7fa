"""Optimizers from plain settings, and their state as named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of
from robustlayers.selection.inventory import is_norm
from robustlayers.selection.partition import Partition
from robustlayers.training.objectives import Signal

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "GroupSettings",
    "OptimizerSettings",
    "build_optimizer",
    "load_optimizer",
    "optimizer_tensors",
]

OPTIMIZERS = ("adam", "adamw", "sgd")
DECAYS = ("all", "weights")
"""What weight decay reaches: every parameter, or neither norm layers nor biases."""


@dataclass(frozen=True)
class GroupSettings:
    """What one group does otherwise than the rest; None is as the rest does."""

    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None

    def __str__(self) -> str:
        parts = [("lr", self.lr), ("momentum", self.momentum), ("weight decay", self.weight_decay)]
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer and its constants; `momentum` and `nesterov` are SGD's, `betas` Adam's.

    `decay` is one of `DECAYS`; `groups` are exceptions by the name of a group. A schedule scales every group's own rate.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    decay: str = "all"
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(one_of("optimizer", self.name, OPTIMIZERS))
        if self.decay not in DECAYS:
            raise UserError(one_of("decay", self.decay, DECAYS))
        for group, own in self.groups.items():
            if own.momentum is not None and self.name != "sgd":
                raise UserError(f"optimizer: group {group!r} has a momentum, which only sgd takes; it has betas")
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
        return "; ".join([text, *(f"{group}: {own}" for group, own in self.groups.items())])

    def of(self, group: str) -> GroupSettings:
        """Return the settings of a group, exceptions applied."""
        own = self.groups.get(group, GroupSettings())
        return GroupSettings(
            self.lr if own.lr is None else own.lr,
            self.momentum if own.momentum is None else own.momentum,
            self.weight_decay if own.weight_decay is None else own.weight_decay,
        )


def build_optimizer(
    partition: Partition, signals: Mapping[str, Signal], settings: OptimizerSettings
) -> torch.optim.Optimizer | None:
    """Return one optimizer with parameter groups for each trained group, or None if only buffers learn.

    The groups are fixed for the phase: frozen parameters are never in it, and none is ever taken out. A tensor that two
    trained groups divide stands in the first of them. Raises `UserError` for settings of a group that is not trained, and
    for a divided tensor whose groups have different settings.
    """
    trained = [group for group in partition.groups if signals[group]]
    for group in settings.groups:
        if group not in partition.groups:
            raise UserError(one_of("group", group, partition.groups))
        if group not in trained:
            raise UserError(f"group {group!r} is frozen: it has no optimizer settings")
    owner: dict[str, str] = {}
    groups = []
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
        for decays in (True, False):
            some = [name for name in names if (settings.decay == "all" or _is_weight(partition, name)) == decays]
            if some:
                tensors = [partition.inventory.entries[name].tensor for name in some]
                options = {"lr": own.lr, "weight_decay": own.weight_decay if decays else 0.0}
                if settings.name == "sgd":
                    options["momentum"] = own.momentum
                groups.append({"params": tensors, "names": some, "base_lr": own.lr, "group": group, **options})
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


def _is_weight(partition: Partition, name: str) -> bool:
    entry = partition.inventory.entries[name]
    return entry.attribute != "bias" and not any(is_norm(module) for module in entry.owners)


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return the optimizer's state as `{parameter name/slot: tensor}`; numbers become scalars of float64."""
    found: dict[str, Tensor] = {}
    if optimizer is None:
        return found
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    found[f"{name}/{slot}"] = tensor.detach().clone()
    return found


def load_optimizer(optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]) -> None:
    """Put a state from `optimizer_tensors` back, bit for bit."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slots = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
            optimizer.state.pop(parameter, None)
            if slots:
                optimizer.state[parameter] = {
                    slot: tensor.clone() if slot == "step" else tensor.to(parameter.device, copy=True)
                    for slot, tensor in slots.items()
                }
