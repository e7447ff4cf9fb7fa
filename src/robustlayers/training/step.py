"""The step: craft once, one forward per pass, one gradient per objective, each only for the groups that learn from it.

with guard(model):                                # leaves no trace, also on an exception
    x_adv = attack(model under policy.craft, x, y)
for objective in distinct(signals):
    gradients |= d objective / d (groups that learn from it)     # backward stops at the shallowest of them
optimizer.step()                                  # frozen: requires_grad False and grad None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustlayers.attacks.guard import guard
from robustlayers.attacks.registry import is_own
from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.random import stream
from robustlayers.normalization.context import Setting, normalizing
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.policy import NormPolicy
from robustlayers.selection.inventory import Entry, is_norm
from robustlayers.selection.partition import Partition
from robustlayers.training.objectives import OBJECTIVES, Signal, parse_signal

__all__ = ["Attack", "Gradients", "PartialStep", "StepLog"]

Attack = Callable[..., Tensor]
"""`attack(forward, x, y, *, generator) -> x_adv`"""

_PASS_OF = {"clean": "natural", "adversarial": "adversarial"}


@dataclass
class StepLog:
    """What one step saw; tensors stay on the device, so that reading them is the caller's choice of a wait."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # objective -> scalar
    correct: dict[str, Tensor] = field(default_factory=dict)  # pass -> number of right answers, before the update
    size: int = 0
    forward_passes: int = 0  # of the whole batch
    backward_passes: int = 0

    @property
    def loss(self) -> Tensor:
        """Sum of the losses of all objectives."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())


@dataclass(frozen=True)
class Gradients:
    """Gradient by tensor name of one step, already masked and summed over objectives, with the step's log."""

    by_name: Mapping[str, Tensor]
    log: StepLog


class PartialStep:
    """One training step in which each group of a partition learns from its own signal.

    For a group G with signal w: objective -> weight, the gradient is sum_o w_o dL_o/dG; entries of a tensor that belong
    to different groups get the gradient of their own group. Frozen tensors, statistics and counters included, are
    bit-equal afterwards, whatever momentum and weight decay the optimizer has: they have `requires_grad` False and no
    `grad` while it steps, and entries of a divided tensor are put back.

    Args:
        model: maps images [n, c, h, w] in [0, 1] to logits [n, classes].
        partition: of this very model.
        signals: group -> `natural`, `adversarial`, `frozen`, or weights of objectives.
        attack: called as `attack(model, x, y, generator=g)`; needed if any signal is adversarial. Our own attacks get a
            folded equivalent of the model where crafting normalizes by running statistics.
        optimizer: anything with `step()` and `param_groups` over parameters of the model.
        policy: what norm layers do in each pass.
        seed: of the attack's own random stream, one draw per step, unless `generator` is given to the call.

    Raises:
        UserError: groups and signals that do not match, no attack where one is needed, no group to train, an optimizer
            without the tensors to train.

    >>> from robustlayers.attacks import PGD, Linf
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> partition = Partition(net, {"norm": "norm", "rest": "rest"})
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> step = PartialStep(net, partition, signals={"norm": "adversarial", "rest": "frozen"},
    ...                    attack=PGD(Linf("8/255"), steps=2), optimizer=optimizer)
    >>> log = step(torch.rand(16, 1, 2, 2), torch.arange(16) % 2)
    >>> log.forward_passes, log.backward_passes
    (4, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        signals: Mapping[str, str | Mapping[str, float | str]],
        *,
        optimizer: torch.optim.Optimizer | None,
        attack: Attack | None = None,
        policy: NormPolicy | None = None,
        seed: int = 0,
    ) -> None:
        if partition.model is not model:
            raise UserError("the partition was bound to another model")
        self.model, self.partition, self.optimizer, self.attack = model, partition, optimizer, attack
        self.policy = policy or NormPolicy()
        self.seed = seed
        self.steps = 0
        self.reached: set[str] = set()  # tensors that got a gradient in any step
        self._folded: CraftingForward | None = None
        self.signals = _signals(partition, signals)
        self.objectives = [OBJECTIVES[name] for name in OBJECTIVES if any(name in s for s in self.signals.values())]
        if not self.objectives:
            raise UserError("every group is frozen: nothing to train")
        self.passes = tuple(
            name for name in ("clean", "adversarial") if any(name in objective.passes for objective in self.objectives)
        )
        if "adversarial" in self.passes and attack is None:
            raise UserError("a signal is adversarial, so an attack is needed")
        self._bind()
        if optimizer is not None:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            lacking = [name for name in self._trained if id(self._tensors[name]) not in held]
            if lacking:
                more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
                raise UserError(f"the optimizer lacks tensors that are to learn: {', '.join(lacking[:4])}{more}")

    def __call__(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> StepLog:
        """Craft, differentiate and update on one batch: x float [n, c, h, w] in [0, 1], y int64 [n]."""
        if self.optimizer is None:
            raise UserError("this step has no optimizer; use gradients() or give one")
        with self._scope():
            gradients = self._gradients(x, y, generator)
            divided = {name: self._tensors[name].detach().clone() for name in self._divided}
            for name, tensor in self._tensors.items():
                tensor.grad = gradients.by_name.get(name)
                tensor.requires_grad_(name in gradients.by_name)
            self.optimizer.step()
            with torch.no_grad():
                for name, before in divided.items():
                    tensor = self._tensors[name]
                    tensor.copy_(torch.where(self._divided[name], tensor, before))
        self.steps += 1
        return gradients.log

    def gradients(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Gradients:
        """Return the step's gradients without updating parameters; running statistics move as in a step."""
        with self._scope():
            return self._gradients(x, y, generator)

    def passes_per_batch(self) -> tuple[int, int]:
        """Return (forward, backward) passes of one batch, the attack's included."""
        forward, backward = len(self.passes), len(self._backwards())
        if "adversarial" in self.passes:
            forward += getattr(self.attack, "forward_passes", 0)
            backward += getattr(self.attack, "backward_passes", 0)
        return forward, backward

    # -- binding ---------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        inventory = self.partition.inventory
        self._tensors: dict[str, Tensor] = {entry.name: entry.tensor for entry in inventory if not entry.buffer}
        # objective -> tensor -> list of (weight, mask or None)
        self._shares: dict[str, dict[str, list[tuple[float, Tensor | None]]]] = {o.name: {} for o in self.objectives}
        trained_entries: dict[str, list[Tensor | None]] = {}
        statistics: dict[nn.Module, list[tuple[Entry, Signal]]] = {}
        self._protected: list[Entry] = []
        for group, selection in self.partition.groups.items():
            signal = self.signals[group]
            for name, mask in selection.parts.items():
                entry = inventory.entries[name]
                if entry.buffer:
                    norms = [module for module in entry.owners if is_norm(module)]
                    for module in norms:
                        statistics.setdefault(module, []).append((entry, signal))
                    if not norms and not signal:
                        self._protected.append(entry)
                    continue
                mask = None if mask is None else mask.to(entry.tensor.device)
                if signal:
                    trained_entries.setdefault(name, []).append(mask)
                for objective, weight in signal.items():
                    self._shares[objective].setdefault(name, []).append((weight, mask))
        # Tensors of which some entries are frozen: entry -> trained?
        self._trained = list(trained_entries)
        self._divided: dict[str, Tensor] = {}
        for name, masks in trained_entries.items():
            if all(mask is not None for mask in masks):
                trained = torch.stack([mask for mask in masks if mask is not None]).any(0)
                if not bool(trained.all()):
                    self._divided[name] = trained
        self._settings = {name: self._settings_of(name, statistics) for name in ("craft", "clean", "adversarial")}
        self._crafting_updates = any(update for _, update in self._settings["craft"].values())
        # Layers that a pass normalizes by running statistics, which a later pass updates before the backward of this one.
        self._moving = {
            name: {
                module
                for later in self.passes[place + 1 :]
                for module, (_, update) in self._settings[later].items()
                if update and self._settings[name][module][0] == "running"
            }
            for place, name in enumerate(self.passes)
        }
        # A layer whose statistics are divided between a trained and a frozen group would move what is frozen.
        for module, entries in statistics.items():
            if len({tuple(sorted(signal.items())) for _, signal in entries}) > 1:
                names = ", ".join(entry.name for entry, _ in entries)
                raise UserError(f"the statistics of {type(module).__name__} must share one signal: {names}")

    def _settings_of(
        self, name: str, statistics: Mapping[nn.Module, list[tuple[Entry, Signal]]]
    ) -> dict[nn.Module, Setting]:
        switch = self.policy[name]
        # Crafting serves the adversarial objective: with `update: true` its passes count as that objective's.
        objective = "adversarial" if name == "craft" else _PASS_OF[name]
        settings: dict[nn.Module, Setting] = {}
        for module, entries in statistics.items():
            signal = entries[0][1]
            settings[module] = switch.resolve(bool(signal), objective in signal)
        return settings

    def _backwards(self) -> list[str]:
        return [objective.name for objective in self.objectives if self._shares[objective.name]]

    # -- one step --------------------------------------------------------------------------------------------------

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Put `requires_grad` and frozen buffers of foreign modules back after a step, also after an exception."""
        flags = [(tensor, tensor.requires_grad) for tensor in self._tensors.values()]
        # Looked up anew, since moving a model to another device puts new tensors in the place of its buffers.
        buffers = [(entry, entry.module._buffers[entry.attribute]) for entry in self._protected]
        values = [None if buffer is None else buffer.detach().clone() for _, buffer in buffers]
        try:
            with torch.enable_grad():
                yield
        finally:
            for tensor, flag in flags:
                tensor.requires_grad_(flag)
            with torch.no_grad():
                for (entry, buffer), value in zip(buffers, values, strict=True):
                    entry.module._buffers[entry.attribute] = buffer
                    if buffer is not None and value is not None:
                        buffer.copy_(value)

    def _gradients(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Gradients:
        log = StepLog(size=len(x))
        inputs = {"clean": x}
        if "adversarial" in self.passes:
            inputs["adversarial"] = self._craft(x, y, generator, log)
        logits = {name: self._forward(name, inputs[name], y, log) for name in self.passes}
        gradients: dict[str, Tensor] = {}
        for place, objective in enumerate(self.objectives):
            shares = self._shares[objective.name]
            loss = objective.loss(logits, y)
            log.losses[objective.name] = loss.detach()
            if not shares or not loss.requires_grad:  # only buffers learn from it, or what is not used in the forward
                continue
            later = [other for other in self.objectives[place + 1 :] if set(other.passes) & set(objective.passes)]
            for name in shares:  # another pass may have switched it off since the forward
                self._tensors[name].requires_grad_(True)
            found = torch.autograd.grad(
                loss, [self._tensors[name] for name in shares], retain_graph=bool(later), allow_unused=True
            )
            log.backward_passes += 1
            for name, gradient in zip(shares, found, strict=True):
                if gradient is None:
                    continue
                self.reached.add(name)
                for weight, mask in shares[name]:
                    part = gradient if weight == 1.0 else gradient * weight
                    if mask is not None:
                        part = part * mask
                    gradients[name] = gradients[name] + part if name in gradients else part
        return Gradients({name: gradient.detach() for name, gradient in gradients.items()}, log)

    def _craft(self, x: Tensor, y: Tensor, generator: torch.Generator | None, log: StepLog) -> Tensor:
        attack = self.attack
        assert attack is not None  # checked by the constructor
        if generator is None:
            generator = stream(self.seed, "attack", self.steps, device=x.device)
        settings = self._settings["craft"]
        forward: Callable[[Tensor], Tensor] = self.model
        if is_own(attack) and all(setting == ("running", False) for setting in settings.values()):
            # The same function of x with norm layers folded away, at a fraction of the cost.
            if self._folded is None:
                self._folded = crafting_forward(self.model)
            self._folded.refresh()
            forward = self._folded
        with (
            guard(self.model, keep_statistics=self._crafting_updates),
            normalizing(self.model, settings, training=False),
        ):
            x_adv = attack(forward, x, y, generator=generator)
        log.forward_passes += getattr(attack, "forward_passes", 0)
        log.backward_passes += getattr(attack, "backward_passes", 0)
        return x_adv.detach()

    def _forward(self, name: str, x: Tensor, y: Tensor, log: StepLog) -> Tensor:
        needed = {
            tensor
            for objective in self.objectives
            if name in objective.passes
            for tensor in self._shares[objective.name]
        }
        for key, tensor in self._tensors.items():
            tensor.requires_grad_(key in needed)
        with normalizing(self.model, self._settings[name], training=True, moving=self._moving[name]):
            logits = self.model(x)
        log.forward_passes += 1
        log.correct[name] = (logits.detach().argmax(1) == y).sum()
        return logits


def _signals(partition: Partition, signals: Mapping[str, str | Mapping[str, float | str]]) -> dict[str, Signal]:
    faults = [Fault(one_of("group", group, partition.groups)) for group in signals if group not in partition.groups]
    faults += [Fault(f"group {group!r} has no signal") for group in partition.groups if group not in signals]
    if faults:
        raise UserError(faults)
    return {group: parse_signal(signals[group]) for group in partition.groups}
