"""Signs that a robust accuracy means less than it says: each flag is a short text, and an honest model raises none.

A flag proves nothing by itself. It says that gradient attacks or the evaluation itself may be misled (Athalye et al.
2018, section 3.1; Carlini et al. 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlayers.attacks import PGD, Noise, Threat, is_correct
from robustlayers.core.random import stream
from robustlayers.evaluation._still import Forward, check_labels, device_of, images, still

__all__ = ["attack_strength", "batch_dependence", "batch_statistics", "flags", "random_output", "zero_gradients"]

_SAME = 1e-5  # two equal forwards, relative to the largest logit: above the noise of a device's order of summation
_ALONE = 1e-2  # the same images in another batch: other kernels, possibly of lower precision


def flags(model: Forward, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """Return the texts of all flags that `model` raises on a batch of images; an empty list for an honest model.

    `model`: an `nn.Module`, or a function from images to logits; `x`: one batch of some hundred images [n, c, h, w],
    uint8 or floats in [0, 1]; `y`: integer labels [n]. The model is left without a trace. Cost: 28 forward and 11
    backward passes for each image. A model with random outputs, or without a gradient, is not tested for what follows
    from that.
    """
    check_labels(x, y)
    found = batch_statistics(model) if isinstance(model, nn.Module) else []
    randomness = random_output(model, x)
    found += randomness
    if not randomness:
        found += batch_dependence(model, x)
    gradients = zero_gradients(model, x, y)
    found += gradients
    if not any(text.startswith("no gradient") for text in gradients):
        found += attack_strength(model, x, y, threat)
    return found


def batch_statistics(model: nn.Module) -> list[str]:
    """Flag batch norm layers without running statistics: they normalize by the batch in evaluation mode too.

    >>> batch_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)))
    ['batch statistics: no running statistics in 1 norm layer (1): normalized by the batch at evaluation too']
    """
    names = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.running_mean is None or module.running_var is None)
    ]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    layers = f"{len(names)} norm layer{'s' if len(names) > 1 else ''} ({shown})"
    return [f"batch statistics: no running statistics in {layers}: normalized by the batch at evaluation too"]


def random_output(model: Forward, x: Tensor) -> list[str]:
    """Flag outputs that differ between two forwards of the same images: one verdict is then a matter of luck."""
    device = device_of(model, x)
    with still(model, device), torch.no_grad():
        batch = images(x, device)
        first, second = model(batch), model(batch)
    share = _difference(first, second)
    if share <= _SAME:
        return []
    return [f"random output: logits of the same images differ by {share:.1%} of the largest between two forwards"]


def batch_dependence(model: Forward, x: Tensor) -> list[str]:
    """Flag outputs that depend on the other images of the batch: an attack on one image moves the others' predictions.

    The logits of the first two images are compared alone and among all; fewer than four images are not tested.
    """
    if len(x) < 4:
        return []
    device = device_of(model, x)
    with still(model, device), torch.no_grad():
        batch = images(x, device)
        share = _difference(model(batch)[:2], model(batch[:2]))
    if share <= _ALONE:
        return []
    return [f"batch dependence: logits of an image change by {share:.1%} of the largest with the images beside it"]


def zero_gradients(model: Forward, x: Tensor, y: Tensor) -> list[str]:
    """Flag images that are right and whose gradient of the cross-entropy is zero, or not finite: attacks see nothing.

    A forward that autograd cannot differentiate at all is flagged as `no gradient`.
    """
    device = device_of(model, x)
    with still(model, device), torch.inference_mode(False), torch.enable_grad():
        batch, labels = images(x, device).clone().requires_grad_(), y.to(device).long().clone()
        logits = model(batch)
        if not logits.requires_grad:
            return ["no gradient: the forward cannot be differentiated for its input, so gradient attacks cannot run"]
        (slope,) = torch.autograd.grad(F.cross_entropy(logits.float(), labels, reduction="sum"), batch)
    slope = slope.flatten(1)
    blind = ((slope == 0).all(1) | ~slope.isfinite().all(1)) & is_correct(logits, labels)
    count = int(blind.sum())
    if not count:
        return []
    share = f"{count} of {len(x)} images ({count / len(x):.0%})"
    return [f"zero gradient: the gradient of the cross-entropy is zero or not finite for {share} that are right"]


def attack_strength(model: Forward, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """Flag a PGD-10 that is weaker than it can be: accuracy above the clean one, or above that under uniform noise.

    What PGD returns is taken as it is, without counting images that are wrong clean. The noise is the worst of ten
    draws.
    """
    device = device_of(model, x)
    with still(model, device):
        batch, labels = images(x, device), y.to(device).long()

        def right(inputs: Tensor) -> int:
            with torch.no_grad():
                return int(is_correct(model(inputs), labels).sum())

        clean = right(batch)
        robust = right(PGD(threat, steps=10)(model, batch, labels, generator=stream(0, "flags", "pgd")))
        noisy = right(Noise(threat, draws=10)(model, batch, labels, generator=stream(0, "flags", "noise")))
    found = []
    if robust > clean:
        found.append(f"robust above clean: {robust} of {len(x)} images right under pgd-10, {clean} without an attack")
    if robust > noisy:
        found.append(f"weaker than noise: {robust} of {len(x)} images right under pgd-10, {noisy} under uniform noise")
    return found


def _difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinite where one is not finite."""
    scale = first.abs().max().clamp_min(torch.finfo(first.dtype).tiny)
    share = float((first - second).abs().max() / scale)
    return share if share == share else float("inf")
