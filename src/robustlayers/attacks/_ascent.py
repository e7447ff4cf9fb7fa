"""What all attacks share: the protocols, the check of their input, the gradient for it, the best point so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from robustlayers.attacks._draws import Generators
from robustlayers.attacks._goal import Goal
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number

Forward = Callable[[Tensor], Tensor]
"""Images [n, ...] in [0, 1] -> logits [n, classes]."""

Objective = Callable[[Tensor], Tensor]
"""Logits [n, classes] -> one loss per image [n], higher is worse for the defender."""


class Attack(Protocol):
    """A pure function from images to adversarial images: same shape and dtype, inside ball and box of `threat`."""

    @property
    def threat(self) -> Threat:
        """The perturbations the attack may use."""
        ...

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return adversarial images for `x` with labels `y`; all randomness comes from `generator`."""
        ...


class NamedAttack(Attack, Protocol):
    """What our own attacks know about themselves, besides: cost, a line of description, and what decides them."""

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most."""
        ...

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        ...

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data; options that came later only where they are used."""
        ...

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images; `generator` may also be a sequence with one generator for each image."""
        ...


@contextmanager
def differentiating() -> Iterator[None]:
    """Make autograd record, also where the caller has switched it off by `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def prepare(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check a batch and return it detached, the labels as int64; one synchronization with the device.

    Raises `UserError` unless `x` is float32 or float64, [n, ...], inside [0, 1], and `y` holds n integers.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"attacks take float32 or float64 images in [0, 1]; got {x.dtype}")
    if x.ndim < 2:
        raise UserError(f"attacks take a batch of images [n, ...]; got shape {list(x.shape)}")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"attacks take one integer label per image; got {y.dtype} {list(y.shape)} for {len(x)} images")
    x, y = x.detach(), y.detach().long()
    if x.numel():
        low, high = torch.aminmax(x)
        if not bool((low >= 0) & (high <= 1)):  # also for NaN
            raise UserError(
                f"attacks take images in [0, 1], got values from {low.item():.4g} to {high.item():.4g}; "
                "normalization by mean and standard deviation belongs inside the model"
            )
    return usable(x), usable(y)


def step_length(value: float | int | str, threat: Threat) -> float:
    """Return the length of a step as a number in pixel units of [0, 1].

    Raises `UserError` unless it is more than 0, and in linf for one above 1, the width of the box.
    """
    step = number(value, "step_size")
    if step <= 0:
        raise UserError(f"step_size: {value} is not allowed; allowed: more than 0, in pixel units")
    if threat.norm == "linf" and step > 1:
        raise UserError(f"step_size: {value} is not allowed; allowed: at most 1, in pixel units of [0, 1]; write 2/255")
    return step


def usable(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep: a copy of one that was made under `inference_mode`."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def gradient(forward: Forward, x_adv: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [n, classes], losses [n] and the gradient of each image's loss for that image, like `x_adv`.

    No gradient is computed for the model's parameters. Raises `UserError` where autograd sees no path to the input.
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = forward(x_adv)
    losses = objective(logits)
    # The model's parameters may want gradients where its input has been cut off from its output.
    slope = torch.autograd.grad(losses.sum(), x_adv, allow_unused=True)[0] if losses.requires_grad else None
    if slope is None:
        raise UserError("the forward's output has no gradient for its input; gradient attacks need one")
    return logits.detach(), losses.detach(), slope


def score(forward: Forward, x_adv: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return logits and losses without a gradient."""
    with torch.no_grad():
        logits = forward(x_adv)
        return logits, objective(logits)


class Best:
    """The best point of each image so far: one that is broken before one that is not, then the higher loss.

    With `stop`, the first point stays that has broken an image clearly, beyond rounding: what comes later does not
    count, so that a result does not depend on when the image was taken out of the batch.
    """

    def __init__(self, x: Tensor, *, stop: bool = False) -> None:
        self.x = x
        self._stop = stop
        self._rank: Tensor | None = None  # 0 holds, 1 broken, 2 done with
        self._losses: Tensor | None = None
        self._own = False

    def update(self, goal: Goal, x_adv: Tensor, logits: Tensor, losses: Tensor, rows: Tensor | None = None) -> None:
        """Keep those images of `x_adv` that beat the best so far; equals do not. `rows` says which images these are."""
        rank = goal.broken(logits).to(torch.int8)
        if self._stop:
            rank = rank + goal.settled(logits)
        if self._rank is None or self._losses is None:
            self.x, self._rank, self._losses = x_adv, rank, losses
            return
        x_then, rank_then, losses_then = self.x, self._rank, self._losses
        if rows is not None:
            x_then, rank_then, losses_then = x_then[rows], rank_then[rows], losses_then[rows]
        better = (rank > rank_then) | ((rank == rank_then) & (losses > losses_then) & (rank_then < 2))
        x_now, rank_now = select(better, x_adv, x_then), torch.maximum(rank, rank_then)
        losses_now = torch.where(better, losses, losses_then)
        if rows is None:
            self.x, self._rank, self._losses, self._own = x_now, rank_now, losses_now, True
            return
        if not self._own:  # what was given may be an iterate that goes on
            self.x, self._rank, self._losses = self.x.clone(), self._rank.clone(), self._losses.clone()
            self._own = True
        self.x[rows], self._rank[rows], self._losses[rows] = x_now, rank_now, losses_now

    def standing(self) -> Tensor:
        """Return the places of the images that are not done with; this waits for the device."""
        if self._rank is None:
            return torch.arange(len(self.x), device=self.x.device)
        return (self._rank < 2).nonzero().squeeze(1)

    def compact(self, rows: Tensor) -> Tensor | None:
        """Return which of the images at `rows` to go on with, or None for all; this waits for the device.

        They are fewer only where an eighth is done with: a batch of another size costs a model something, too.
        """
        if self._rank is None:
            return None
        standing = (self._rank[rows] < 2).nonzero().squeeze(1)
        return None if len(standing) > 7 * len(rows) // 8 else standing


def select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Take whole images by a mask [n]."""
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def count(name: str, value: object, least: int) -> None:
    """Raise `UserError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: {value!r} is not allowed; allowed: a whole number, {least} or more")


def flag(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name}: {value!r} is not allowed; allowed: true, false")
