"""RiFT on the nets of a study: which group robustness needs least, and what it can learn from clean images.

The held-out images are cut in two halves, each class in proportion: on one of them groups are ranked and alpha is chosen,
on the other one the line is measured too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from robustlayers import analysis
from robustlayers.analysis._ground import Group, bind_groups
from robustlayers.core.errors import UserError
from robustlayers.data import Images, batch_count
from robustlayers.evaluation import interval
from robustlayers.selection import norm_layers
from robustlayers.study._looks import (
    Arrays,
    Found,
    Look,
    Payload,
    decoded,
    encoded,
    number,
    parts_of,
    tidy,
)
from robustlayers.training import Diverged

__all__ = ["EPOCHS", "rift", "rift_cost", "rift_load"]

EPOCHS = 10
"""Of fine-tuning, as in the paper; so are the optimizer and the tolerance, the defaults of `analysis.rift`."""

_BATCH = 128
_ALPHAS = tuple(place / 10 for place in range(11))
_MODULES, _GROUPS = "modules", "groups"
_TUNED = "tuned"


def _halves(look: Look) -> tuple[Images, Images]:
    """Return the images that choose, and those that measure: of every class in turn."""
    order = torch.argsort(look.y.cpu(), stable=True)
    one, other = (look.held_out.take(order[first::2].sort().values.to(look.y.device)) for first in (0, 1))
    return one, other


def _candidates(look: Look) -> dict[str, dict[str, Group]]:
    """Return what is ranked: each module, and the parts of the net and its norm layers as a whole; or what was selected."""
    kinds: dict[str, dict[str, str] | str] = {_MODULES: look.select or "conv | linear | norm"}
    parts = parts_of(look.model, None)
    if look.select is None and not isinstance(parts, str):
        kinds[_GROUPS] = parts | ({"all norm layers": "norm"} if norm_layers(look.model) else {})
    found = {}
    for kind, groups in kinds.items():
        bound = bind_groups(look.model, groups, look.x[:2])
        found[kind] = {name: group for name, group in bound.items() if group.selection.parameters}
    return {kind: groups for kind, groups in found.items() if groups}


def rift_cost(look: Look) -> Mapping[str, float]:
    found = _candidates(look)
    if not found:
        return {}
    half, other = map(len, _halves(look))
    worst = {kind: half * (look.crafting + 1 + 31 * len(groups)) for kind, groups in found.items()}
    measured = len(_ALPHAS) * (half + other) * (3 + look.crafting)
    return {**worst, "fine-tuning": 3.0 * EPOCHS * len(look.train), "line": measured}


def rift(look: Look) -> Found:
    choosing, apart = _halves(look)
    x, y = choosing.images, choosing.labels
    ranked: dict[str, analysis.WorstCase] = {}
    for kind, groups in _candidates(look).items():
        selectors = {name: group.selector for name, group in groups.items()}
        ranked[kind] = analysis.robust_criticality(
            look.model, selectors, x, y, look.attack, seed=look.seed, progress=look.part(kind)
        )
    rows = [row for found in ranked.values() for row in found.results]
    # A rise of exactly 0 is that of weights which the forward does not use, such as a branch for other images.
    least = min([row for row in rows if row.rise > 0] or rows, key=lambda row: row.rise)
    tuning = EPOCHS * batch_count(len(look.train), _BATCH) * _BATCH
    advance = {"fine-tuning": look.part("fine-tuning"), "line": look.part("line")}

    def progress(what: str, done: int, total: int) -> None:
        if what == "fine-tuning":
            advance["fine-tuning"](what, done, tuning)
        else:
            advance["line"](what, done - tuning, total - tuning)

    try:
        found = analysis.rift(
            look.model,
            least.selector,
            look.train,
            x,
            y,
            look.attack,
            epochs=EPOCHS,
            train_batch_size=_BATCH,
            augment=look.augment,
            alphas=_ALPHAS,
            measure_on=(apart.images, apart.labels),
            seed=look.seed,
            progress=progress,
        )
    except Diverged as error:
        raise UserError(f"the fine-tuning of {least.group} diverged: {error}") from None
    table = [row for kind, one in ranked.items() for row in tidy(f"criticality, {kind}", one.rows())]
    line = ({**row, "group": least.group} for row in found.rows())  # its name, not its selector
    table += tidy("line", [_with_intervals(row, len(y), len(apart)) for row in line])
    before, after = found.before, found.after
    numbers = [
        number("fine-tuned: its criticality", least.rise, "nats", least.group),
        number("chosen alpha", found.alpha),
        number("clean before", before.clean_accuracy, "%"),
        number("clean after", after.clean_accuracy, "%"),
        number("robust before", before.robust_accuracy, "%"),
        number("robust after", after.robust_accuracy, "%"),
    ]
    payload = {
        "ranked": {kind: encoded(asdict(one)) for kind, one in ranked.items()},
        "group": least.group,
        "alpha": found.alpha,
        "tolerance": found.tolerance,
        "points": encoded([asdict(point) for point in found.points]),
        "measured": encoded([asdict(point) for point in found.measured]),
        "images": [len(y), len(apart)],
        "weights": f"{_TUNED}.safetensors",
    }
    return Found(table, numbers, payload, scores=_scores(look, ranked), weights={_TUNED: found.state})


def rift_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    def points(name: str) -> tuple[analysis.RiftPoint, ...]:
        return tuple(decoded(analysis.RiftPoint, row) for row in payload[name])

    line = analysis.Rift(
        payload["group"], payload["alpha"], payload["tolerance"], points("points"), {}, points("measured")
    )
    found: dict[str, Any] = {"line": line}
    for kind, one in payload["ranked"].items():
        rows = tuple(decoded(analysis.WorstCaseRow, row) for row in one["results"])
        found[kind] = decoded(analysis.WorstCase, {**one, "results": rows})
    return found


def _scores(
    look: Look, ranked: Mapping[str, analysis.WorstCase]
) -> dict[str, list[tuple[str, tuple[str, ...], float]]]:
    """Return the rises of the modules, for selectors; parts of the net overlap, and some of what is selected has no name."""
    groups, found = _candidates(look)[_MODULES], ranked[_MODULES]
    if all(group.names for group in groups.values()) and all(np.isfinite(row.rise) for row in found.results):
        return {"scores-modules": [(row.group, groups[row.group].names, row.rise) for row in found.results]}
    return {}


def _with_intervals(row: Mapping[str, Any], choosing: int, measuring: int) -> dict[str, Any]:
    """Return a row of the line with the number of its images, and exact intervals of both accuracies."""
    total = choosing if row["on"] == "selection" else measuring
    found = {**row, "total": total}
    for kind in ("clean", "robust"):
        low, high = interval(round(row[f"{kind}_accuracy"] * total), total)
        found |= {f"{kind}_low": low, f"{kind}_high": high}
    return found
