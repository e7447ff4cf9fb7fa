"""The update of a step: rates by the schedule, gradients clipped, groups moved when they are due, and what that amounted to."""

# torch has its operations on lists of tensors under private names only
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from robustlayers.selection.partition import Partition
from robustlayers.training.clipping import clip_gradients
from robustlayers.training.multirate import Multirate
from robustlayers.training.multirate import due as due_groups
from robustlayers.training.objectives import Signal
from robustlayers.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
    owners,
)
from robustlayers.training.schedules import Schedule
from robustlayers.training.state import joined, part

__all__ = ["Update"]


class Update:
    """Stands where a step expects its optimizer: `param_groups` and `step()`.

    It also measures each group's effective learning rate, the mean over its updates of

        |lr * g|_2 / |theta|_2,

    with the gradient g as the optimizer gets it (before momentum and weight decay), over the group's own entries.
    """

    def __init__(
        self,
        partition: Partition,
        signals: Mapping[str, Signal],
        settings: OptimizerSettings,
        schedule: Schedule,
        steps: int,
    ) -> None:
        self.settings, self.schedule, self.steps = settings, schedule, steps
        self.optimizer = build_optimizer(partition, signals, settings)
        self.param_groups: list[dict[str, Any]] = [] if self.optimizer is None else self.optimizer.param_groups
        self.groups = trained = [group for group, signal in signals.items() if signal]
        self.multirate = None if self.optimizer is None else Multirate(self.optimizer, settings, trained)
        self.slow = any((own.every or 1) > 1 for own in settings.groups.values())
        self.index = 0
        self._owners = owners(self.optimizer)
        self._holders = {name: [group for group in trained if name in partition[group]] for name in self._owners}
        self._still: frozenset[str] = frozenset()
        self._clips = settings.clip is not None or any(own.clip is not None for own in settings.groups.values())
        self._parts = _parts(partition, self.param_groups, trained)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def due(self, step: int) -> frozenset[str]:
        """Return the groups that step `step` moves."""
        return due_groups(self.settings, step, self.groups)

    def begin(self, step: int, learning: Collection[str] | None = None) -> None:
        """Set the rates of step `step`, from 0, in which the groups `learning` learn; None: all of them."""
        self.index = step
        self._still = frozenset(
            name
            for name, groups in self._holders.items()
            if learning is not None and not any(group in learning for group in groups)
        )
        if self.optimizer is not None:
            self.schedule.apply(self.optimizer, step, self.steps)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters by their `grad`."""
        if self.multirate is None:
            return
        parameters = {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.grad is not None
        }
        if self._clips and parameters:
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            for name, gradient in clip_gradients(gradients, self._owners, self.settings).items():
                parameters[name].grad = gradient
        self._measure()
        self.multirate.step(self.index, self._still)

    def _measure(self) -> None:
        for group, parts in self._parts.items():
            gradients: list[Tensor] = []
            weights: list[Tensor] = []
            rates: list[float] = []
            for parameter, mask, options in parts:
                if parameter.grad is not None:
                    gradients.append(parameter.grad if mask is None else parameter.grad * mask)
                    weights.append(parameter if mask is None else parameter * mask)
                    rates.append(float(options["lr"]))
            if not gradients:
                continue
            norms = torch.stack(torch._foreach_norm(gradients))
            if len(set(rates)) == 1:
                moved = norms.norm() * rates[0]
            else:
                moved = (norms * torch.tensor(rates, dtype=norms.dtype, device=norms.device)).norm()
            ratio = (moved / torch.stack(torch._foreach_norm(weights)).norm()).double()
            self._sums[group] = self._sums[group] + ratio if group in self._sums else ratio
            self._counts[group] = self._counts.get(group, 0) + 1

    def effective_rates(self) -> dict[str, float]:
        """Return the effective learning rate of each group that moved; not finite where its weights are all 0."""
        return {group: float(total) / self._counts[group] for group, total in self._sums.items()}

    def state(self) -> dict[str, Tensor]:
        """Return momenta, rates, parts of a drift to come and what was measured, as named tensors."""
        measured = {group: [float(total), float(self._counts[group])] for group, total in self._sums.items()}
        return joined(
            {
                "optimizer": optimizer_tensors(self.optimizer),
                "multirate": {} if self.multirate is None else self.multirate.state(),
                "measured": {group: torch.tensor(pair, dtype=torch.float64) for group, pair in measured.items()},
            }
        )

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state from `state` back, bit for bit; tensors of other names are left alone."""
        load_optimizer(self.optimizer, part(tensors, "optimizer"))
        if self.multirate is not None:
            self.multirate.load_state(part(tensors, "multirate"))
        self._sums, self._counts = {}, {}
        for group, pair in part(tensors, "measured").items():
            device = self._parts[group][0][0].device
            self._sums[group], self._counts[group] = pair[0].to(device, copy=True), int(pair[1])


Part = tuple[Tensor, Tensor | None, dict[str, Any]]
"""(parameter, mask of the group's entries or None, the optimizer's options for it)"""


def _parts(partition: Partition, param_groups: list[dict[str, Any]], trained: list[str]) -> dict[str, list[Part]]:
    options = {
        name: (p, group) for group in param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }
    found: dict[str, list[Part]] = {}
    for group in trained:
        for name, mask in partition[group].parts.items():
            if name in options:
                parameter, own = options[name]
                mask = None if mask is None else mask.to(parameter.device)
                found.setdefault(group, []).append((parameter, mask, own))
    return found
