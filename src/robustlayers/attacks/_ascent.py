"""What all attacks share: the protocol, the check of their input, the gradient for the input, the best point so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from robustlayers.attacks.losses import is_correct
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream

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


def usable(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep: a copy of one that was made under `inference_mode`."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def own_generator(x: Tensor, generator: torch.Generator | None) -> torch.Generator:
    """Return `generator`, or a fresh one that is the same on every call."""
    return stream(0, "attack", device=x.device) if generator is None else generator


def gradient(forward: Forward, x_adv: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [n, classes], losses [n] and the gradient of each image's loss for that image, like `x_adv`.

    No gradient is computed for the model's parameters. Raises `UserError` where autograd sees no path to the input.
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = forward(x_adv)
    losses = objective(logits)
    if not losses.requires_grad:
        raise UserError("the forward's output has no gradient for its input; gradient attacks need one")
    (slope,) = torch.autograd.grad(losses.sum(), x_adv)
    return logits.detach(), losses.detach(), slope


def score(forward: Forward, x_adv: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return logits and losses without a gradient."""
    with torch.no_grad():
        logits = forward(x_adv)
        return logits, objective(logits)


class Best:
    """The best point of each image so far: one that is misclassified before one that is not, then the higher loss."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x = x
        self._y = y
        self._wrong: Tensor | None = None
        self._losses: Tensor | None = None

    def update(self, x_adv: Tensor, logits: Tensor, losses: Tensor) -> None:
        """Keep those images of `x_adv` that beat the best so far; equals do not."""
        wrong = ~is_correct(logits, self._y)
        if self._wrong is None or self._losses is None:
            self.x, self._wrong, self._losses = x_adv, wrong, losses
            return
        better = (wrong & ~self._wrong) | ((wrong == self._wrong) & (losses > self._losses))
        self.x = select(better, x_adv, self.x)
        self._wrong = self._wrong | wrong
        self._losses = torch.where(better, losses, self._losses)


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
