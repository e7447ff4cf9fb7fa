"""Signs that a robust accuracy means less than it says: each flag is a short text, and an honest model raises none.

A flag proves nothing by itself. It says that gradient attacks or the evaluation itself may be misled (Athalye et al.
2018, section 3.1; Carlini et al. 2019). A text begins with the flag's name; `MEANINGS` has a sentence for each name.
Some functions look at a model, the others at results of attacks; `flags` runs the cheap ones, `sanity` all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustlayers.attacks import FGSM, PGD, Noise, Threat, is_correct
from robustlayers.attacks.losses import margin
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import pixels_text
from robustlayers.core.random import stream
from robustlayers.evaluation._still import Forward, check_labels, device_of, images, still

__all__ = [
    "MEANINGS",
    "attack_strength",
    "batch_dependence",
    "batch_statistics",
    "beyond_final",
    "black_box",
    "collapse",
    "flags",
    "huge_eps",
    "larger_eps",
    "meaning",
    "more_steps",
    "random_output",
    "saturated_logits",
    "single_step",
    "zero_gradients",
]

MEANINGS: Mapping[str, str] = {
    "batch statistics": "Predictions depend on the batch that an image is measured in, so the accuracy is of batches, "
    "not of images.",
    "random output": "The model answers the same image differently each time, so one try under- or overstates it, and "
    "attacks have to average over its draws.",
    "batch dependence": "An image's prediction changes with the images beside it, so an attack on one moves the others.",
    "no gradient": "Gradient attacks cannot run, so only black-box attacks say anything about this model.",
    "zero gradient": "Gradient attacks see nothing on these images, so that they stand is no evidence of robustness.",
    "saturated logits": "The outputs are so far apart or so flat that gradients vanish in rounding, and attacks on the "
    "cross-entropy with them.",
    "robust above clean": "The attack makes images easier than they were, so it does not attack.",
    "weaker than noise": "Random noise breaks more images than the gradient attack, so the gradient misleads.",
    "weaker than one step": "One step breaks more images than ten, so the gradient misleads the longer attack.",
    "black box": "A search without gradients breaks images that gradient attacks do not, so the gradient is masked.",
    "more steps": "More steps of an attack do not lower the accuracy, so its gradient does not lead anywhere.",
    "larger eps": "A larger ball does not lower the accuracy, though it holds the smaller one, so the attack is weak.",
    "huge eps": "Images survive in a ball that holds plain gray, where nothing can be recognized, so the attack fails.",
    "beyond the final attack": "Another attack breaks more images than the one whose number is reported.",
    "single step": "Accuracy under one step is far above that under many: catastrophic overfitting to the single step.",
    "collapse": "Robust accuracy broke down from one epoch to the next and clean accuracy did not, as in catastrophic "
    "overfitting: the net has learned to mislead its training attack.",
}
"""What each flag means, by its name."""

_SAME = 1e-5  # two equal forwards, relative to the largest logit: above the noise of a device's order of summation
_SHARE = 0.1  # of outputs or images
_NATS = 40
_ALONE = 1e-2  # the same images in another batch: other kernels, possibly of lower precision


def flags(model: Forward, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """Return the texts of all flags that `model` raises on a batch of images; an empty list for an honest model.

    `model`: an `nn.Module`, or a function from images to logits; `x`: one batch of some hundred images [n, c, h, w],
    uint8 or floats in [0, 1]; `y`: integer labels [n]. The model is left without a trace. Cost: 31 forward and 12
    backward passes for each image. A model with random outputs, or without a gradient, is not tested for what follows
    from that.
    """
    check_labels(x, y)
    found = batch_statistics(model) if isinstance(model, nn.Module) else []
    randomness = random_output(model, x)
    found += randomness
    if not randomness:
        found += batch_dependence(model, x)
    found += saturated_logits(model, x, y)
    gradients = zero_gradients(model, x, y)
    found += gradients
    if not any(text.startswith("no gradient") for text in gradients):
        found += attack_strength(model, x, y, threat)
    return found


def meaning(text: str) -> str:
    """Return what a flag means, from its text or its name; one that is not known is a `UserError`.

    >>> meaning("robust above clean: 9 of 10 images right under pgd-10, 8 without an attack")
    'The attack makes images easier than they were, so it does not attack.'
    """
    name = text.partition(":")[0]
    if name not in MEANINGS:
        raise UserError(f"no flag is called {name!r}")
    return MEANINGS[name]


# -- signs in the model --------------------------------------------------------------------------------------------


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


def saturated_logits(model: Forward, x: Tensor, y: Tensor) -> list[str]:
    """Flag outputs that are no use as logits to an attack: probabilities, at a bound, or far too far apart.

    Probabilities: no output is negative and each image's sum to 1. At a bound: a tenth of all outputs are the batch's
    largest or smallest (within 1e-6 of their range). Too far apart: for a tenth of the images that are right, the label
    leads by more than 40 nats, so that the cross-entropy and a half of its gradient are zero in float32 (Carlini &
    Wagner 2016, against defensive distillation).
    """
    device = device_of(model, x)
    with still(model, device), torch.no_grad():
        labels = y.to(device).long()
        logits = model(images(x, device))
        right = is_correct(logits, labels)
        logits = logits.float()
    if not bool(logits.isfinite().all()):
        return [f"saturated logits: {int((~logits.isfinite()).any(1).sum())} of {len(x)} images have infinite ones"]
    found = []
    sums = logits.sum(1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        found.append("saturated logits: the outputs are probabilities, not logits")
    low, high = torch.aminmax(logits)
    width = float(high - low)
    # A net that has collapsed to one answer for all images has nothing to saturate.
    if width > 0 and float((logits - logits[:1]).abs().max()) > 1e-6 * width:
        at_bound = ((logits - low) <= 1e-6 * width) | ((high - logits) <= 1e-6 * width)
        # Two are the largest and the smallest anyway.
        share = (int(at_bound.sum()) - 2) / logits.numel()
        if share >= _SHARE:
            found.append(f"saturated logits: {share:.0%} of the outputs are at a bound ({low:.3g} or {high:.3g})")
    ahead = int(((-margin(logits, labels) > _NATS) & right).sum())
    if ahead and ahead >= _SHARE * int(right.sum()):
        found.append(f"saturated logits: the label leads by more than {_NATS} nats on {ahead} of {len(x)} images")
    return found


def attack_strength(model: Forward, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """Flag a PGD-10 that is weaker than it can be, and one that is far stronger than a single step.

    It is too weak where the accuracy is above the clean one, above that under uniform noise, or above that under FGSM by
    5 % of the images, and two or more. What PGD returns is taken as it is, without counting images that are wrong clean.
    The noise is the worst of ten draws. An FGSM far weaker than PGD is flagged as by `single_step`.
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
        single = right(FGSM(threat)(model, batch, labels, generator=stream(0, "flags", "fgsm")))
    found = []
    if robust > clean:
        found.append(f"robust above clean: {robust} of {len(x)} images right under pgd-10, {clean} without an attack")
    if robust > noisy:
        found.append(f"weaker than noise: {robust} of {len(x)} images right under pgd-10, {noisy} under uniform noise")
    if robust - single > slack(len(x), 0.05):
        found.append(f"weaker than one step: {robust} of {len(x)} images right under pgd-10, {single} under fgsm")
    return found + single_step(clean, single, robust, len(x))


# -- signs in results ----------------------------------------------------------------------------------------------


def black_box(white: Mapping[str, Tensor], black: Mapping[str, Tensor], tolerance: float = 0.01) -> list[str]:
    """Flag black-box attacks that break images which all gradient attacks leave: more than 1 % of all, and two or more.

    `white`, `black`: attacks by name, for each image whether it is right under the attack, bool [n], all in one threat.
    `tolerance`: the share that may be an accident; more for a model with random outputs.
    """
    standing = _standing(white, "white")
    found = []
    for name, verdict in black.items():
        count = int((standing & ~verdict).sum())
        if count > slack(len(standing), tolerance):
            found.append(f"black box: {name} breaks {count} of {len(standing)} images that no gradient attack breaks")
    return found


def more_steps(steps: Sequence[int], counts: Sequence[int], total: int, tolerance: float = 0.02) -> list[str]:
    """Flag an attack whose accuracy does not fall from its fewest steps to its most, or rises on the way.

    `counts`: images of `total` that are right after so many `steps` of one length. A fall to 0 at once is no sign. A
    rise counts above 2 % of the images (`tolerance`), and two or more.
    """
    _check_curve(steps, counts, total)
    if counts[0] == 0 or len(counts) < 2:
        return []
    if counts[-1] >= counts[0]:
        what = f"{counts[0]} of {total} images right after {_count(steps[0])}, {counts[-1]} after {steps[-1]}"
        return [f"more steps: {what}"]
    for (first, before), (last, after) in itertools.pairwise(zip(steps, counts, strict=True)):
        if after - before > slack(total, tolerance):
            return [f"more steps: {before} of {total} images right after {_count(first)}, {after} after {last}"]
    return []


def larger_eps(eps: Sequence[float], counts: Sequence[int], total: int, tolerance: float = 0.02) -> list[str]:
    """Flag an attack whose accuracy does not fall from the smallest eps to the largest, or rises on the way.

    `counts`: images of `total` that are right at each of `eps`, in rising order. A rise counts above 2 % of the images
    (`tolerance`), and two or more.
    """
    _check_curve(eps, counts, total)
    if counts[0] == 0 or len(counts) < 2:
        return []
    pairs = list(zip(eps, counts, strict=True))
    found = [(pairs[0], pairs[-1])] if counts[-1] >= counts[0] else []
    found += [(one, two) for one, two in itertools.pairwise(pairs) if two[1] - one[1] > slack(total, tolerance)]
    for (first, before), (last, after) in found[:1]:
        what = f"{before} of {total} images right at eps {pixels_text(first)}, {after} at {pixels_text(last)}"
        return [f"larger eps: {what}"]
    return []


def huge_eps(eps: float, count: int, total: int) -> list[str]:
    """Flag images that are right under an attack with a ball that reaches plain gray: above 2 % of `total`, and two."""
    _check_curve([eps], [count], total)
    if count <= slack(total, 0.02):
        return []
    return [f"huge eps: {count} of {total} images right at eps {pixels_text(eps)}, which reaches plain gray"]


def beyond_final(verdicts: Mapping[str, Tensor], final: str) -> list[str]:
    """Flag attacks that break more than 0.5 % of all images which the `final` attack leaves, such as AutoAttack.

    `verdicts`: attacks by name, for each image whether it is right under the attack, bool [n], all in one threat. The
    worst case over all attacks is the number to report then.

    Raises `UserError` where there is no final attack, and for verdicts of different lengths.

    >>> all_right, one_wrong = torch.ones(100, dtype=torch.bool), torch.arange(100) > 0
    >>> beyond_final({"autoattack": all_right, "pgd-50": one_wrong}, "autoattack")
    ['beyond the final attack: pgd-50 breaks 1 of 100 images that autoattack leaves (1.0 %)']
    """
    if final not in verdicts:
        raise UserError(f"beyond_final: there are no verdicts of {final!r}; given: {', '.join(verdicts) or 'none'}")
    _standing(verdicts, "verdicts")
    found = []
    for name, verdict in verdicts.items():
        count = int((verdicts[final] & ~verdict).sum())
        if count > 0.005 * len(verdict):
            share = f"{count} of {len(verdict)} images that {final} leaves ({100 * count / len(verdict):.1f} %)"
            found.append(f"beyond the final attack: {name} breaks {share}")
    return found


def single_step(clean: int, single: int, many: int, total: int) -> list[str]:
    """Flag catastrophic overfitting: one step leaves six tenths of what is right clean, many steps less than half of that.

    `clean`, `single`, `many`: images of `total` that are right without an attack, under FGSM, and under PGD of 10 steps
    or more, in one threat (Wong et al. 2020; Andriushchenko & Flammarion 2020). The difference has to be 5 % of the
    images, and two or more. A natural net at a large eps falls under one step already.
    """
    _check_curve([0, 1, 2], [clean, single, many], total)
    if single < 0.6 * clean or 2 * many >= single or single - many <= slack(total, 0.05):
        return []
    return [f"single step: {single} of {total} images right under fgsm, {many} under pgd, {clean} without an attack"]


def collapse(epochs: Sequence[int], clean: Sequence[float], robust: Sequence[float], total: int) -> list[str]:
    """Flag a training run that ends with less than half of the robust accuracy that it had, lost within an epoch.

    `clean`, `robust`: accuracies on the same `total` held-out images after each of `epochs` of training that aims at
    robust accuracy. The fall has to be 5 % of the images, and two or more, and clean accuracy must not fall by as much
    (Wong et al. 2020; Andriushchenko & Flammarion 2020; Rice et al. 2020 for the slow decline that this is not).

    >>> collapse([1, 2, 3], [0.6, 0.7, 0.8], [0.3, 0.4, 0.0], 1000)
    ['collapse: robust accuracy fell from 40.0 % after epoch 2 to 0.0 % after epoch 3, clean went from 70.0 % to 80.0 %']
    >>> collapse([1, 2, 3], [0.6, 0.7, 0.8], [0.3, 0.4, 0.3], 1000)
    []
    """
    points = list(zip(epochs, clean, robust, strict=True))
    least = slack(total, 0.05) / max(1, total)
    for (first, clean_before, before), (last, clean_after, after) in itertools.pairwise(points):
        fell = after < 0.5 * before and robust[-1] < 0.5 * before and before - after > least
        if fell and clean_before - clean_after < before - after:
            what = f"fell from {100 * before:.1f} % after epoch {first} to {100 * after:.1f} % after epoch {last}"
            also = f"clean went from {100 * clean_before:.1f} % to {100 * clean_after:.1f} %"
            return [f"collapse: robust accuracy {what}, {also}"]
    return []


def slack(total: int, tolerance: float) -> int:
    """Return how many images more may be an accident: one, or a share of `total`."""
    return max(1, int(tolerance * total + 1e-9))


def _standing(verdicts: Mapping[str, Tensor], what: str) -> Tensor:
    """Return which images are right under all attacks."""
    shapes = {(verdict.dtype, tuple(verdict.shape)) for verdict in verdicts.values()}
    if len(shapes) != 1 or any(dtype != torch.bool or len(shape) != 1 for dtype, shape in shapes):
        raise UserError(f"{what}: takes one or more bool tensors [n] of one length, a verdict for each image")
    return torch.stack(list(verdicts.values())).all(0)


def _check_curve(places: Sequence[float], counts: Sequence[int], total: int) -> None:
    rising = all(one < two for one, two in itertools.pairwise(places))
    if not places or len(places) != len(counts) or not rising or not all(0 <= count <= total for count in counts):
        raise UserError(f"a flag takes a count from 0 to {total} for each of some rising values")


def _count(steps: int) -> str:
    return f"{steps} step" + ("s" if steps != 1 else "")


def _difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinite where one is not finite."""
    scale = first.abs().max().clamp_min(torch.finfo(first.dtype).tiny)
    share = float((first - second).abs().max() / scale)
    return share if share == share else float("inf")
