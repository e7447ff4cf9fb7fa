"""The step: craft once, one forward per pass, one gradient per objective, each only for the groups that learn from it.

with guard(model):                                # leaves no trace, also on an exception
    x_adv = attack(model under policy.craft, x, y)
with perturbed(weights by ascent):                # AWP, SAM, ... on a selector of their own, if any
    for objective in distinct(signals):
        gradients |= d objective / d (groups that learn from it)     # backward stops at the shallowest of them
optimizer.step()                                  # frozen: requires_grad False and grad None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream_place
from robustlayers.normalization.context import normalizing, statistics_of
from robustlayers.normalization.habits import habit
from robustlayers.normalization.layers import RandomNorm, seed_draws
from robustlayers.normalization.policy import NormPolicy
from robustlayers.normalization.precision import Choice
from robustlayers.selection.inventory import norm_layers
from robustlayers.selection.partition import Partition
from robustlayers.training.ascent import Ascent, bind, climb, parse_ascent, perturbed
from robustlayers.training.binding import Binding, Shares
from robustlayers.training.crafting import Attack, Crafting, scaled
from robustlayers.training.differentiation import differentiate
from robustlayers.training.objectives import checked_labels, parse_signals
from robustlayers.training.precision import PRECISIONS, Layout, computing
from robustlayers.training.tally import StepLog

__all__ = ["WHOLE", "Attack", "Gradients", "PartialStep", "StepLog", "Turn", "scaled"]

Average = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""`average(gradients by name, all tensors that may have one) -> gradients by name`"""


@dataclass(frozen=True)
class Turn:
    """What sets one step of a phase apart from the others."""

    learning: frozenset[str] | None = None  # groups that learn; the others are frozen in this step. None: as signaled
    due: frozenset[str] | None = None  # of those, the groups whose gradient is taken. None: all
    eps: float = 1.0  # factor of the attack's eps and step size; at 0 the adversarial images are the natural ones
    ascend: bool = True  # whether the ascent is made


WHOLE = Turn()
"""A step in which every group does what its signal says."""


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
        policy: what norm layers do in each pass, or the name of a habit; `frozen` are the statistics of this moment.
        ascent: perturbs weights before the gradient is taken: every perturbed tensor climbs the loss that it descends, a
            frozen one the sum of all; the passes at the perturbed weights have the norm policy `ascent`.
        crafting: precision of our attacks' forward, `fp32`, `bf16` or `auto`; see `crafting_forward`.
        precision: of the forwards that are learned from, `fp32` or `bf16`: then under autocast, with norm layers, losses,
            parameters and their gradients in float32.
        average: of gradients over processes that share the batch, such as `Shards`: called with those of this process and
            with all tensors that may have one, before the optimizer's step and in each step of an ascent.
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
        policy: NormPolicy | str | None = None,
        ascent: Ascent | str | Mapping[str, Any] | None = None,
        crafting: str = "fp32",
        precision: str = "fp32",
        average: Average | None = None,
        seed: int = 0,
    ) -> None:
        if partition.model is not model:
            raise UserError("the partition was bound to another model")
        self.model, self.partition, self.optimizer = model, partition, optimizer
        self.average = average
        self.policy = habit(policy) if isinstance(policy, str) else policy or NormPolicy()
        self._snapshot = statistics_of(norm_layers(model).values()) if self.policy.freezes else {}
        self._draws = any(isinstance(module, RandomNorm) for module in model.modules())
        self.seed = seed
        self.steps = 0
        self.reached: set[str] = set()  # tensors that got a gradient in any step
        if precision not in PRECISIONS:
            raise UserError(one_of("precision", precision, PRECISIONS))
        self.precision = precision
        self._layout = Layout(model)
        self._crafting = Crafting(
            model, attack, precision=crafting, seed=seed, layout=self._layout, frozen=self._snapshot
        )
        self.signals = parse_signals(partition.groups, signals)
        if not any(self.signals.values()):
            raise UserError("every group is frozen: nothing to train")
        self._tensors: dict[str, Tensor] = {e.name: e.tensor for e in partition.inventory if not e.buffer}
        self.ascent = None if ascent is None else parse_ascent(ascent)
        self._climbed = None if self.ascent is None else bind(self.ascent, partition.inventory)
        self._bindings: dict[Turn, Binding] = {}
        binding = self.binding()
        self.objectives, self.passes = binding.objectives, binding.passes
        if "adversarial" in self.passes and attack is None:
            raise UserError("a signal is adversarial, so an attack is needed")
        if optimizer is not None:
            held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
            lacking = [name for name in binding.trained if id(self._tensors[name]) not in held]
            if lacking:
                more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
                raise UserError(f"the optimizer lacks tensors that are to learn: {', '.join(lacking[:4])}{more}")

    def __call__(
        self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, turn: Turn = WHOLE
    ) -> StepLog:
        """Craft, differentiate and update on one batch: x float [n, c, h, w] in [0, 1], y integers [n].

        Raises `UserError` for labels that are not one integer per image, and for a batch without images.
        """
        if self.optimizer is None:
            raise UserError("this step has no optimizer; use gradients() or give one")
        binding = self.binding(turn)
        with self._scope(binding):
            gradients = self._gradients(x, y, generator, turn, binding)
            # A group that waits for its turn may still move, by linear drift.
            entries = self.binding(Turn(turn.learning)).divided
            divided = {name: self._tensors[name].detach().clone() for name in entries}
            for name, tensor in self._tensors.items():
                tensor.grad = gradients.by_name.get(name)
                tensor.requires_grad_(name in gradients.by_name)
            self.optimizer.step()
            with torch.no_grad():
                for name, before in divided.items():
                    tensor = self._tensors[name]
                    tensor.copy_(torch.where(entries[name], tensor, before))
            self._extra("log", x, y, binding, gradients.log)
        self.steps += 1
        return gradients.log

    def gradients(
        self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None, turn: Turn = WHOLE
    ) -> Gradients:
        """Return the step's gradients without updating parameters; running statistics move as in a step."""
        binding = self.binding(turn)
        with self._scope(binding):
            gradients = self._gradients(x, y, generator, turn, binding)
            self._extra("log", x, y, binding, gradients.log)
        return gradients

    def passes_per_batch(self, turn: Turn = WHOLE) -> tuple[int, int]:
        """Return (forward, backward) passes of one batch, the attack's and the ascent's included."""
        binding = self.binding(turn)
        forward = len(binding.passes) + sum(name in binding.extra for name in ("again", "log"))
        backward = binding.backwards
        ascent = self._ascent(binding, turn)
        if ascent is not None:
            steps = ascent.steps or 1
            forward += steps * len(binding.passes)
            backward += steps * sum(map(bool, binding.climbs.values()))
        if "adversarial" in binding.passes and turn.eps > 0:
            crafted = self._crafting.passes(binding)
            forward, backward = forward + crafted[0], backward + crafted[1]
        return forward, backward

    @property
    def attack(self) -> Attack | None:
        """The attack of the adversarial pass."""
        return self._crafting.attack

    @attack.setter
    def attack(self, attack: Attack | None) -> None:
        self._crafting.attack = attack

    @property
    def choice(self) -> Choice | None:
        """What `crafting="auto"` stands for, once a batch was crafted; set it before to have it so, as in a resume."""
        return self._crafting.choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        self._crafting.choice = choice

    def binding(self, turn: Turn = WHOLE) -> Binding:
        """Return what a step of this turn computes; made once for each set of groups."""
        key = Turn(turn.learning, turn.due)
        if key not in self._bindings:
            signals = {
                group: signal if turn.learning is None or group in turn.learning else {}
                for group, signal in self.signals.items()
            }
            self._bindings[key] = Binding(self.partition, signals, turn.due, self.policy, self._climbed)
        return self._bindings[key]

    def statistics_updates(self, turn: Turn = WHOLE) -> dict[str, int]:
        """Return how often a step updates the running statistics of each norm layer that each of its forwards reaches.

        >>> from robustlayers.attacks import PGD, Linf
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> partition = Partition(net, {"all": "all"})
        >>> attack = PGD(Linf("8/255"), steps=10)
        >>> step = PartialStep(net, partition, {"all": "adversarial"}, attack=attack, optimizer=None, policy="rice")
        >>> step.statistics_updates()
        {'2': 13}
        """
        binding = self.binding(turn)
        passes = ("joint",) if binding.joint else binding.passes
        forwards = dict.fromkeys((*passes, *binding.extra), 1)
        crafts = "adversarial" in binding.passes and turn.eps > 0
        forwards["craft"] = getattr(self.attack, "forward_passes", 0) if crafts else 0
        forwards["score"] = int(crafts and self._crafting.scores(binding))
        made = [(binding.settings[name], count) for name, count in forwards.items() if count]
        ascent = self._ascent(binding, turn)
        if ascent is not None:
            # The first of the forwards of each pass is at the weights as they are.
            made += [(settings, ascent.steps or 1) for settings in binding.ascent_settings.values()]
        names = {module: name for name, module in self.model.named_modules()}
        return {
            names[module]: sum(count for settings, count in made if settings[module].update)
            for module in binding.settings["craft"]
            if any(buffer is not None for buffer in module._buffers.values())
        }

    def _ascent(self, binding: Binding, turn: Turn) -> Ascent | None:
        """Return the ascent that a step of this turn makes, with its defaults filled in."""
        return self.ascent.resolved() if self.ascent is not None and binding.climbing and turn.ascend else None

    # -- one step --------------------------------------------------------------------------------------------------

    @contextmanager
    def _scope(self, binding: Binding) -> Iterator[None]:
        """Put `requires_grad` and frozen buffers of foreign modules back after a step, also after an exception."""
        flags = [(tensor, tensor.requires_grad) for tensor in self._tensors.values()]
        # Looked up anew, since moving a model to another device puts new tensors in the place of its buffers.
        buffers = [(entry, entry.module._buffers[entry.attribute]) for entry in binding.protected]
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

    def _gradients(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None, turn: Turn, binding: Binding
    ) -> Gradients:
        y = checked_labels(x, y, shared=self.average is not None)
        log = StepLog(size=len(x))
        inputs = {"clean": x}
        if self._draws:
            # They depend on the stream of this step, and none of them moves it.
            seed_draws(self.model, self.seed, self.steps if generator is None else stream_place(generator))
        if "adversarial" in binding.passes:
            inputs["adversarial"] = self._crafting(x, y, generator, turn.eps, binding, log, self.steps)
        gradients = self._slopes(inputs, y, turn, binding, log)
        self._extra("again", x, y, binding, log)
        return Gradients(gradients, log)

    def _slopes(
        self, inputs: Mapping[str, Tensor], y: Tensor, turn: Turn, binding: Binding, log: StepLog
    ) -> dict[str, Tensor]:
        ascent = self._ascent(binding, turn)
        if ascent is None:
            return self._differentiate(inputs, y, binding, binding.shares, log)
        assert self._climbed is not None  # as the ascent is not
        limit = None if ascent.limit is None else float(ascent.limit)
        weights = {name: self._tensors[name] for name in self._climbed}
        at_rest = [True]  # the first gradient is taken at the weights as they are, where statistics are updated as ever

        def slopes() -> dict[str, Tensor]:
            ascending, at_rest[0] = not at_rest[0], False
            return self._differentiate(inputs, y, binding, binding.climbs, log, ascending=ascending, limit=limit)

        with perturbed(weights, climb(ascent, weights, self._climbed, slopes)):
            return self._differentiate(inputs, y, binding, binding.shares, log, ascending=True)

    def _differentiate(
        self,
        inputs: Mapping[str, Tensor],
        y: Tensor,
        binding: Binding,
        shares: Shares,
        log: StepLog,
        *,
        ascending: bool = False,
        limit: float | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted and masked gradients of `shares` after one forward for each pass.

        `ascending`: at perturbed weights, under the policy `ascent`. `limit`: only samples below it count.
        """
        if binding.joint:
            logits = self._forward("joint", inputs, y, binding, shares, log, ascending)
        else:
            logits = {}
            for name in binding.passes:
                logits |= self._forward(name, {name: inputs[name]}, y, binding, shares, log, ascending)
        gradients = differentiate(binding, shares, logits, y, self._tensors, log, at_rest=not ascending, limit=limit)
        found = set(gradients)
        if self.average is not None:
            wanted = {name: self._tensors[name] for parts in shares.values() for name in parts}
            gradients = self.average(gradients, wanted)
        if shares is binding.shares:
            self.reached.update(found, gradients)
        return gradients

    def _extra(self, name: str, x: Tensor, y: Tensor, binding: Binding, log: StepLog) -> None:
        """Make a forward of the clean images that only moves statistics, if the policy has it."""
        if name not in binding.extra:
            return
        settings = binding.settings[name]
        with (
            normalizing(self.model, settings, training=True, frozen=self._snapshot),
            computing(self.model, self.precision, x.device),
            torch.no_grad(),
        ):
            logits = self.model(self._layout(x))
        log.forward_passes += 1
        if name == "log":
            log.correct["log"] = (logits.argmax(1) == y).sum()

    def _forward(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        y: Tensor,
        binding: Binding,
        shares: Shares,
        log: StepLog,
        ascending: bool,
    ) -> dict[str, Tensor]:
        """Return the logits of each kind of images, of one alone or of all as one batch."""
        needed = {
            tensor
            for objective in binding.objectives
            if not inputs.keys().isdisjoint(objective.passes)
            for tensor in shares[objective.name]
        }
        for key, tensor in self._tensors.items():
            tensor.requires_grad_(key in needed)
        settings, moving = (
            (binding.ascent_settings, binding.ascent_moving) if ascending else (binding.settings, binding.moving)
        )
        x = self._layout(torch.cat(list(inputs.values())) if len(inputs) > 1 else next(iter(inputs.values())))
        with (
            normalizing(self.model, settings[name], training=True, moving=moving[name], frozen=self._snapshot),
            computing(self.model, self.precision, x.device),
        ):
            all_logits = self.model(x)
        if all_logits.dtype == torch.bfloat16:
            all_logits = all_logits.float()
        logits = dict(zip(inputs, all_logits.chunk(len(inputs)), strict=True))
        log.forward_passes += len(inputs)
        if not ascending:
            for kind, values in logits.items():
                log.correct.setdefault(kind, (values.detach().argmax(1) == y).sum())
        return logits
