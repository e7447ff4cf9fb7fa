"""Clean and robust accuracy, image by image: an image counts where the clean image and all attacked ones are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from robustlayers.attacks import Attack, NamedAttack, is_correct, is_own, label
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.evaluation._meter import PAUSE, Meter, units_of
from robustlayers.evaluation._still import Forward, check_labels, check_logits, device_of, images, still, untouched
from robustlayers.normalization.fold import crafting_forward
from robustlayers.normalization.layers import seed_draws

__all__ = ["Progress", "accuracy", "correct", "worst_case"]

Progress = Callable[[str, int, int], None]
"""Called with what is being evaluated (`clean` or an attack's name), images done, and images in all."""

_RESERVED = ("clean", "robust")


def accuracy(
    forward: Forward, x: Tensor, y: Tensor, attack: Attack | None = None, batch_size: int = 500, *, seed: int = 0
) -> float:
    """Return the share of images that `correct` finds right, in [0, 1]; arguments and errors as there."""
    verdict = correct(forward, x, y, attack, batch_size, seed=seed)
    return int(verdict.sum()) / len(verdict)


def correct(
    forward: Forward, x: Tensor, y: Tensor, attack: Attack | None = None, batch_size: int = 500, *, seed: int = 0
) -> Tensor:
    """Return for each image whether the prediction is right, clean or under an attack: a bool tensor [n] on the CPU.

    `forward`: an `nn.Module`, evaluated in evaluation mode with norm layers by running statistics, without autocast, on
    the device of its parameters, and left without a trace; or any function from images to logits, used as it is.
    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: integer labels [n]; both on any device.

    Under an attack an image is right if the clean image and the attack's output both are: the clean image is one of the
    threat's, and only images that are right clean are attacked. Every output is checked against the attack's threat.

    Random draws come from a stream of (seed, attack without its restarts, index of the batch's first image among the
    attacked ones), on the CPU. So the result is a function of the arguments, `batch_size` included; another one draws
    other random starts. More restarts never raise it.

    Raises `UserError` for images outside [0, 1], and for an attack that leaves its threat.
    """
    if attack is None:
        return worst_case(forward, x, y, {}, batch_size, seed=seed)["clean"]
    name = label(attack)
    if name in _RESERVED:
        name = f"attack {name}"
    return worst_case(forward, x, y, {name: attack}, batch_size, seed=seed)[name]


def worst_case(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    batch_size: int = 500,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Return what `correct` returns for every attack by name, besides `clean`, and `robust`: right under all of them.

    Every attack gets all images that are right clean, also those that another one has broken: each row is that attack's
    own accuracy. Arguments and errors as in `correct`; an attack called `clean` or `robust` is a `UserError` too. `ranks`:
    processes with the same model and arguments, which take the batches in turn and all return the same.
    """
    check_labels(x, y)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r} is not allowed; allowed: a whole number, 1 or more")
    for name in attacks:
        if name in _RESERVED:
            raise UserError(f"an attack must not be called {name!r}: the result has a row of that name")
    device = device_of(forward, x)
    # Our attacks see an equivalent that costs less; the verdict is the model's own.
    crafting: Forward = forward
    if isinstance(forward, nn.Module) and any(is_own(attack) for attack in attacks.values()):
        crafting = crafting_forward(forward)
    with still(forward, device):
        clean = torch.zeros(len(x), dtype=torch.bool)
        for first, batch in _batches(torch.arange(len(x)), batch_size, "clean", progress, ranks):
            _seed_draws(forward, seed, "clean", first)
            clean[batch] = _verdict(forward, images(_take(x, batch), device), _take(y, batch).to(device))
        clean = _of_all(clean, ranks)
        verdicts = {"clean": clean}
        right = clean.nonzero().squeeze(1)
        for name, attack in attacks.items():
            verdicts[name] = torch.zeros_like(clean)
            for first, batch in _batches(right, batch_size, name, progress, ranks):
                natural, labels = images(_take(x, batch), device), _take(y, batch).to(device)
                generator = stream(seed, "evaluate", _without_restarts(attack), first)
                _seed_draws(forward, seed, _without_restarts(attack), first)
                # The attack may be foreign: what it does to the modes or statistics must not reach the verdict.
                with untouched(forward):
                    own = crafting if is_own(attack) else forward
                    watched = _watched(own, attack, name, first, len(batch), len(right), progress)
                    adversarial = attack(watched, natural, labels, generator=generator)
                _check(name, attack, adversarial, natural)
                _seed_draws(forward, seed, "verdict", _without_restarts(attack), first)
                verdicts[name][batch] = _verdict(forward, adversarial.to(natural.dtype), labels)
            verdicts[name] = _of_all(verdicts[name], ranks)
        robust = clean.clone()
        for name in attacks:
            robust &= verdicts[name]
        return verdicts | {"robust": robust}


def _seed_draws(forward: Forward, seed: int, *position: int | str) -> None:
    """Make what random norm layers draw a function of the batch, so that a verdict can be repeated."""
    if isinstance(forward, nn.Module):
        seed_draws(forward, seed, "evaluate", *position)


def _batches(
    indices: Tensor, batch_size: int, name: str, progress: Progress | None, ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    if progress is not None:
        progress(name, 0, len(indices))
    for place, first in enumerate(range(0, len(indices), batch_size)):
        batch = indices[first : first + batch_size]
        if place % ranks.count == ranks.index:
            yield first, batch
        if progress is not None:
            progress(name, first + len(batch), len(indices))


def _watched(
    forward: Forward, attack: Attack, name: str, first: int, size: int, of: int, progress: Progress | None
) -> Forward:
    """Return the forward, which tells now and then how far our attack on a batch of `size` images is, by its passes."""
    if progress is None or not is_own(attack):
        return forward
    units, made, told = units_of(cast(NamedAttack, attack)), 0, time.monotonic()

    def tick(count: int) -> None:
        nonlocal made, told
        made += count
        if time.monotonic() - told >= PAUSE:
            told = time.monotonic()
            progress(name, first + min(size, made // units), of)

    return Meter(forward, tick)


def _of_all(verdict: Tensor, ranks: Ranks) -> Tensor:
    """Return the verdicts of all processes, each of which knows those of its own batches."""
    return ranks.total(verdict.to(torch.int32)) > 0 if ranks.count > 1 else verdict


def _take(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor[indices.to(tensor.device)]


@torch.no_grad()
def _verdict(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    return is_correct(check_logits(forward(x.detach()), y), y).cpu()


def _check(name: str, attack: Attack, adversarial: Tensor, natural: Tensor) -> None:
    try:
        attack.threat.check(adversarial, natural)
    except UserError as error:
        raise UserError([fault.at(path=name) for fault in error.faults]) from None


def _without_restarts(attack: Any) -> str:
    """Return the attack's label with one restart: with more of them, the first must see the same draws."""
    if is_dataclass(attack) and not isinstance(attack, type) and "restarts" in {field.name for field in fields(attack)}:
        attack = replace(attack, restarts=1)
    return label(attack)
