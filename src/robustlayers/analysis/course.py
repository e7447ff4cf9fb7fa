"""How layers become what they are: the similarity of each layer at earlier moments of training with the trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new
from robustlayers.analysis._ground import finite_row, put_back
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis.activations import Layer, Layers, batches, capture, layers_of
from robustlayers.analysis.cka import center, gram
from robustlayers.core.errors import Fault, UserError
from robustlayers.evaluation import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Course", "State", "cka_course"]

State = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
"""A state dict, or what reads it."""

_READABLE = 14  # names of moments


@dataclass(frozen=True)
class Course:
    """The CKA of each layer at each moment with the same layer of the net as it is: `values` [moments, layers].

    1 where the layer represents the inputs as in the end; NaN where one of the two is the same for all samples.
    """

    moments: tuple[str, ...]
    layers: tuple[Layer, ...]
    values: np.ndarray
    samples: int
    batch_size: int  # of the largest batch

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each moment and layer."""
        sizes = {"samples": self.samples, "batch_size": self.batch_size}
        return [
            finite_row({"moment": moment, "layer": layer.name, "metric": "CKA", "similarity": float(value), **sizes})
            for moment, values in zip(self.moments, self.values, strict=True)
            for layer, value in zip(self.layers, values, strict=True)
        ]

    def settled(self, least: float = 0.9) -> dict[str, str | None]:
        """Return for each layer the first moment from which on its similarity is `least` or more; None if there is none."""
        found: dict[str, str | None] = {}
        for layer, values in zip(self.layers, self.values.T, strict=True):
            under = np.flatnonzero(~(values >= least))
            first = int(under[-1]) + 1 if len(under) else 0
            found[layer.name] = self.moments[first] if first < len(self.moments) else None
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a heat map: moments of training from the bottom up, layers in execution order from left to right.

        How to read it: a column that is bright from low down is a layer that was early what it is in the end; one that
        turns bright only at the top was still changing what it represents. 0.5 and less is one shade.
        """
        axes = axes_or_new(axes, 5.2, 1.6 + 0.24 * min(len(self.moments), 20))
        shown: dict[str, Any] = {"origin": "lower", "interpolation": "nearest", "aspect": "auto"}
        image = axes.imshow(self.values, cmap="cividis", vmin=0.5, vmax=1, **shown)
        label_layers(axes, self.layers, "x", color="white")
        step = -(-len(self.moments) // _READABLE)
        axes.set_yticks(range(0, len(self.moments), step), self.moments[::step])
        axes.figure.colorbar(image, ax=axes, extend="min").set_label("CKA with the trained net")
        return axes


def cka_course(
    model: nn.Module,
    x: Tensor,
    states: Mapping[str, State],
    *,
    layers: Layers = None,
    batch_size: int = 250,
    pool: bool = False,
    progress: Progress | None = None,
) -> Course:
    """Return the unbiased linear CKA of each layer under earlier states with the same layer of the model as it is.

    `states`: moment -> a state dict of the model, or a function that reads it, in the order of training; each is read
    once for every batch, so that not all of them lie in memory. `x`: inputs [n, ...], the same at all moments. Memory: two
    times [layers, batch_size^2] float64. `layers`, `batch_size`, `pool` as in `cka`, of which this is the diagonal. The
    model is left as it was, also after an exception. `progress(moment, samples done at all moments, all of them)`.

    Raises `UserError` where there is no state, for a state that does not fit the model, and for fewer than 4 samples.

    Source: of networks in training Kornblith et al. 2019, section 6; of robust ones Cianfarani et al. 2022.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    >>> x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    >>> cka_course(net, x, {"now": net.state_dict()}).values.round(6).tolist()
    [[1.0, 1.0]]
    """
    if not states:
        raise UserError("there is no earlier state to compare with")
    chosen = layers_of(model, layers, example=x)
    cross, own, its = np.zeros((3, len(states), len(chosen)))
    largest = done = 0
    for batch in batches(len(x), batch_size, 4):
        n = batch.stop - batch.start
        weight = 1 / (n - 3)
        last: dict[int, Tensor] = {}

        def keep(index: int, output: Tensor, last: dict[int, Tensor] = last) -> None:
            last[index] = center(gram(output, pool=pool))

        capture(model, x[batch], chosen, keep)
        for place, (moment, state) in enumerate(states.items()):

            def compare(
                index: int, output: Tensor, place: int = place, weight: float = weight, last: dict[int, Tensor] = last
            ) -> None:
                then = center(gram(output, pool=pool))
                cross[place, index] += weight * float((then * last[index]).sum())
                own[place, index] += weight * float(then.square().sum())
                its[place, index] += weight * float(last[index].square().sum())

            with put_back(model):
                _load(model, state, moment)
                capture(model, x[batch], chosen, compare)
            done += n
            if progress is not None:
                progress(moment, done, len(x) * len(states))
        largest = max(largest, n)
    scale = np.sqrt(np.where(own > 0, own, np.nan)) * np.sqrt(np.where(its > 0, its, np.nan))
    return Course(tuple(states), chosen, cross / scale, len(x), largest)


def _load(model: nn.Module, state: State, moment: str) -> None:
    try:
        model.load_state_dict(state() if callable(state) else state)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(Fault(f"does not fit {type(model).__name__}: {text}", path=moment)) from None
