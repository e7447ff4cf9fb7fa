"""Optimizers from plain settings, and their state as named tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of
from robustlayers.selection.partition import Partition
from robustlayers.training.objectives import Signal

__all__ = ["OPTIMIZERS", "OptimizerSettings", "build_optimizer", "load_optimizer", "optimizer_tensors"]

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer and its constants; `momentum` and `nesterov` are SGD's, `betas` Adam's."""

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(one_of("optimizer", self.name, OPTIMIZERS))
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
        return f"{self.name}, lr {self.lr:g}, {extra}, weight decay {self.weight_decay:g}"


def build_optimizer(
    partition: Partition, signals: Mapping[str, Signal], settings: OptimizerSettings
) -> torch.optim.Optimizer | None:
    """Return one optimizer with a parameter group per trained group, or None if only buffers learn.

    The groups are fixed for the phase: frozen parameters are never in it, and none is ever taken out. A tensor that two
    trained groups divide stands in the first of them.
    """
    seen: set[str] = set()
    groups = []
    for group, selection in partition.groups.items():
        if not signals[group]:
            continue
        names = [name for name in selection if not partition.inventory.entries[name].buffer and name not in seen]
        seen.update(names)
        if names:
            tensors = [partition.inventory.entries[name].tensor for name in names]
            groups.append({"params": tensors, "names": names, "base_lr": settings.lr, "group": group})
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
