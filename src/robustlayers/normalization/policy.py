"""Norm policies: for each pass, which statistics normalize and whether the pass updates the running ones.

The statistics of a norm layer are buffers, and like every tensor they belong to a group with a signal. Left to `auto`, a
pass treats a layer by that signal:

| statistics of the layer | normalizes by | the pass updates them |
|---|---|---|
| frozen | running | no |
| learn from this pass's objective | batch | yes |
| learn from another objective | batch | no |

Nothing updates frozen statistics, whatever a policy says. Published habits have names; see `habits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.normalization.context import (
    STATISTICS,
    By,
    Setting,
    check_choice,
    checked_alpha,
    checked_momentum,
    layers_of,
)
from robustlayers.selection.inventory import Inventory

__all__ = ["EXTRA", "PASSES", "NormPolicy", "Switch", "layer_switches", "policy_content", "policy_table"]

PASSES = ("craft", "score", "clean", "adversarial", "joint", "again", "ascent", "log", "evaluate")
EXTRA = ("score", "again", "log")
"""Passes that a step makes besides, for the statistics alone, if the policy has a switch for them."""


@dataclass(frozen=True)
class Switch:
    """What norm layers do in one pass.

    Args:
        by: normalize by the statistics of the `batch`, the `running` ones, the `frozen` ones (those at the start of the
            phase), or a `mixture` of both with `alpha`: alpha batch + (1 - alpha) running, of mean and variance.
        update: the running statistics by the batch: True, False, or `auto`.
        momentum: of the update, in (0, 1], or `cumulative`, the mean of all batches counted; None is the layer's own.
        alpha: share of the batch in a mixture, in [0, 1].
        branch: of the layers that have it (`main`, `auxiliary`, ...); None leaves each as it is.
        condition: in [0, 1], of conditional layers; with a dual norm inside, 0 takes its branch `main`, else `auxiliary`.

    Raises:
        UserError: a value out of range, or one that would do nothing.
    """

    by: Literal["auto"] | By = "auto"
    update: Literal["auto"] | bool = "auto"
    momentum: float | str | None = None
    alpha: float | str | None = None
    branch: str | None = None
    condition: float | None = None

    def __post_init__(self) -> None:
        if self.by not in ("auto", *STATISTICS):
            raise UserError(one_of("statistics to normalize by", str(self.by), ("auto", *STATISTICS)))
        if self.update != "auto" and not isinstance(self.update, bool):
            raise UserError(f"update: {self.update!r} is not allowed; allowed: true, false or auto")
        if self.momentum is not None and self.update is False:
            raise UserError("momentum: this pass updates nothing; leave the momentum out")
        object.__setattr__(self, "momentum", checked_momentum(self.momentum))
        object.__setattr__(self, "alpha", checked_alpha(self.by, self.alpha))
        if self.condition is not None and not 0 <= self.condition <= 1:
            raise UserError(f"condition: {self.condition:g} is not allowed; allowed: 0 to 1")

    def resolve(self, statistics_trained: bool, learns_here: bool) -> Setting:
        """Return what a layer does whose statistics are trained at all, and from this very pass.

        >>> Switch().resolve(statistics_trained=True, learns_here=False)[:2]
        ('batch', False)
        >>> Switch("batch", True).resolve(statistics_trained=False, learns_here=False)[:2]
        ('batch', False)
        """
        by: By = self.by if self.by != "auto" else ("batch" if statistics_trained else "running")
        update = (learns_here if self.update == "auto" else self.update) and statistics_trained
        momentum = checked_momentum(self.momentum) if update else None
        alpha = None if self.alpha is None else float(self.alpha)
        return Setting(by, update, momentum, alpha, self.branch, self.condition)

    @property
    def statistics_text(self) -> str:
        """What normalizes, in words."""
        if self.by == "mixture":
            return f"{self.alpha:g} batch + {1 - float(self.alpha or 0):g} running"
        return "by signal" if self.by == "auto" else self.by

    @property
    def update_text(self) -> str:
        """What happens to the running statistics, in words."""
        text = {"auto": "update by signal", True: "update", False: "no update"}[self.update]
        if self.momentum is None:
            return text
        return f"{text}, cumulative" if self.momentum == "cumulative" else f"{text}, momentum {self.momentum:g}"

    def __str__(self) -> str:
        text = f"{self.statistics_text}, {self.update_text}"
        text += "" if self.branch is None else f", branch {self.branch}"
        return text + ("" if self.condition is None else f", condition {self.condition:g}")


@dataclass(frozen=True)
class NormPolicy:
    """The switches of every pass; the default crafts by running statistics without a trace.

    `craft` is for the forwards of the attack, `clean` and `adversarial` for those that are trained on, `ascent` for those
    at weights that an ascent has perturbed: published code lets the latter update the running statistics, here they do not
    unless told to. `evaluate` is for measuring.

    Some published code makes forwards besides, which move the statistics. Given a switch, a step that crafts makes them,
    each once: `score`, of what was crafted, under the attack (unless the attack's own last forward does that); `again`, of
    the clean images before the update; `log`, of the clean images after it.

    `joint`: a step that trains on both kinds of images takes them as one batch [clean; adversarial], in the place of the two
    passes. Layers with a branch of that name (norm=joint) are told so; plain batch norm then mixes both kinds.

    `statistics`: the one pass whose images the running statistics of a step that crafts are of, where switches leave the
    update to `auto`. For `clean`, the pass is made also where no objective needs it.

    `layers`: selector -> switches of some passes, for the norm layers that it picks; layers may not be picked twice.

    Bag of Tricks for Adversarial Training (Pang et al. 2021, section 3) finds crafting in evaluation mode to keep more
    clean accuracy; Rice et al. 2020 craft in train mode, which is `habit("rice")`.
    """

    craft: Switch = field(default=Switch("running", False))
    clean: Switch = field(default=Switch())
    adversarial: Switch = field(default=Switch())
    ascent: Switch = field(default=Switch("auto", False))
    evaluate: Switch = field(default=Switch("running", False))
    score: Switch | None = None
    again: Switch | None = None
    log: Switch | None = None
    joint: Switch | None = None
    statistics: Literal["clean", "adversarial"] | None = None
    layers: Mapping[str, Mapping[str, Switch]] = field(default_factory=dict)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.statistics not in (None, "clean", "adversarial"):
            raise UserError(one_of("pass that the statistics are of", str(self.statistics), ("clean", "adversarial")))
        if self.joint is not None and self.statistics is not None:
            raise UserError(f"statistics of the {self.statistics} pass alone: a joint batch is one pass of both")
        for selector, switches in self.layers.items():
            for key in switches:
                if key not in PASSES:
                    raise UserError(one_of(f"pass of layers {selector!r}", str(key), PASSES))
                if self.switches.get(key) is None:
                    raise UserError(f"layers {selector!r}: no step makes the pass {key!r} under this policy")

    def __getitem__(self, name: str) -> Switch:
        if name not in self.switches:
            raise UserError(one_of("pass of this norm policy", name, self.switches))
        return self.switches[name]

    @property
    def switches(self) -> dict[str, Switch]:
        """The switch of each pass that is made."""
        found = {name: getattr(self, name) for name in PASSES}
        return {name: switch for name, switch in found.items() if switch is not None}

    @property
    def extra(self) -> tuple[str, ...]:
        """Passes that only move statistics."""
        return tuple(name for name in EXTRA if name in self.switches)

    @property
    def freezes(self) -> bool:
        """Whether some layer normalizes by the frozen statistics in some pass."""
        switches = [*self.switches.values(), *(switch for own in self.layers.values() for switch in own.values())]
        return any(switch.by == "frozen" for switch in switches)

    def changed(self, **switches: Any) -> NormPolicy:
        """Return the policy with some fields replaced; it is no longer the habit of its name."""
        return replace(self, **{"name": "", **switches})

    def __str__(self) -> str:
        text = "; ".join(f"{name}: {switch}" for name, switch in self.switches.items())
        text += "" if self.statistics is None else f"; statistics of the {self.statistics} pass alone"
        for selector, switches in self.layers.items():
            text += f"; {selector}: " + ", ".join(f"{name} {switch}" for name, switch in switches.items())
        return f"{self.name} ({text})" if self.name else text


def layer_switches(policy: NormPolicy, inventory: Inventory) -> dict[nn.Module, Mapping[str, Switch]]:
    """Return the exceptions of a policy by norm layer.

    Raises `UserError` for a selector that picks no norm layer, layers that two of them pick, and branches or conditions
    that no layer meant has.
    """
    found: dict[nn.Module, Mapping[str, Switch]] = {}
    by: dict[nn.Module, str] = {}
    faults: list[Fault] = []
    for selector, switches in policy.layers.items():
        try:
            layers = layers_of(inventory, selector)
            for switch in switches.values():
                check_choice(layers, _choice(switch))
        except UserError as error:
            faults += [fault.at(path=f"layers {selector!r}") for fault in error.faults]
            continue
        twice = [name for layer, name in layers.items() if layer in by]
        if twice:
            other = by[next(layer for layer in layers if layer in by)]
            shown = ", ".join(twice[:4]) + (f" and {len(twice) - 4} more" if len(twice) > 4 else "")
            faults.append(Fault(f"layers {selector!r} and {other!r} overlap: {shown}; each layer has one policy"))
        found.update(dict.fromkeys(layers, switches))
        by.update(dict.fromkeys(layers, selector))
    for name, switch in policy.switches.items():
        if name == "evaluate" or (switch.branch is None and switch.condition is None):
            continue
        rest = [module for module in inventory.model.modules() if name not in found.get(module, {})]
        try:
            check_choice(rest, _choice(switch))
        except UserError as error:
            faults += [fault.at(path=name) for fault in error.faults]
    if faults:
        raise UserError(faults)
    return found


def _choice(switch: Switch) -> Setting:
    return Setting(None, None, branch=switch.branch, condition=switch.condition)


def policy_table(policy: NormPolicy) -> list[dict[str, str]]:
    """Return a row for each group of layers and pass, with what stands in it as words.

    >>> policy_table(NormPolicy())[0]
    {'layers': 'all', 'pass': 'craft', 'normalizes by': 'running', 'running statistics': 'no update', 'branch': ''}
    """
    rows = []
    for layers, switches in {"all": policy.switches, **policy.layers}.items():
        for name in PASSES:
            switch = switches.get(name)
            if switch is None:
                continue
            update = switch.update_text
            if switch.update == "auto" and name in ("clean", "adversarial") and policy.statistics is not None:
                update = f"update, steps that craft: {'only' if name == policy.statistics else 'not'} here"
            branch = [switch.branch or ""] + ([] if switch.condition is None else [f"condition {switch.condition:g}"])
            rows.append(
                {
                    "layers": layers,
                    "pass": name,
                    "normalizes by": switch.statistics_text,
                    "running statistics": update,
                    "branch": " ".join(filter(None, branch)),
                }
            )
    return rows


def policy_content(policy: NormPolicy) -> dict[str, Any]:
    """Return what decides a result, as plain data for an identity; what is as ever is left out."""
    default = NormPolicy()
    content: dict[str, Any] = {}
    for name, switch in policy.switches.items():
        if name in ("craft", "clean", "adversarial") or switch != getattr(default, name):
            content[name] = _switch_content(switch)
    if policy.statistics is not None:
        content["statistics"] = policy.statistics
    if policy.layers:
        content["layers"] = {
            selector: {name: _switch_content(switch) for name, switch in switches.items()}
            for selector, switches in policy.layers.items()
        }
    return content


def _switch_content(switch: Switch) -> dict[str, Any]:
    content: dict[str, Any] = {"by": switch.by, "update": switch.update}
    for name in ("momentum", "alpha", "branch", "condition"):
        value = getattr(switch, name)
        if value is not None:
            content[name] = value
    return content
