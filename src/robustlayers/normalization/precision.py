"""Which precision and layout the crafting forward takes: candidates are timed, the fastest that agrees with the model wins.

A candidate agrees if the gradient for the images points where the model's does. Crafting by signs needs no more: with
sign agreement s, a step of PGD moves a share s of the pixels the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.normalization.context import inference

__all__ = ["PRECISIONS", "Choice", "Measured", "choose"]

PRECISIONS = ("fp32", "bf16", "auto")

LEAST_SIGNS = 0.9
LEAST_COSINE = 0.95
_SECONDS = 1.0  # spent on timing, about
_CANDIDATES = tuple((precision, layout, False) for precision in ("fp32", "bf16") for layout in (False, True))
# On a CPU compiling gains nothing over what folding leaves, and takes 18 s.
_COMPILED = (("fp32", True, True), ("bf16", True, True))


@dataclass(frozen=True)
class Measured:
    """What a candidate takes and how well its gradient agrees with the plain model's."""

    seconds: float  # of one forward and backward, the fastest of some
    signs: float  # share of pixels with the same sign of the gradient
    cosine: float  # between the gradients of each image, mean


@dataclass(frozen=True)
class Choice:
    """What was chosen, and every candidate's measurement under a name such as `bf16, channels-last`."""

    precision: str
    channels_last: bool
    measured: Mapping[str, Measured]
    plain: float  # seconds of the plain model
    compiled: bool = False

    @property
    def name(self) -> str:
        """The candidate's name."""
        return _name(self.precision, self.channels_last, self.compiled)

    @property
    def reason(self) -> str:
        """Why it was chosen, in one sentence."""
        own = self.measured[self.name]
        out = [name for name, found in self.measured.items() if not _agrees(found)]
        left = f"; {' and '.join(out)} did not agree" if out else ""
        return (
            f"{self.name}: {self.plain / own.seconds:.2f} times as fast as the model, {own.signs:.1%} of the signs and "
            f"a cosine of {own.cosine:.3f} with its gradient{left}"
        )

    def plain_data(self) -> dict[str, Any]:
        """Return the choice as plain data, for a record."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Choice:
        """Return the choice that a record holds."""
        measured = {name: Measured(**found) for name, found in data["measured"].items()}
        return cls(data["precision"], data["channels_last"], measured, data["plain"], data.get("compiled", False))


def choose(model: nn.Module, images: Tensor, make: Callable[..., Callable[[Tensor], Tensor]]) -> Choice:
    """Time the candidates on `images`, [n, c, h, w], and return the fastest that agrees; `make` builds them.

    Each round times every candidate once, so that another load on the machine meets all alike; the fastest of a
    candidate's rounds counts. The exact precision without a special layout always agrees. On a GPU there are candidates
    that `torch.compile` makes; one that cannot be compiled there is left out.
    """
    images = images.detach().float()
    labels = _runner_up(model, images)
    plain = _Timed(lambda x: _plain(model, x), images, labels)
    forwards: dict[tuple[str, bool, bool], _Timed] = {}
    for key in (*_CANDIDATES, *(_COMPILED if images.is_cuda else ())):
        precision, layout, compiled = key
        with suppress(Exception) if compiled else nullcontext():  # whatever a compiler that is missing raises
            made = make(model, precision=precision, channels_last=layout, **({"compiled": True} if compiled else {}))
            forwards[key] = _Timed(made, images, labels)
    began = time.perf_counter()
    while True:
        for timed in (plain, *forwards.values()):
            timed.once()
        if time.perf_counter() - began > _SECONDS:
            break
    measured = {_name(*key): timed.against(plain.gradient) for key, timed in forwards.items()}
    exact = _CANDIDATES[0]
    possible = [key for key in forwards if key == exact or _agrees(measured[_name(*key)])]
    precision, layout, compiled = min(possible, key=lambda key: forwards[key].seconds)
    return Choice(precision, layout, measured, plain.seconds, compiled)


def _agrees(found: Measured) -> bool:
    return found.signs >= LEAST_SIGNS and found.cosine >= LEAST_COSINE


def _name(precision: str, channels_last: bool, compiled: bool) -> str:
    return precision + ", channels-last" * channels_last + ", compiled" * compiled


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    with inference(model):
        return model(x)


def _runner_up(model: nn.Module, images: Tensor) -> Tensor:
    """Return the second class of each image: against the first, sure images have no gradient left to compare."""
    with torch.no_grad():
        logits = _plain(model, images)
        return logits.topk(min(2, logits.shape[1]), dim=1).indices[:, -1]


class _Timed:
    """A forward with the shortest time of a forward and backward so far, and its gradient for the images."""

    def __init__(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        self.forward, self.images, self.labels = forward, images, labels
        self.seconds = float("inf")
        self.gradient = self._differentiate()  # the first time is not counted

    def _differentiate(self) -> Tensor:
        with torch.enable_grad():
            x = self.images.clone().requires_grad_()
            loss = functional.cross_entropy(self.forward(x).float(), self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient.detach()

    def once(self) -> None:
        _wait(self.images)
        began = time.perf_counter()
        gradient = self._differentiate()
        _wait(gradient)
        self.seconds = min(self.seconds, time.perf_counter() - began)

    def against(self, reference: Tensor) -> Measured:
        signs = (self.gradient.sign() == reference.sign()).float().mean()
        cosine = functional.cosine_similarity(self.gradient.flatten(1), reference.flatten(1)).mean()
        return Measured(self.seconds, float(signs), float(cosine))


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
