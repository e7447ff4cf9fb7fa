"""Perturbed inputs to look at a model with: adversarial ones, and noise that is exactly as large."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robustlayers.analysis.activations import batches
from robustlayers.attacks import NORMS, Attack, Threat, guard, is_own, label
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation import Progress
from robustlayers.evaluation._still import check_labels, device_of, images, still
from robustlayers.normalization import crafting_forward

__all__ = ["Kind", "Rounding", "as_bytes", "craft", "noise_like"]

Kind = Literal["gaussian", "uniform"]
Rounding = Literal["round", "cast"]
_KINDS = ("gaussian", "uniform")
_ROUNDINGS = ("round", "cast")
_NEAR = 1e-4  # of a step: rounding in single precision
_HALVINGS = 60  # of the interval that holds the factor: to the rounding of a double


def craft(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    generator: torch.Generator,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> Tensor:
    """Return what an attack on `model` makes of all images, right or wrong ones, [n, ...] floats on the device of `x`.

    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n]. Crafted in evaluation mode, norm layers by running
    statistics; the model is left as it was. `progress(name of the attack, images done, images)`.

    Raises `UserError` for images outside [0, 1] and for an attack that leaves its threat.
    """
    check_labels(x, y)
    device = device_of(model, x)
    forward = crafting_forward(model) if is_own(attack) else model
    parts = []
    with torch.inference_mode(False), still(model, device):
        for batch in batches(len(x), batch_size):
            natural = images(x[batch], device)
            with guard(model):
                made = attack(forward, natural, y[batch].to(device), generator=generator).detach()
            try:
                attack.threat.check(made, natural)
            except UserError as error:
                raise UserError([fault.at(path=label(attack)) for fault in error.faults]) from None
            parts.append(made.to(x.device, natural.dtype))
            if progress is not None:
                progress(label(attack), batch.stop, len(x))
    return torch.cat(parts)


def noise_like(x: Tensor, perturbed: Tensor, kind: Kind, *, norm: str = "l2", generator: torch.Generator) -> Tensor:
    """Return noisy images that are as far from `x` as `perturbed` is, image by image, and inside [0, 1].

    z is drawn with independent pixels, `gaussian` or `uniform` in [-1, 1]; the result is clip(x + s z) with the s for
    which |clip(x + s z) - x| = |perturbed - x| in `norm` (`l2`, `linf`, `l1`), found by bisection: clipping shortens noise,
    so a factor that ignores it would make the noise smaller than what it is compared with. `x`: uint8 or floats in [0, 1];
    `perturbed`: floats of the same shape.

    Raises `UserError` for an unknown kind or norm, for shapes that differ, and where the box has no room for so much noise.

    >>> x, generator = torch.zeros(1, 1, 2, 2), torch.Generator().manual_seed(0)
    >>> noisy = noise_like(x, x + 0.1, "gaussian", generator=generator)
    >>> round(float(noisy.norm()), 5), bool((noisy >= 0).all())
    (0.2, True)
    """
    if kind not in _KINDS:
        raise UserError(one_of("kind of noise", str(kind), _KINDS))
    if norm not in NORMS:
        raise UserError(one_of("norm", str(norm), NORMS))
    if perturbed.shape != x.shape or not perturbed.is_floating_point():
        got = f"{perturbed.dtype} {list(perturbed.shape)} for {list(x.shape)}"
        raise UserError(f"perturbed images are floats of the same shape as the images; got {got}")
    natural = images(x, x.device)
    size = Threat(norm, 1).size
    target = size(perturbed.to(natural.device) - natural)
    device = generator.device
    if kind == "gaussian":
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=natural.dtype)
    else:
        noise = torch.rand(x.shape, generator=generator, device=device, dtype=natural.dtype).mul_(2).sub_(1)
    noise = noise.to(natural.device)

    def noisy(factor: Tensor) -> Tensor:
        return (natural + factor.view(-1, *[1] * (x.ndim - 1)) * noise).clamp(0, 1)

    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(_HALVINGS):
        short = size(noisy(high) - natural) < target
        if not bool(short.any()):
            break
        high = torch.where(short, 2 * high, high)
    else:
        raise UserError(f"the box [0, 1] has no room for {kind} noise of the same {norm} norm")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        short = size(noisy(middle) - natural) < target
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return noisy(high)


def as_bytes(x: Tensor, how: Rounding = "round") -> Tensor:
    """Return floats as an image file would hold them: multiples of 1/255 in [0, 1], of the same shape and dtype.

    `round`: clipped to [0, 1] and rounded to the nearest. `cast`: what `(255 * x).astype(numpy.uint8)` does, which some
    published code does with perturbed images: cut off, not rounded, and what leaves the box comes back at its other end,
    so that 256 is 0 and -1 is 255. An image of bytes keeps its values under both; a perturbation of less than half a
    step is lost under `round`, and `cast` takes up to a whole step from any.

    Raises `UserError` for an unknown way, and for values that are no finite floats.

    >>> x = torch.tensor([-1.0, 99.7, 256.0]) / 255
    >>> (255 * as_bytes(x)).round().tolist(), (255 * as_bytes(x, "cast")).round().tolist()
    ([0.0, 100.0, 255.0], [255.0, 99.0, 0.0])
    """
    if how not in _ROUNDINGS:
        raise UserError(one_of("way to make bytes", str(how), _ROUNDINGS))
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise UserError(f"only finite floats can be turned into bytes; got {x.dtype}")
    steps = 255 * x.double()
    if how == "round":
        return (steps.round().clamp(0, 255) / 255).to(x.dtype)
    # A byte divided by 255 in single precision comes back a little under its number: it is meant to be that number.
    near = steps.round()
    steps = torch.where((steps - near).abs() < _NEAR, near, steps)
    return (steps.trunc().remainder(256) / 255).to(x.dtype)
