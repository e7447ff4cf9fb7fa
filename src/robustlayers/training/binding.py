"""What a step computes for given groups: passes, objectives, the tensors each trains, and what norm layers do meanwhile.

A step of a phase in which every group learns all the time has one binding. Groups that learn in a part of the phase only,
or whose gradient is taken every few steps, give one binding for each set of groups that learn together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.normalization.context import Setting, check_setting
from robustlayers.normalization.policy import NormPolicy, layer_switches
from robustlayers.selection.inventory import Entry, is_norm
from robustlayers.selection.partition import Partition
from robustlayers.training.objectives import OBJECTIVES, Signal

__all__ = ["Binding", "Shares"]

Shares = dict[str, dict[str, list[tuple[float, Tensor | None]]]]
"""objective -> tensor -> (weight, mask or None) of each group that learns from it"""

# Crafting serves the adversarial objective: with `update: true` its passes count as that objective's.
_OBJECTIVES_OF = {
    "clean": {"natural"},
    "again": {"natural"},
    "log": {"natural"},
    "adversarial": {"adversarial"},
    "craft": {"adversarial"},
    "score": {"adversarial"},
    "joint": {"natural", "adversarial"},
}


class Binding:
    """One set of learning groups, bound to a model and a norm policy.

    Args:
        partition: of the model.
        signals: of every group; `{}` is frozen.
        due: the groups whose gradients this step takes; the others learn, but wait. None: all that learn.
        policy: what norm layers do in each pass.
        climbed: tensors of the ascent with the entries that move, or None where the step has no ascent.
    """

    def __init__(
        self,
        partition: Partition,
        signals: Mapping[str, Signal],
        due: Collection[str] | None,
        policy: NormPolicy,
        climbed: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        self.partition, self.policy = partition, policy
        now = {group: signal for group, signal in signals.items() if signal and (due is None or group in due)}
        self.objectives = [OBJECTIVES[name] for name in OBJECTIVES if any(name in s for s in now.values())]
        self.passes = tuple(name for name in ("clean", "adversarial") if any(name in o.passes for o in self.objectives))
        self.shares: Shares = {o.name: {} for o in self.objectives}
        self.protected: list[Entry] = []  # frozen buffers of modules that are no norm layers
        entries = self._entries(signals, now)
        self.trained = [name for name, masks in entries.items() if masks]
        self.divided = _divided({name: masks for name, masks in entries.items() if masks})
        statistics = self._statistics(signals)
        crafts = "adversarial" in self.passes
        self.source = policy.statistics if crafts and any(statistics.values()) else None
        if self.source == "clean" and "clean" not in self.passes:  # for the statistics alone
            self.passes = ("clean", *self.passes)
        self.extra = policy.extra if crafts else ()
        self._exceptions = layer_switches(policy, partition.inventory)
        self._layers = _steered(partition, statistics)
        self.joint = policy.joint is not None and len(self.passes) == 2
        made = ("craft", *self.extra, *(("joint",) if self.joint else self.passes))
        self.settings = {name: self._settings(name, statistics) for name in made}
        crafting = [self.settings[name] for name in ("craft", "score") if name in self.settings]
        self.crafting_updates = any(setting.update for settings in crafting for setting in settings.values())
        self.still = [  # whose statistics crafting must leave, though it moves those of others
            module for module in statistics if not any(settings[module].update for settings in crafting)
        ]
        self.moving = self._moving(self.settings)
        self.climbing = climbed is not None and bool(self.passes)
        if self.climbing and climbed is not None:
            self.climbs = self._climbs(climbed)
            passes = ("joint",) if self.joint else self.passes
            ascent = {name: self._settings("ascent", statistics, name) for name in passes}
            self.ascent_settings, self.ascent_moving = ascent, self._moving(ascent)

    @property
    def backwards(self) -> int:
        """Backward passes of the step itself: one for each objective that trains a parameter."""
        return sum(bool(self.shares[objective.name]) for objective in self.objectives)

    def _entries(self, signals: Mapping[str, Signal], now: Mapping[str, Signal]) -> dict[str, list[Tensor | None]]:
        """Fill `shares` and `protected`; return the masks of the groups that learn, by tensor, for what is due."""
        inventory = self.partition.inventory
        learning: dict[str, list[Tensor | None]] = {}
        due: set[str] = set()
        for group, selection in self.partition.groups.items():
            for name, mask in selection.parts.items():
                entry = inventory.entries[name]
                if entry.buffer:
                    if not signals[group] and not any(map(is_norm, entry.owners)):
                        self.protected.append(entry)
                    continue
                mask = None if mask is None else mask.to(entry.tensor.device)
                if signals[group]:
                    learning.setdefault(name, []).append(mask)
                if group in now:
                    due.add(name)
                for objective, weight in now.get(group, {}).items():
                    self.shares[objective].setdefault(name, []).append((weight, mask))
        return {name: masks if name in due else [] for name, masks in learning.items()}

    def _statistics(self, signals: Mapping[str, Signal]) -> dict[nn.Module, Signal]:
        """Return the signal of each norm layer's statistics, which must be one."""
        found: dict[nn.Module, list[tuple[Entry, Signal]]] = {}
        for group, selection in self.partition.groups.items():
            for name in selection.parts:
                entry = self.partition.inventory.entries[name]
                for module in entry.owners if entry.buffer else ():
                    if is_norm(module):
                        found.setdefault(module, []).append((entry, signals[group]))
        for module, entries in found.items():
            if len({tuple(sorted(signal.items())) for _, signal in entries}) > 1:
                names = ", ".join(entry.name for entry, _ in entries)
                raise UserError(f"the statistics of {type(module).__name__} must share one signal: {names}")
        return {module: entries[0][1] for module, entries in found.items()}

    def _settings(
        self, name: str, statistics: Mapping[nn.Module, Signal], of: str | None = None
    ) -> dict[nn.Module, Setting]:
        """Return what each norm layer does in a pass; the ascent's policy holds for each of the step's passes."""
        kind = of or name
        settings: dict[nn.Module, Setting] = {}
        faults: list[Fault] = []
        for module, path in self._layers.items():
            switch = self._exceptions.get(module, {}).get(name, self.policy[name])
            signal = statistics.get(module, {})
            learns = not _OBJECTIVES_OF[kind].isdisjoint(signal)
            if self.source is not None and kind in ("clean", "adversarial"):
                learns = kind == self.source
            settings[module] = switch.resolve(bool(signal), learns)
            if kind == "joint" and switch.branch is None:
                settings[module] = settings[module]._replace(branch="joint")
            text = check_setting(module, settings[module], path)
            if text:
                faults.append(Fault(text, path=name))
        if faults:
            raise UserError(faults)
        return settings

    def _moving(self, settings: Mapping[str, Mapping[nn.Module, Setting]]) -> dict[str, set[nn.Module]]:
        """Return the layers that a pass normalizes by running statistics, which a later one updates before its backward."""
        if self.joint:
            return {"joint": set()}
        return {
            name: {
                module
                for later in self.passes[place + 1 :]
                for module, setting in settings[later].items()
                if setting.update and settings[name][module].by == "running"
            }
            for place, name in enumerate(self.passes)
        }

    def _climbs(self, climbed: Mapping[str, Tensor | None]) -> Shares:
        """Return what the ascent differentiates: every tensor the loss it descends, a frozen one the sum of all."""
        shares: Shares = {objective.name: {} for objective in self.objectives}
        for name, mask in climbed.items():
            own = {o: parts[name] for o, parts in self.shares.items() if name in parts}
            for objective, parts in shares.items():
                if not own:
                    parts[name] = [(1.0, mask)]
                elif objective in own:
                    parts[name] = [(weight, _both(part, mask)) for weight, part in own[objective]]
        return shares


def _steered(partition: Partition, statistics: Mapping[nn.Module, Signal]) -> dict[nn.Module, str]:
    """Return the norm layers that a setting can concern, with their names: statistics, branches, a condition."""
    return {
        module: name
        for name, module in partition.model.named_modules()
        if module in statistics or (is_norm(module) and (hasattr(module, "branches") or hasattr(module, "condition")))
    }


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one & other.to(one.device)


def _divided(entries: Mapping[str, list[Tensor | None]]) -> dict[str, Tensor]:
    """Return the entries that learn of each tensor of which some do not."""
    found = {}
    for name, masks in entries.items():
        if all(mask is not None for mask in masks):
            trained = torch.stack([mask for mask in masks if mask is not None]).any(0)
            if not bool(trained.all()):
                found[name] = trained
    return found
