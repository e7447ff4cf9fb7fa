"""Objectives, each a scalar loss on a batch with the passes it needs, and signals: what a group learns from.

A new objective is one function and one line in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.quantities import number

__all__ = [
    "FROZEN",
    "OBJECTIVES",
    "Objective",
    "Signal",
    "checked_labels",
    "parse_signal",
    "parse_signals",
    "signal_text",
]

FROZEN = "frozen"

Signal = Mapping[str, float]
"""Objective name -> weight; the empty mapping is `frozen`."""


@dataclass(frozen=True)
class Objective:
    """A loss of each sample, [n], from the logits of each pass it reads (`clean`, `adversarial`) and y."""

    name: str
    passes: tuple[str, ...]
    per_sample: Callable[..., Tensor]  # (logits by pass, y, reduction="none" | "mean")

    def loss(self, logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return self.per_sample(logits, y, "mean")

    def losses(self, logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
        """Return the loss of each sample."""
        return self.per_sample(logits, y, "none")


def _natural(logits: Mapping[str, Tensor], y: Tensor, reduction: str) -> Tensor:
    return functional.cross_entropy(logits["clean"], y, reduction=reduction)


def _adversarial(logits: Mapping[str, Tensor], y: Tensor, reduction: str) -> Tensor:
    return functional.cross_entropy(logits["adversarial"], y, reduction=reduction)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        # Cross-entropy of the images as they are.
        Objective("natural", ("clean",), _natural),
        # Cross-entropy of the adversarial images: Madry et al. 2018, equation 2.1.
        Objective("adversarial", ("adversarial",), _adversarial),
    )
}


def parse_signal(value: str | Mapping[str, float | str]) -> Signal:
    """Return a signal from an objective's name, `frozen`, or weights such as `{adversarial: 0.5, natural: 0.5}`.

    Raises `UserError` for unknown objectives and for weights that are not positive.

    >>> parse_signal("adversarial"), parse_signal("frozen")
    ({'adversarial': 1.0}, {})
    """
    if isinstance(value, str):
        if value == FROZEN:
            return {}
        if value not in OBJECTIVES:
            raise UserError(one_of("signal", value, [*OBJECTIVES, FROZEN]))
        return {value: 1.0}
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f"a signal is one of {', '.join([*OBJECTIVES, FROZEN])}, or weights of objectives, not {value!r}"
        )
    weights = {}
    for name, weight in value.items():
        if name not in OBJECTIVES:
            raise UserError(one_of("objective", str(name), OBJECTIVES))
        weights[name] = number(weight, f"weight of {name}")
        if weights[name] <= 0:
            raise UserError(f"weight of {name}: {weight} is not positive; leave the objective out instead")
    return weights


def checked_labels(x: Tensor, y: Tensor, *, shared: bool) -> Tensor:
    """Return the labels of a batch as int64; `shared` among processes, one's part may be empty.

    Raises `UserError` unless there is one integer for each image, and for a batch without images: its mean loss is NaN.
    """
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"a step takes one integer label per image; got {y.dtype} {list(y.shape)} for {len(x)} images")
    if not len(x) and not shared:
        raise UserError("a step takes one image at least; the batch is empty")
    return y.long()


def parse_signals(groups: Collection[str], signals: Mapping[str, str | Mapping[str, float | str]]) -> dict[str, Signal]:
    """Return the signal of each group; `UserError` names all groups that are unknown, and all that have none."""
    faults = [Fault(one_of("group", group, groups)) for group in signals if group not in groups]
    faults += [Fault(f"group {group!r} has no signal") for group in groups if group not in signals]
    if faults:
        raise UserError(faults)
    return {group: parse_signal(signals[group]) for group in groups}


def signal_text(signal: Signal) -> str:
    """Return a signal as a person writes it.

    >>> signal_text({"adversarial": 0.5, "natural": 0.5}), signal_text({})
    ('0.5 adversarial + 0.5 natural', 'frozen')
    """
    if not signal:
        return FROZEN
    if len(signal) == 1 and next(iter(signal.values())) == 1.0:
        return next(iter(signal))
    return " + ".join(f"{weight:g} {name}" for name, weight in signal.items())
