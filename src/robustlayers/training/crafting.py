"""Crafting inside a step: the attack on the model under the policy of that pass, which leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks.guard import guard
from robustlayers.attacks.registry import is_own
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.normalization.context import normalizing
from robustlayers.normalization.fold import CraftingForward, crafting_forward
from robustlayers.normalization.precision import PRECISIONS, Choice
from robustlayers.training.binding import Binding
from robustlayers.training.tally import StepLog

__all__ = ["Attack", "Crafting", "scaled"]

Attack = Callable[..., Tensor]
"""`attack(forward, x, y, *, generator) -> x_adv`"""


class Crafting:
    """An attack on one model as a step makes it: folded where nothing but the images can tell, guarded in any case.

    `precision` is that of `crafting_forward`, and `choice` what `auto` stands for; `layout` lays images out for a model
    that runs as it is; `frozen` are the statistics of norm layers with that setting.

    Raises `UserError` for a precision that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Attack | None,
        *,
        precision: str,
        seed: int,
        layout: Callable[[Tensor], Tensor],
        frozen: Mapping[nn.Module, Any],
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(one_of("crafting", precision, PRECISIONS))
        self.model, self.attack, self.precision, self.seed = model, attack, precision, seed
        self._layout, self._frozen = layout, frozen
        self._folded: CraftingForward | None = None
        self._choice: Choice | None = None

    @property
    def choice(self) -> Choice | None:
        """What `auto` stands for, once a batch was crafted; set it before to have it so, as in a resume."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice | None) -> None:
        self._choice, self._folded = choice, None

    def passes(self, binding: Binding) -> tuple[int, int]:
        """Return (forward, backward) passes of one batch, that of scoring included."""
        forward = getattr(self.attack, "forward_passes", 0) + self.scores(binding)
        return forward, getattr(self.attack, "backward_passes", 0)

    def scores(self, binding: Binding) -> bool:
        """Tell whether what was crafted is scored by a forward more: an attack that compares iterates has made it."""
        return "score" in binding.extra and is_own(self.attack) and getattr(self.attack, "keep", None) == "last"

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None,
        eps: float,
        binding: Binding,
        log: StepLog,
        step: int,
    ) -> Tensor:
        """Return adversarial images; `eps` is a factor of the attack's eps and step size. Passes are counted in `log`.

        Without a generator, draws are those of step number `step` of the seed.
        """
        attack = self.attack
        assert attack is not None  # the step has seen to it
        if eps == 0:
            return x
        if eps != 1:
            attack = scaled(attack, eps)
        if generator is None:
            generator = stream(self.seed, "attack", step, device=x.device)
        settings = binding.settings["craft"]
        own = is_own(attack)
        forward: Callable[[Tensor], Tensor] = self._laid_out if own else self.model
        if own and all(setting.still for setting in settings.values()):
            forward = self._fold(x)
        with guard(self.model, keep_statistics=binding.crafting_updates), _kept(binding):
            # An attack of somebody else may call train() or eval(): the norm layers do as they were told all the same.
            with normalizing(self.model, settings, training=False, frozen=self._frozen, strict=not own):
                x_adv = attack(forward, x, y, generator=generator).detach()
            if self.scores(binding):
                with (
                    normalizing(self.model, binding.settings["score"], training=False, frozen=self._frozen),
                    torch.no_grad(),
                ):
                    self._laid_out(x_adv)
        forward_passes, backward_passes = self.passes(binding)
        log.forward_passes += forward_passes
        log.backward_passes += backward_passes
        return x_adv

    def _laid_out(self, x: Tensor) -> Tensor:
        return self.model(self._layout(x))

    def _fold(self, x: Tensor) -> CraftingForward:
        """Return the same function of x with norm layers folded away, at a fraction of the cost.

        A layer with branches runs as it is, so that the branch that crafts, which the policy chooses, is the one attacked.
        """
        if self._folded is None:
            self._folded = crafting_forward(self.model, precision=self.precision)
            if self.precision == "auto":
                self._choice = self._folded.settle(x, self._choice)
        self._folded.refresh()
        return self._folded


@contextmanager
def _kept(binding: Binding) -> Iterator[None]:
    """Put back what crafting did to the statistics of layers that it may not move, while it moves others'."""
    modules = binding.still if binding.crafting_updates else []
    before = [(module, dict(module._buffers)) for module in modules]
    values = [{name: t.detach().clone() for name, t in own.items() if t is not None} for _, own in before]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, buffers), copies in zip(before, values, strict=True):
                module._buffers.update(buffers)
                for name, value in copies.items():
                    module.get_buffer(name).copy_(value)


def scaled(attack: Any, factor: float) -> Any:
    """Return one of our attacks with its eps and its step size multiplied by a factor above 0."""
    if not is_own(attack):
        raise UserError(f"{type(attack).__name__} is no attack of ours: its eps cannot follow a schedule")
    changes: dict[str, Any] = {"threat": replace(attack.threat, eps=attack.threat.eps * factor)}
    if getattr(attack, "step_size", None) is not None:
        changes["step_size"] = attack.step_size * factor
    return replace(attack, **changes)
