"""Multirate training: some groups are updated on every k-th step only, with the linear drift between if asked for.

multirate = Multirate(optimizer, settings)
for step, (x, y) in enumerate(batches):
    gradients of the groups in multirate.due(step)     # the rest costs no backward
    multirate.step(step)                               # in the place of optimizer.step()

Vlaar and Leimkuhler, "Multirate training of neural networks", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of
from robustlayers.training.optimizers import OptimizerSettings

__all__ = ["Multirate", "due"]

_SLOT = "/drift"


def due(settings: OptimizerSettings, step: int, groups: Iterable[str]) -> frozenset[str]:
    """Return those of the `groups` that are updated on step `step` (from 0): the steps that their `every` divides.

    >>> from robustlayers.training.optimizers import GroupSettings
    >>> settings = OptimizerSettings(groups={"slow": GroupSettings(every=3)})
    >>> [sorted(due(settings, step, ["slow", "fast"])) for step in (0, 1, 2, 3)]
    [['fast', 'slow'], ['fast'], ['fast'], ['fast', 'slow']]
    """
    return frozenset(group for group in groups if step % _period(settings, group) == 0)


class Multirate:
    """Steps of any torch optimizer in which each group has its own period k (`every`).

    On a due step, step % k = 0, a group moves as the optimizer moves it. On the others it stays bit-equal, and so do its
    momenta: its parameters have no gradient while the optimizer steps, which neither momentum nor weight decay gets past.

    With `drift`, the change d that the optimizer makes on the due step is taken in k equal parts: theta += d / k on the
    due step and on each of the k - 1 steps after it. This is Algorithm 1 of the paper, where the slow group's rate is h
    and the fast group's h / k: give the slow group a `scale` of k to have the same. A phase that ends between two due
    steps leaves out the parts to come.

    Args:
        optimizer: of any kind; its parameter groups have `group` and `names`, as from `build_optimizer`. One without
            these keys is updated on every step.
        settings: `every` and `drift` by group.
        groups: all groups that learn; those of the optimizer unless given. A group of which every tensor is divided
            with an earlier one has no parameter group of its own, so give the names where that can be.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: OptimizerSettings, groups: Iterable[str] | None = None
    ) -> None:
        self.optimizer, self.settings = optimizer, settings
        held = (group["group"] for group in optimizer.param_groups if "group" in group)
        self.groups = tuple(dict.fromkeys(held if groups is None else groups))
        self._parts: dict[str, Tensor] = {}  # of each step to the next due one

    def due(self, step: int) -> frozenset[str]:
        """Return the groups that are updated on step `step`, counted from 0 at the start of the phase."""
        return due(self.settings, step, self.groups)

    @torch.no_grad()
    def step(self, step: int, still: Collection[str] = ()) -> None:
        """Update the parameters by their `grad` as step `step`; gradients of groups that are not due are left out.

        `still` are the names of tensors that no longer learn: the parts of a drift to come are left out too.
        """
        resting: list[tuple[Tensor, Tensor | None]] = []
        for group in self.optimizer.param_groups:
            if "group" in group and step % _period(self.settings, group["group"]):
                resting += [(parameter, parameter.grad) for parameter in group["params"]]
        before: dict[str, Tensor] = {}
        for name, parameter, every in self._drifting():
            if step % every == 0 or name in still:
                self._parts.pop(name, None)
                if parameter.grad is not None:
                    before[name] = parameter.clone()
        try:
            for parameter, _ in resting:
                parameter.grad = None
            self.optimizer.step()
        finally:
            for parameter, gradient in resting:
                parameter.grad = gradient
        for name, parameter, every in self._drifting():
            if name in before:
                self._parts[name] = (parameter - before[name]) / every
                parameter.copy_(before[name])
            if name in self._parts:
                parameter.add_(self._parts[name])

    def state(self) -> dict[str, Tensor]:
        """Return what a resume between two due steps needs: `{parameter name/drift: part of each step}`."""
        return {f"{name}{_SLOT}": part.clone() for name, part in self._parts.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state from `state` back, bit for bit; one that is not of these parameters raises `UserError`."""
        drifting = {name: parameter for name, parameter, _ in self._drifting()}
        parts = {}
        for key, tensor in tensors.items():
            name = key.removesuffix(_SLOT)
            if name == key or name not in drifting:
                raise UserError(one_of("drift", key, [f"{name}{_SLOT}" for name in drifting]))
            if tensor.shape != drifting[name].shape:
                raise UserError(f"drift of {name} is {list(tensor.shape)}, the model has {list(drifting[name].shape)}")
            parts[name] = tensor.to(drifting[name].device, drifting[name].dtype, copy=True)
        self._parts = parts

    def _drifting(self) -> Iterator[tuple[str, Tensor, int]]:
        for group in self.optimizer.param_groups:
            if "group" in group and self.settings.of(group["group"]).drift:
                every = _period(self.settings, group["group"])
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    yield name, parameter, every


def _period(settings: OptimizerSettings, group: str) -> int:
    own = settings.groups.get(group)
    return 1 if own is None or own.every is None else own.every
