"""Threat models: which perturbations count, as a norm, a radius in pixel units, and the box [0, 1] of valid images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustlayers.attacks import _l1
from robustlayers.attacks._draws import Generators, normal, uniform
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number, pixels_text

__all__ = ["L1", "L2", "NORMS", "Linf", "Threat"]

NORMS = ("linf", "l2", "l1")

_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}

_TOLERANCE = 1e-6


@dataclass(frozen=True, init=False, repr=False)
class Threat:
    """The set of images x' with |x' - x| <= eps in the norm and 0 <= x' <= 1, for every image x of a batch.

    `norm` is `linf` (largest change of a pixel), `l2` (Euclidean, over all pixels and channels of an image) or `l1`
    (sum of the changes); `eps` is in pixel units of [0, 1] and may be written `8/255`. Methods take batches [n, ...] of
    images in [0, 1], float32 or float64.

    Raises `UserError` for an unknown norm and for an eps that is negative or not finite.

    >>> Threat("linf", "8/255")
    Linf(8/255)
    >>> Linf("8/255") == Threat("linf", 8 / 255)
    True
    """

    norm: Literal["linf", "l2", "l1"]
    eps: float

    def __init__(self, norm: str, eps: float | int | str) -> None:
        if norm not in NORMS:
            raise UserError(one_of("norm of a threat", str(norm), NORMS))
        radius = number(eps, "eps")
        if radius < 0:
            raise UserError(f"eps: {eps} is negative; allowed: 0 or more, in pixel units of [0, 1]")
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps", radius)

    def __repr__(self) -> str:
        return f"{_NAMES[self.norm]}({pixels_text(self.eps)})"

    def __str__(self) -> str:
        return f"{self.norm} {pixels_text(self.eps)}"

    def size(self, delta: Tensor) -> Tensor:
        """Return the norm of each perturbation: [n, ...] -> [n].

        >>> L2(1).size(torch.tensor([[3.0, 4.0]])), Linf(1).size(torch.tensor([[3.0, -4.0]]))
        (tensor([5.]), tensor([4.]))
        """
        axes = tuple(range(1, delta.ndim))
        if self.norm == "linf":
            return delta.abs().amax(axes)
        if self.norm == "l1":
            return delta.abs().sum(axes)
        return torch.linalg.vector_norm(delta, dim=axes)

    def projector(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the projection around `x`; what depends on `x` alone is computed once, for use in a loop."""
        if self.norm == "linf":
            low, high = (x - self.eps).clamp_(0, 1), (x + self.eps).clamp_(0, 1)
            return lambda x_adv: torch.clamp(x_adv, low, high)
        if self.norm == "l1":
            return lambda x_adv: _l1.project(x_adv, x, self.eps)

        def ball_then_box(x_adv: Tensor) -> Tensor:
            delta = x_adv - x
            size = _spread(self.size(delta), delta)
            # x is in the box, so clamping moves every pixel towards x and never leaves the ball again.
            return (x + delta * (self.eps / size.clamp_min(_tiny(x))).clamp_max(1)).clamp_(0, 1)

        return ball_then_box

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return `x_adv` moved into the ball around `x`, then into the box.

        For linf and l1 this is the nearest point of both, exact (l1: Croce & Hein 2021, "Mind the box"); for l2 a
        point of both: the ball's projection, clamped.

        >>> Linf(0.25).project(torch.tensor([[1.5, 0.4]]), torch.tensor([[0.9, 0.5]]))
        tensor([[1.0000, 0.4000]])
        """
        return self.projector(x)(x_adv)

    def random_start(self, x: Tensor, generator: Generators) -> Tensor:
        """Return a point drawn uniformly from the ball around each image, clamped to the box (l1: projected).

        linf: every pixel uniform in [-eps, eps]; l2: a Gaussian direction times eps u^(1/d), u uniform in [0, 1], d
        the number of pixels; l1: exponential lengths with random signs, divided by their sum. `generator` is one for
        the batch, or a sequence with one for each image. The draws depend on it and on the shape and dtype of `x`, not
        on the memory format, nor on the device of `x`: they are made on the generator's.
        """
        if not len(x):
            return x.clone()
        if self.norm == "linf":
            delta = uniform(x.shape, generator, x.dtype).mul_(2 * self.eps).sub_(self.eps)
        elif self.norm == "l1":
            delta = _l1.draw(x, self.eps, generator)
        else:
            delta = normal(x.shape, generator, x.dtype)
            radius = uniform((len(x),), generator, x.dtype).pow_(1 / max(1, math.prod(x.shape[1:]))).mul_(self.eps)
            delta *= _spread(radius / self.size(delta).clamp_min(_tiny(delta)), delta)
        return self.project(x + delta.to(x.device), x)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """Return `x_adv` after a step of length `step_size` in the direction of steepest ascent for the norm.

        linf: the sign of the gradient; l2: the gradient divided by its norm; l1: the pixels of the largest gradient go
        to the end of the box one after the other until the length is spent. A zero gradient moves nothing, and an entry
        that is not a number counts as zero. `step_size` is a number or one per image, of shape [n, 1, ...]. Nothing is
        projected.
        """
        if self.norm == "linf":
            return x_adv + step_size * torch.sign(gradient)  # torch's sign of NaN is 0
        if self.norm == "l1":
            return _l1.steepest(x_adv, gradient, step_size)
        # A confident network's gradient may be 1e-30: scaled by its largest entry first, its square does not vanish.
        gradient = gradient.nan_to_num(nan=0.0)
        axes = tuple(range(1, gradient.ndim))
        gradient = gradient / gradient.abs().amax(axes, keepdim=True).clamp_min(_tiny(gradient))
        return x_adv + step_size * gradient / _spread(self.size(gradient), gradient).clamp_min(_tiny(gradient))

    def check(self, x_adv: Tensor, x: Tensor) -> None:
        """Raise `UserError` if any image of `x_adv` is outside the ball around `x` or the box by more than 1e-6.

        In l1, where the rounding of every pixel adds up, by more than that and 2^-25 for each pixel.
        """
        if x_adv.shape != x.shape:
            raise UserError(f"the attack returned shape {list(x_adv.shape)} for images of shape {list(x.shape)}")
        if not x_adv.is_floating_point():
            raise UserError(f"the attack returned {x_adv.dtype}; adversarial images must stay floating point")
        if x.numel() == 0:
            return
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        size = self.size(x_adv.to(wide) - x.to(wide)).amax()
        size, low, high = torch.stack([size, x_adv.amin().to(wide), x_adv.amax().to(wide)]).tolist()
        rounding = x[0].numel() * 2.0**-25 if self.norm == "l1" else 0.0  # a float32 in [0.5, 1] is so far off at most
        if not size <= self.eps + _TOLERANCE * max(1.0, self.eps) + rounding:  # also true for NaN
            raise UserError(f"the attack left the ball {self!r}: {self.norm} distance {size:.6g} > {self.eps:.6g}")
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise UserError(f"the attack left the box [0, 1]: pixel values from {low:.6g} to {high:.6g}")


def Linf(eps: float | int | str) -> Threat:
    """Return the threat in which every pixel may change by at most `eps`, e.g. `Linf("8/255")`.

    Raises `UserError` for an eps above 1 too, the width of the box: that is one in units of 1/255.
    """
    if number(eps, "eps") > 1:
        raise UserError(f"eps: {eps} is not allowed; allowed: at most 1, in pixel units of [0, 1]; write 8/255")
    return Threat("linf", eps)


def L2(eps: float | int | str) -> Threat:
    """Return the threat in which an image may change by at most `eps` in Euclidean norm, e.g. `L2(0.5)`."""
    return Threat("l2", eps)


def L1(eps: float | int | str) -> Threat:
    """Return the threat in which the changes of an image's pixels may add up to at most `eps`, e.g. `L1(12)`."""
    return Threat("l1", eps)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per image, [n], to [n, 1, ...] for use with a batch."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
