"""Accuracy class by class: robust accuracy differs between classes far more than clean accuracy does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from robustlayers.core.errors import UserError
from robustlayers.evaluation.intervals import interval

__all__ = ["ClassAccuracy", "per_class"]


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of one metric on the images of one class, with its exact binomial interval."""

    metric: str
    label: int
    name: str
    count: int  # right
    total: int
    accuracy: float
    low: float
    high: float

    def row(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def per_class(
    verdicts: Mapping[str, Tensor] | Tensor, y: Tensor, names: Sequence[str] | None = None, level: float = 0.95
) -> list[ClassAccuracy]:
    """Return accuracies by class from verdicts image by image, as `worst_case` and `correct` return them.

    `verdicts`: bool [n], or several by metric; `y`: labels [n]; `names` of the classes. Classes without an image are
    left out. The intervals (`interval`) hold one class each, not all of them together.

    Raises `UserError` for verdicts that do not fit the labels, and labels without a name.

    Source: Xu et al. 2021 ("To be Robust or to be Fair") on the spread between classes.

    >>> import torch
    >>> found = per_class(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]))
    >>> [(one.label, one.count, one.total) for one in found]
    [(0, 1, 2), (1, 1, 1)]
    """
    if isinstance(verdicts, Tensor):
        verdicts = {"accuracy": verdicts}
    y = y.detach().cpu()
    if y.ndim != 1 or y.is_floating_point() or (len(y) and int(y.min()) < 0):
        raise UserError(f"per_class: labels are integers [n], 0 or more; got {y.dtype} {list(y.shape)}")
    if names is not None and len(y) and int(y.max()) >= len(names):
        raise UserError(f"per_class: label {int(y.max())} has no name; there are {len(names)} names")
    totals = y.bincount().tolist()
    found = []
    for metric, verdict in verdicts.items():
        verdict = verdict.detach().cpu()
        if verdict.shape != y.shape or verdict.dtype != y.eq(y).dtype:
            raise UserError(f"per_class: {metric}: verdicts are bool [{len(y)}], one for each label")
        counts = y[verdict].bincount(minlength=len(totals)).tolist()
        for label, (count, total) in enumerate(zip(counts, totals, strict=True)):
            if total:
                low, high = interval(count, total, level)
                name = names[label] if names is not None else str(label)
                found.append(ClassAccuracy(metric, label, name, count, total, count / total, low, high))
    return found
