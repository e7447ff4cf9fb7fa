"""What is asked about the similarity of layers: within a net, over its training, on attacked images, between two nets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers import analysis
from robustlayers.core.random import stream
from robustlayers.data import to_float
from robustlayers.study._looks import (
    Arrays,
    Found,
    Look,
    Number,
    Payload,
    layers_from,
    layers_of_rows,
    number,
    tidy,
)

__all__ = ["cka", "cka_cost", "cka_load"]

_DRAWS = 20  # of CKA's permutation baseline
_TURNS = 5  # of that of Procrustes, which varies little and costs singular values
_GRAMS = 6.0  # what the inner products of all layers take, in passes of the net
_TURN = 0.5  # what the singular values of one pair of layers take

CLEAN, ATTACKED = "clean", "attacked"
_WITHIN = ((CLEAN, CLEAN), (CLEAN, ATTACKED), (ATTACKED, ATTACKED))
_SEEN = (CLEAN, "for the arm", "for the other")
_LINES = {
    "both clean": (CLEAN, CLEAN),
    "each its own attack": ("for the arm", "for the other"),
    "both attacked for the arm": ("for the arm", "for the arm"),
    "both attacked for the other": ("for the other", "for the other"),
}


def cka_cost(look: Look) -> Mapping[str, float]:
    layers = len(analysis.layers_of(look.model, look.select, example=look.x[:4]))
    grams, turns = look.n * (1 + _GRAMS), _TURN * layers**2 * (1 + _TURNS)
    if look.other is not None:
        crafting = 2 * look.n * look.crafting
        return {"crafting": crafting, "CKA": 6 * grams, "Procrustes": 2 * look.n + turns}
    part = _training(look) / look.n
    return {
        "crafting": look.n * look.crafting,
        "crafting, training images": part * look.n * look.crafting,
        "CKA": 2 * grams,
        "CKA, training images": 2 * part * grams,
        "CKA over training": 2 * (len(_moments(look)) + 1) * grams,
        "Procrustes": 3 * look.n + turns,
    }


def cka(look: Look) -> Found:
    return _alone(look) if look.other is None else _between(look, look.other)


def _alone(look: Look) -> Found:
    net, x = look.model, look.x
    attacked = _crafted(look, net, x, look.y, "craft", "crafting")
    train = look.train.first(_training(look))
    train_x = to_float(train.images)
    train_attacked = _crafted(look, net, train_x, train.labels, "craft training", "crafting, training images")
    options: dict[str, Any] = {"layers": look.select}
    found = analysis.cka_views(
        {CLEAN: (net, x), ATTACKED: (net, attacked)}, _WITHIN, **options, permutations=_DRAWS,
        generator=_draws(look, CLEAN), progress=look.part("CKA"),
    )  # fmt: skip
    views = {CLEAN: (net, train_x), ATTACKED: (net, train_attacked)}
    trained = analysis.cka_views(views, _WITHIN, **options, progress=look.part("CKA, training images"))
    courses, progress = {}, look.part("CKA over training")
    states = _moments(look)
    for place, (kind, inputs) in enumerate(((CLEAN, x), (ATTACKED, attacked))):

        def advance(what: str, done: int, total: int, place: int = place) -> None:
            progress(what, place * total + done, 2 * total)

        courses[kind] = analysis.cka_course(net, inputs, states, **options, progress=advance)
    turned = _procrustes(look)
    moved = analysis.procrustes(net, x, other_x=attacked, **options, same_layer=True, pool=True)
    contrast = analysis.Contrast(trained[ATTACKED, ATTACKED], found[ATTACKED, ATTACKED])
    same = analysis.SameLayer(
        found[CLEAN, CLEAN].rows_layers,
        {"held-out images": found[CLEAN, ATTACKED].diagonal(), "training images": trained[CLEAN, ATTACKED].diagonal()},
    )
    rows = tidy(CLEAN, found[CLEAN, CLEAN].rows()) + tidy(ATTACKED, found[CLEAN, ATTACKED].rows())
    rows += tidy("contrast", contrast.rows()) + tidy("same layer", same.rows())
    rows += tidy("course", courses[CLEAN].rows()) + tidy("course, attacked", courses[ATTACKED].rows())
    rows += tidy("procrustes", turned.rows()) + tidy("procrustes, attacked", _same(moved))
    block, its = (pair[CLEAN, CLEAN].block_structure() for pair in (found, trained))
    numbers = [
        number("CKA of layers far apart", found[CLEAN, CLEAN].long_range()),
        number("by chance, any pair", _by_chance(found[CLEAN, CLEAN])),
        number("the same, training images", trained[CLEAN, CLEAN].long_range()),
        number("largest block of layers alike", block.share, "%", f"{block.first} to {block.last}"),
        number("block, training images", its.share, "%", f"{its.first} to {its.last}"),
        number("clean with attacked, last layer: CKA", float(same.values["held-out images"][-1])),
        number("last layer, training images", float(same.values["training images"][-1])),
        number("Procrustes distance of these", float(moved.distances.diagonal()[-1])),
    ]
    first = found[CLEAN, CLEAN]
    payload = {
        "layers": layers_of_rows(first.rows_layers),
        "moments": list(courses[CLEAN].moments),
        "sizes": [first.samples, first.batch_size],
    }
    arrays = {CLEAN: first.values, ATTACKED: found[CLEAN, ATTACKED].values, "procrustes": turned.values}
    arrays |= {"both": contrast.other.values, "training both": contrast.one.values}
    arrays |= {"training same": same.values["training images"]}
    arrays |= {f"course {kind}": course.values for kind, course in courses.items()}
    return Found(rows, numbers, payload, _tensors(arrays))


def _between(look: Look, other: nn.Module) -> Found:
    net, x = look.model, look.x
    half = look.part("crafting")
    crafted = []
    for place, (one, what) in enumerate(((net, "craft"), (other, "craft other"))):

        def advance(name: str, done: int, total: int, place: int = place) -> None:
            half(name, place * total + done, 2 * total)

        crafted.append(analysis.craft(one, x, look.y, look.attack, generator=_draws(look, what), progress=advance))
    inputs = dict(zip(_SEEN, (x, *crafted), strict=True))
    views = {f"arm {seen}": (net, shown) for seen, shown in inputs.items()}
    views |= {f"other {seen}": (other, shown) for seen, shown in inputs.items()}
    pairs = [(f"arm {one}", f"other {two}") for one in _SEEN for two in _SEEN]
    found = analysis.cka_views(
        views, pairs, layers=look.select, permutations=_DRAWS, generator=_draws(look, "between"),
        progress=look.part("CKA"),
    )  # fmt: skip
    clean, own = found[pairs[0]], found["arm for the arm", "other for the other"]
    lines = np.stack([found[pair].diagonal() for pair in pairs]).reshape(len(_SEEN), len(_SEEN), -1)
    crossing = analysis.Crossing(clean.rows_layers, _SEEN, _SEEN, lines)
    turned = _procrustes(look, other)
    rows = tidy("between", clean.rows()) + tidy("each attacked", own.rows()) + tidy("crossing", crossing.rows())
    rows += tidy("by images", crossing.lines(_LINES).rows()) + tidy("procrustes", turned.rows())
    payload = {"layers": layers_of_rows(clean.rows_layers), "sizes": [clean.samples, clean.batch_size]}
    arrays = {"between": clean.values, "own": own.values, "crossing": lines, "procrustes": turned.values}
    return Found(rows, _apart(crossing, turned, _by_chance(clean)), payload, _tensors(arrays))


def _by_chance(found: analysis.CKA) -> float:
    """Return what permuted images reach in 95 % of the draws, of the pair of layers where that is most."""
    floor = found.chance()
    assert floor is not None  # it was computed with permutations
    return float(floor.max())


def _apart(crossing: analysis.Crossing, turned: analysis.Procrustes, by_chance: float) -> list[Number]:
    clean, own = crossing.parting(CLEAN, CLEAN), crossing.parting("for the arm", "for the other")
    ends = crossing.lines(_LINES).values
    return [
        number("part at depth (CKA under 0.5)", clean.depth, "%", clean.layer or "nowhere"),
        number("part, each under its own attack", own.depth, "%", own.layer or "nowhere"),
        number("by chance, any pair", by_chance),
        number("CKA, last layer", float(ends["both clean"][-1])),
        number("last layer, each under its own attack", float(ends["each its own attack"][-1])),
        number("Procrustes distance, last layer", float(turned.distances.diagonal()[-1])),
    ]


def cka_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    layers = layers_from(payload["layers"])
    samples, size = payload["sizes"]
    found = {name: values.astype(float) for name, values in arrays.items()}

    def heat(name: str) -> analysis.CKA:
        return analysis.CKA(layers, layers, found[name], None, samples, size, "CKA")

    procrustes = analysis.Procrustes(layers, layers, found["procrustes"], None, samples, samples, "Procrustes")
    if "crossing" in found:
        crossing = analysis.Crossing(layers, _SEEN, _SEEN, found["crossing"])
        lines = crossing.lines(_LINES)
        return {"between": heat("between"), "by images": lines, "crossing": crossing, "procrustes": procrustes}
    moments = tuple(payload["moments"])
    shown = {"held-out images": np.diagonal(found[ATTACKED]), "training images": found["training same"]}
    return {
        CLEAN: heat(CLEAN),
        ATTACKED: heat(ATTACKED),
        "same layer": analysis.SameLayer(layers, shown),
        "contrast": analysis.Contrast(heat("training both"), heat("both")),
        "procrustes": procrustes,
        "course": analysis.Course(moments, layers, found[f"course {CLEAN}"], samples, size),
        "course, attacked": analysis.Course(moments, layers, found[f"course {ATTACKED}"], samples, size),
    }


def _moments(look: Look) -> dict[str, Any]:
    """Return the earlier states of the run: the untrained net, the ends of phases, the epochs that were kept."""
    return {name: read for name, read in look.sources.items() if name != "random"}


def _training(look: Look) -> int:
    return min(look.n, len(look.train))


def _procrustes(look: Look, other: nn.Module | None = None) -> analysis.Procrustes:
    return analysis.procrustes(
        look.model, look.x, other, layers=look.select, pool=True, permutations=_TURNS,
        generator=_draws(look, "procrustes"), progress=look.part("Procrustes"),
    )  # fmt: skip


def _same(found: analysis.Procrustes) -> list[dict[str, Any]]:
    return [row for row in found.rows() if row["layer"] == row["other_layer"]]


def _crafted(look: Look, net: nn.Module, x: Tensor, y: Tensor, draws: str, part: str) -> Tensor:
    return analysis.craft(net, x, y, look.attack, generator=_draws(look, draws), progress=look.part(part))


def _draws(look: Look, what: str) -> torch.Generator:
    return stream(look.seed, "analysis", what)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(values)).float() for name, values in arrays.items()}
