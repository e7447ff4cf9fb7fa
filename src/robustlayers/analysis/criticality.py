"""Criticality by replacement: what a group is worth, as the accuracy that is lost when other values take its place.

Which values decides what is asked (Zhang, Bengio & Singer 2019, "Are all layers created equal?", arXiv 1902.01996):

| values from | called | asks |
|---|---|---|
| the run's own initial weights | re-initialization | does training move the group at all in a way that counts |
| a fresh draw (`fresh_state`) | re-randomization | does it matter what is in the group |
| the weights after an epoch | rewinding | from when on was the group as good as it gets |

All three are one operation: copy the group's entries from a state dict, measure, put them back.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new, dots
from robustlayers.analysis._ground import KEPT, Bench, Group, Groups, Quality, bind_groups, finite_row, put_back
from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.files import write_text
from robustlayers.core.random import global_draws, stream_seed
from robustlayers.evaluation import Progress
from robustlayers.selection import Inventory
from robustlayers.training import copy_entries, snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Criticality", "CriticalityRow", "criticality", "fresh_state", "write_scores"]

_DROPS = ("clean_accuracy_drop", "clean_loss_rise", "robust_accuracy_drop", "robust_loss_rise")


@dataclass(frozen=True)
class CriticalityRow:
    """The model with one group from one source, and what that costs against the model as it was.

    Accuracies are in [0, 1], losses mean cross-entropies in nats, robust ones None without an attack. `statistics` is
    `kept`, or `re-estimated` on the side of the changed model and of the one that it is compared with.
    """

    group: str
    source: str
    statistics: str
    selector: str
    names: tuple[str, ...]
    parameters: int
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float | None
    robust_loss: float | None
    clean_accuracy_drop: float
    clean_loss_rise: float
    robust_accuracy_drop: float | None
    robust_loss_rise: float | None


@dataclass(frozen=True)
class Criticality:
    """What each group is worth, in the order of the groups.

    How to read it: a group far to the right is critical, since the model needs the values that it learned; a group at
    zero could have been left where the other values come from.
    """

    whole: Mapping[str, Quality]  # statistics kept or re-estimated -> the model without a change
    results: tuple[CriticalityRow, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each group, source and treatment of statistics; what is not finite is None."""
        return [finite_row(asdict(row)) for row in self.results]

    def of(self, source: str | None = None, statistics: str = KEPT) -> list[CriticalityRow]:
        """Return the rows of one source, the first unless given; an unknown one is a `UserError`."""
        sources = list(dict.fromkeys(row.source for row in self.results))
        source = sources[0] if source is None else source
        if source not in sources:
            raise UserError(one_of("source", source, sources))
        if statistics not in self.whole:
            raise UserError(one_of("treatment of statistics", statistics, self.whole))
        return [row for row in self.results if (row.source, row.statistics) == (source, statistics)]

    def to_scores(
        self, path: Path | str, by: str = "robust_accuracy_drop", *, source: str | None = None, statistics: str = KEPT
    ) -> Path:
        """Write `name,score` for the selectors `top` and `bottom`; see `write_scores` for the names.

        `by` is one of the drops and rises of a row. Raises `UserError` for another one, and for a robust one where there
        was no attack.
        """
        if by not in _DROPS:
            raise UserError(one_of("score", by, _DROPS))
        found = [(row.group, row.names, getattr(row, by)) for row in self.of(source, statistics)]
        if any(score is None for *_, score in found):
            raise UserError(f"{by} was not measured: the analysis had no attack; use clean_accuracy_drop")
        return write_scores(path, found)

    def plot(self, axes: Axes | None = None, *, source: str | None = None, statistics: str = KEPT) -> Axes:
        """Draw the accuracy that each group costs, clean and robust, in points: to the right is more critical."""
        rows = self.of(source, statistics)
        series = {"clean": [100 * row.clean_accuracy_drop for row in rows]}
        if all(row.robust_accuracy_drop is not None for row in rows):
            series["robust"] = [100 * (row.robust_accuracy_drop or 0.0) for row in rows]
        axes = axes_or_new(axes, 5.0, 1.2 + 0.24 * len(rows))
        return dots(
            axes, [row.group for row in rows], series, f"accuracy lost with values from\n{rows[0].source}, points"
        )


def criticality(
    model: nn.Module,
    groups: Groups,
    x: Tensor,
    y: Tensor,
    sources: Mapping[str, Mapping[str, Tensor]],
    *,
    attack: Attack | None = None,
    recalibrate_on: Tensor | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Criticality:
    """Return how much worse the model gets when each group in turn is replaced by the values of each source.

    For a group G and a source s: accuracy(theta) - accuracy(theta with G from s), clean and under the attack, which is
    run anew against every changed model; and the rise of the mean cross-entropy.

    Args:
        model: maps images to logits; measured in evaluation mode and left bit for bit as it was.
        groups: `{name: selector}`, or a selector that is taken apart by module in execution order. A convolution's own
            group leaves the running statistics behind it as they were tracked; see `recalibrate_on`.
        x: images [n, c, h, w], uint8 or float in [0, 1]; of a held-out split, since this is for choosing groups.
        y: integer labels [n].
        sources: name -> tensor name -> value: an initial or earlier `state_dict()`, or `fresh_state(model, seed)`.
        attack: for the robust accuracy, such as `PGD(Linf("8/255"), steps=20)`.
        recalibrate_on: images of the training split. If given, everything is measured a second time with all running
            statistics estimated anew on them after the change: a drop that remains is no mere mismatch of statistics.
        seed: of the attack's draws, the same for every model.

    Cost: one evaluation for each group, source and treatment of statistics, and one for the model as it is.

    Raises `UserError` for wrong selectors, and for a source that lacks a tensor of a group or has it in another shape.
    """
    named = bind_groups(model, groups, x[:2])
    if not sources:
        raise UserError(
            "criticality: there is no source of other values; give an earlier state dict or fresh_state(...)"
        )
    changes = 1 + len(named) * len(sources)
    bench = Bench(
        x,
        y,
        attack,
        recalibrate_on=recalibrate_on,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        changes=changes,
    )
    # Every copy is tried before the first measurement, which takes long.
    for source, state in sources.items():
        for group in named.values():
            with put_back(model):
                _replace(group, state, source)
    whole = bench.changed(model, "as it is", lambda: None)
    results = []
    for source, state in sources.items():
        for group in named.values():
            found = bench.changed(model, f"{group.name} from {source}", partial(_replace, group, state, source))
            results += [
                CriticalityRow(
                    group=group.name,
                    source=source,
                    statistics=kind,
                    selector=group.selector,
                    names=group.names,
                    parameters=group.selection.parameters,
                    **asdict(quality),
                    clean_accuracy_drop=whole[kind].clean_accuracy - quality.clean_accuracy,
                    clean_loss_rise=quality.clean_loss - whole[kind].clean_loss,
                    robust_accuracy_drop=_less(whole[kind].robust_accuracy, quality.robust_accuracy),
                    robust_loss_rise=_less(quality.robust_loss, whole[kind].robust_loss),
                )
                for kind, quality in found.items()
            ]
    return Criticality(whole, tuple(results))


def fresh_state(model: nn.Module, seed: int = 0, build: Callable[[int], nn.Module] | None = None) -> dict[str, Tensor]:
    """Return tensor name -> value of a fresh draw of initial weights; the model and torch's global state stay as they are.

    `build(seed)` returns a freshly initialized model, as `lambda seed: models.build("resnet", seed=seed)` does. Without
    it the modules' own `reset_parameters` draw on a copy of the model, which is torch's default and need not be the
    distribution that the model was initialized from; tensors of modules without one are left out.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> torch.equal(fresh_state(net, seed=1)["0.weight"], fresh_state(net, seed=1)["0.weight"])
    True
    >>> torch.equal(fresh_state(net, seed=1)["0.weight"], fresh_state(net, seed=2)["0.weight"])
    False
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with global_draws(stream_seed(seed, "fresh"), devices), torch.inference_mode(False):
        if build is not None:
            return snapshot(build(seed))
        copy = deepcopy(model)
        drawn = set()
        for module in copy.modules():
            for method in ("reset_parameters", "_reset_parameters"):
                if callable(getattr(module, method, None)):
                    getattr(module, method)()
                    drawn.add(module)
        entries = [entry for entry in Inventory(copy) if any(owner in drawn for owner in entry.owners)]
        return {name: entry.tensor.detach().clone() for entry in entries for name in entry.names}


def write_scores(path: Path | str, scores: Iterable[tuple[str, tuple[str, ...], float]]) -> Path:
    """Write the file that `top("FILE", share=0.25)` and `bottom` read, from (group, names, score); return its path.

    A group that is a whole module is one line; another one is a line for each of its tensors, each with the group's
    score. Raises `UserError` for a group that holds a part of a tensor, for a name in two groups, for a score that is not
    finite, and for a path that does not end in `.csv`.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path} does not end in .csv, by which selectors know what is in it")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "score"])
    seen: dict[str, str] = {}
    for group, names, score in scores:
        if not names:
            raise UserError(f"group {group!r} holds a part of a tensor, which a file of scores has no name for")
        if not math.isfinite(score):
            raise UserError(f"group {group!r} has the score {score}, which is not finite")
        for name in names:
            if name in seen:
                raise UserError(f"{name} is in the groups {seen[name]!r} and {group!r}, and can have one score only")
            seen[name] = group
            writer.writerow([name, repr(float(score))])
    return write_text(path, text.getvalue())


def _replace(group: Group, state: Mapping[str, Tensor], source: str) -> None:
    copy_entries(group.selection, state, source, strict=True)


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two
