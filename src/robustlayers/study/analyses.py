"""The analyses that `robustlayers analyse` knows: each is one function and one line of the registry.

A function takes a `Look` and returns what it `Found`; `load` makes the result objects of `robustlayers.analysis` again
from what was kept, by the name of the figure that is drawn from each. `cost` names the parts of the work and how many
passes of single images each takes, which the time left is told from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlayers import analysis
from robustlayers.analysis._ground import Group, Quality, bind_groups
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.normalization.report import study_rows
from robustlayers.selection import norm_layers
from robustlayers.study._looks import (
    Found,
    Look,
    Number,
    decoded,
    encoded,
    layers_from,
    layers_of_rows,
    number,
    parts_of,
    picks,
    tidy,
)
from robustlayers.training import snapshot

__all__ = ["ANALYSES", "Analysis", "analysis_named"]

Payload = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_MODULES = "conv | linear | norm"
_REFERENCE = 1000  # training images that statistics are estimated anew on, and probes fitted on
_DRAWS = 20  # of the permutation baseline
_GRAMS = 6.0  # what the inner products of all layers take, in passes of the net
_ALONE_POSITIONS, _BETWEEN_POSITIONS = 6, 11


@dataclass(frozen=True)
class Analysis:
    """One analysis: what it looks at, what it writes, what it costs.

    `alone`: of one arm; `between`: of an arm against another one, which must be named, and `alike` if the two nets must
    have the same tensors for it. `uses` are the settings that decide its result, of `images`, `attack` and `select`.
    `cost` is empty where a net has nothing to look at, as `lacks` says, and raises `UserError` for a selector that is
    wrong. `version` is raised when the same look would give other numbers.
    """

    name: str
    title: str
    text: str  # what it asks, one sentence
    alone: bool
    between: bool
    writes: str
    cost: Callable[[Look], Mapping[str, float]]
    run: Callable[[Look], Found]
    load: Callable[[Payload, Arrays], Mapping[str, Any]]
    uses: tuple[str, ...] = ("images", "attack", "select")
    alike: bool = False
    lacks: str = ""
    version: int = 1


def analysis_named(name: str) -> Analysis:
    """Return an analysis by its name; an unknown one is a `UserError` with the nearest."""
    if name not in ANALYSES:
        raise UserError(one_of("analysis", name, ANALYSES))
    return ANALYSES[name]


# Representations ------------------------------------------------------------------------------------------------------


def _cka_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    grams = 2 * look.n * (1 + _GRAMS)
    if look.other is not None:
        return {"CKA": grams, "Procrustes": grams}
    return {"crafting": look.n * look.crafting, "CKA": grams / 2, "CKA under attack": grams, "Procrustes": grams}


def _cka(look: Look) -> Found:
    pairs: dict[str, analysis.CKA] = {}
    options: dict[str, Any] = {"layers": look.select, "permutations": _DRAWS}
    if look.other is not None:
        title, sides = "between", (look.other, None)
        pairs[title] = analysis.cka(
            look.model, look.x, look.other, **options, generator=_draws(look, title), progress=look.part("CKA")
        )
    else:
        title, sides = "attacked", (None, _crafted(look))
        pairs["clean"] = analysis.cka(
            look.model, look.x, **options, generator=_draws(look, "clean"), progress=look.part("CKA")
        )
        pairs[title] = analysis.cka(
            look.model,
            look.x,
            other_x=sides[1],
            **options,
            generator=_draws(look, title),
            progress=look.part("CKA under attack"),
        )
    same = analysis.procrustes(
        look.model, look.x, *sides, layers=look.select, same_layer=True, progress=look.part("Procrustes")
    )
    rows = [row for name, found in pairs.items() for row in tidy(name, found.rows())]
    apart = [row for row in same.rows() if row["layer"] == row["other_layer"]]
    rows += tidy(f"{title}, same layer", apart)
    payload = {
        name: {"layers": layers_of_rows(found.rows_layers), "samples": found.samples, "batch_size": found.batch_size}
        for name, found in pairs.items()
    }
    arrays = {name: torch.from_numpy(found.values).float() for name, found in pairs.items()}
    return Found(rows, _cka_numbers(pairs, same), payload, arrays)


def _cka_numbers(pairs: Mapping[str, analysis.CKA], same: analysis.Procrustes) -> list[Number]:
    last = float(same.distances.diagonal()[-1])
    if "between" in pairs:
        parting = pairs["between"].parting()
        return [
            number("part at depth (CKA under 0.5)", parting.depth, "%", parting.layer or "nowhere"),
            number("CKA, last layer", float(pairs["between"].diagonal()[-1])),
            number("Procrustes distance, last layer", last),
        ]
    block = pairs["clean"].block_structure()
    return [
        number("CKA of layers far apart", pairs["clean"].long_range()),
        number("largest block of layers alike", block.share, "%", f"{block.first} to {block.last}"),
        number("clean with attacked, last layer: CKA", float(pairs["attacked"].diagonal()[-1])),
        number("Procrustes distance of these", last),
    ]


def _cka_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    found = {}
    for name, facts in payload.items():
        layers = layers_from(facts["layers"])
        values = arrays[name].astype(float)
        found[name] = analysis.CKA(layers, layers, values, None, facts["samples"], facts["batch_size"], "CKA")
    return found


def _signal_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    return {"crafting": look.n * look.crafting, "signal": look.n * 8.0}


def _signal(look: Look) -> Found:
    adversarial = _crafted(look)
    perturbed = {"adversarial": adversarial}
    for kind in ("gaussian", "uniform"):
        perturbed[kind] = analysis.noise_like(look.x, adversarial, kind, generator=_draws(look, kind))
    found = analysis.signal_ratio(look.model, look.x, perturbed, layers=look.select, progress=look.part("signal"))
    rows = tidy("ratio", found.rows()) + tidy("channels", found.channel_rows())
    payload: dict[str, Any] = {"layers": layers_of_rows(found.layers)}
    arrays = {name: torch.from_numpy(found.ratios(name)).float() for name in found.samples}
    last = {name: float(found.quantiles(name)[-1, 2]) for name in found.samples}
    over = last["adversarial"] / last["gaussian"] if last["gaussian"] else float("nan")
    numbers = [number(f"{name}, last layer", value) for name, value in last.items()]
    numbers.append(number("adversarial over gaussian", over))
    try:
        stretched = analysis.amplification(look.model, example=look.x[:2])
    except UserError:  # a net without running statistics
        return Found(rows, numbers, payload, arrays)
    rows += tidy("amplification", stretched.rows())
    payload["norms"] = [list(stretched.layers), list(stretched.left_out)]
    arrays |= {f"norm {k}": torch.from_numpy(values).float() for k, values in enumerate(stretched.values)}
    medians = [float(np.median(values)) for values in stretched.values]
    most = stretched.layers[medians.index(max(medians))]
    numbers.append(number("largest amplification, median channel", max(medians), "", most))
    return Found(rows, numbers, payload, arrays)


def _signal_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    names = [name for name in ("adversarial", "gaussian", "uniform") if name in arrays]
    samples = {name: arrays[name].astype(float)[None] for name in names}
    ratios = analysis.SignalRatio(layers_from(payload["layers"]), samples, {}, norms=("l2",))
    found: dict[str, Any] = {"ratio": ratios}
    if "norms" in payload:
        layers, left_out = payload["norms"]
        values = tuple(arrays[f"norm {k}"].astype(float) for k in range(len(layers)))
        found["amplification"] = analysis.Amplification(tuple(layers), values, tuple(left_out))
    return found


# Weights --------------------------------------------------------------------------------------------------------------


def _criticality_cost(look: Look) -> Mapping[str, float]:
    groups = _groups(look, _MODULES)
    moved = [group for group in groups.values() if group.selection.parameters]
    worst = look.n * (look.crafting + 1 + 31 * len(moved)) if moved else 0.0
    return {
        "other values": look.quality * (1 + len(groups) * len(look.sources)),
        **({"worst case": worst} if moved else {}),
    }


def _criticality(look: Look) -> Found:
    groups = _groups(look, _MODULES)
    sources = {name: read() for name, read in look.sources.items()}
    about: dict[str, Any] = {"attack": look.attack, "seed": look.seed}
    progress, results = look.part("other values"), []
    whole: Mapping[str, Quality] = {}
    for place, (name, state) in enumerate(sources.items()):
        moved = {group: one.selector for group, one in groups.items() if _moved(one, state)}

        def advance(what: str, done: int, total: int, place: int = place) -> None:
            progress(what, place * total + done, len(sources) * total)

        if moved:
            one = analysis.criticality(look.model, moved, look.x, look.y, {name: state}, **about, progress=advance)
            named = (replace(row, names=groups[row.group].names) for row in one.results)
            results, whole = [*results, *named], one.whole
    found = analysis.Criticality(whole, tuple(results))
    rows = tidy("replaced", found.rows())
    payload: dict[str, Any] = {
        "whole": encoded({kind: asdict(quality) for kind, quality in found.whole.items()}),
        "results": encoded([asdict(row) for row in found.results]),
    }
    numbers: list[Number] = []
    scores = {}
    for source in dict.fromkeys(row.source for row in results):
        most = max(found.of(source), key=lambda row: row.robust_accuracy_drop or 0.0)
        numbers.append(number(f"most lost, values from {source}", most.robust_accuracy_drop, "points", most.group))
        if _named(groups.values()):
            drops = [(row.group, row.names, row.robust_accuracy_drop or 0.0) for row in found.of(source)]
            scores[f"scores-{source.replace(' ', '-')}"] = drops
    moved = {name: group.selector for name, group in groups.items() if group.selection.parameters}
    if moved:
        worst = analysis.robust_criticality(
            look.model, moved, look.x, look.y, look.attack, seed=look.seed, progress=look.part("worst case")
        )
        rows += tidy("worst case", worst.rows())
        payload["worst"] = _worst_payload(worst)
        numbers += [
            number("worst weights nearby, most critical", worst.most.rise, "nats", worst.most.group),
            number("least critical", worst.least.rise, "nats", worst.least.group),
        ]
        if _named([groups[name] for name in moved]) and all(np.isfinite(row.rise) for row in worst.results):
            # With the names of the whole groups: these were bound by selector.
            scores["scores-worst-case"] = [(row.group, groups[row.group].names, row.rise) for row in worst.results]
    return Found(rows, numbers, payload, scores=scores)


def _criticality_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    whole = {kind: decoded(Quality, quality) for kind, quality in payload["whole"].items()}
    rows = tuple(decoded(analysis.CriticalityRow, row) for row in payload["results"])
    found: dict[str, Any] = {"worst case": _worst(payload["worst"])} if "worst" in payload else {}
    for source in dict.fromkeys(row.source for row in rows):
        found[source] = analysis.Criticality(whole, tuple(row for row in rows if row.source == source))
    return found


def _transplanted(look: Look) -> dict[str, str] | str:
    """Return the parts of the net, and its weights, its scales and shifts, and its running statistics as a whole."""
    parts = parts_of(look.model, look.select)
    if isinstance(parts, str):
        return parts
    words = {"affine": "scales, shifts"}
    named = {f"all {words.get(name, name)}": selector for name, selector in analysis.PARTS.items()}
    return parts | {name: selector for name, selector in named.items() if picks(look.model, selector)}


def _transplant_cost(look: Look) -> Mapping[str, float]:
    groups = bind_groups(look.model, _transplanted(look), look.x[:2])
    return {"transplants": 4 * (look.quality + _REFERENCE) * (len(groups) + 1)}


def _transplant(look: Look) -> Found:
    assert look.other is not None
    found = analysis.transplant(
        look.model,
        look.other,
        _transplanted(look),
        look.x,
        look.y,
        names=(look.arm, look.against),
        attack=look.attack,
        recalibrate_on=look.train.images[:_REFERENCE],
        seed=look.seed,
        progress=look.part("transplants"),
    )
    numbers: list[Number] = []
    for host, donor in ((look.arm, look.against), (look.against, look.arm)):
        inside = [row for row in found.results if row.host == host and row.statistics == "re-estimated"]
        base = next(row for row in inside if row.group == "nothing")
        kept = [row for row in inside if row.group not in ("nothing", "everything")]
        most = max(kept, key=lambda row: row.robust_accuracy or 0.0)
        won = _less(most.robust_accuracy, base.robust_accuracy)
        numbers.append(number(f"most robust accuracy won in {host} from {donor}", won, "points", most.group))
    payload = {"names": list(found.names), "results": encoded([asdict(row) for row in found.results])}
    return Found(tidy("transplant", found.rows()), numbers, payload)


def _transplant_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    rows = tuple(decoded(analysis.TransplantRow, row) for row in payload["results"])
    one, other = payload["names"]
    kinds = dict.fromkeys(row.statistics for row in rows)
    return {
        kind: analysis.Transplants(
            (one, other), tuple(replace(row, statistics="kept") for row in rows if row.statistics == kind)
        )
        for kind in kinds
    }


def _interpolation_cost(look: Look) -> Mapping[str, float]:
    if look.other is not None:
        return {"line": 2 * look.quality * _BETWEEN_POSITIONS + 2 * _REFERENCE * _BETWEEN_POSITIONS}
    groups = len(_groups(look))
    return {
        "lines": look.quality * (1 + groups * (_ALONE_POSITIONS - 1)),
        "sharpness": look.n * (look.crafting + 1 + 4 * groups),
    }


def _interpolation(look: Look) -> Found:
    about: dict[str, Any] = {"attack": look.attack, "seed": look.seed}
    if look.other is not None:
        line = analysis.interpolation(
            look.model,
            look.other,
            {"all": "all"},
            look.x,
            look.y,
            **about,
            recalibrate_on=look.train.images[:_REFERENCE],
            progress=look.part("line"),
        )
        numbers = [
            number(f"barrier, {metric.removesuffix('_loss')} loss, statistics {kind}", round(height, 9), "nats")
            for kind in ("kept", "re-estimated")
            for metric in ("clean_loss", "robust_loss")
            for height in line.barriers(metric, kind).values()
        ]
        return Found(tidy("line", line.rows()), numbers, {"line": encoded([asdict(p) for p in line.points])})
    groups = parts_of(look.model, look.select)
    places = [k / (_ALONE_POSITIONS - 1) for k in range(_ALONE_POSITIONS)]
    lines = analysis.interpolation(
        look.model,
        look.sources["initial"](),
        groups,
        look.x,
        look.y,
        **about,
        positions=places,
        progress=look.part("lines"),
    )
    rows = tidy("line", lines.rows())
    payload: dict[str, Any] = {"lines": encoded([asdict(point) for point in lines.points])}
    height = max(lines.barriers().items(), key=lambda pair: pair[1])
    numbers = [number("highest barrier", height[1], "nats", height[0])]
    moved = {name: group.selector for name, group in _groups(look).items() if group.selection.parameters}
    if moved:
        sharp = analysis.sharpness(look.model, moved, look.x, look.y, **about, progress=look.part("sharpness"))
        rows += tidy("sharpness", sharp.rows())
        payload["sharpness"] = _worst_payload(sharp)
        numbers.append(number("sharpest", sharp.most.rise, "nats", sharp.most.group))
    return Found(rows, numbers, payload)


def _interpolation_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    def line(kind: str, points: Sequence[Any]) -> analysis.Line:
        rows = (decoded(analysis.LinePoint, point) for point in points if point["statistics"] == kind)
        return analysis.Line(tuple(replace(row, statistics="kept", group=row.group) for row in rows))

    if "line" in payload:
        return {kind: line(kind, payload["line"]) for kind in ("kept", "re-estimated")}
    found: dict[str, Any] = {"lines": line("kept", payload["lines"])}
    return found | ({"sharpness": _worst(payload["sharpness"])} if "sharpness" in payload else {})


# Norm layers and overfitting ------------------------------------------------------------------------------------------


def _norms_cost(look: Look) -> Mapping[str, float]:
    if not norm_layers(look.model):
        return {}
    states = 1 + sum(name != "random" for name in look.sources)
    return {"norm layers": states * look.n * (look.crafting + 9)}


def _norms(look: Look) -> Found:
    """Look at the layers over time: untrained, after each earlier phase and kept epoch, and as they are."""
    moments = {name: read for name, read in look.sources.items() if name != "random"}
    states = {**moments, "now": lambda: None}
    progress, rows = look.part("norm layers"), []
    now = snapshot(look.model)
    by_moment: dict[str, list[dict[str, Any]]] = {}
    try:
        for place, (moment, read) in enumerate(states.items()):
            look.model.load_state_dict(read() or now)
            by_moment[moment] = study_rows(
                look.model, look.held_out.images, look.y, look.attack, noise=look.noise, seed=look.seed
            )
            progress(moment, place + 1, len(states))
    finally:
        look.model.load_state_dict(now)
    for moment, found in by_moment.items():
        kept = [{key: row[key] for key in ("layer", "pass", "metric", "value")} for row in found]
        rows += tidy("norm layers", [{"moment": moment, **row} for row in kept])
    whole = {(r["pass"], r["metric"]): r["value"] for r in by_moment["now"] if r["layer"] == "all"}
    numbers = [number("dead channels", whole.get(("", "dead_share")), "%")]
    numbers += [
        number(f"distance of the statistics, {name}", whole.get((name, "kl_mean")))
        for name in ("clean", "adversarial", "noise")
    ]
    slim = [{key: row[key] for key in ("moment", "layer", "pass", "metric", "value")} for row in rows]
    return Found(rows, numbers, {"rows": encoded(slim)})


def _norms_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    return {"rows": payload["rows"]}


def _overfitting(look: Look) -> Found:
    whole = analysis.gaps(look.curve)
    last = analysis.gaps(look.curve, phase=look.phase)
    found = replace(last, epochs=whole.epochs)
    gap = last.epochs[-1]
    numbers = [
        number("best robust, validation", found.best_robust, "%", f"epoch {found.best_epoch}"),
        number("last robust, validation", found.last_robust, "%"),
        number("robust overfitting", found.robust_overfitting, "points"),
        number("clean won since", found.clean_change, "points"),
        number("robust gap, last", gap.robust_gap, "points"),
        number("clean gap, last", gap.clean_gap, "points"),
    ]
    look.part("curve")("curve", 1, 1)
    return Found(tidy("gap", found.rows()), numbers, encoded(asdict(found)))


def _overfitting_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    epochs = tuple(decoded(analysis.EpochGap, row) for row in payload["epochs"])
    return {"gaps": analysis.Gaps(epochs, **{key: value for key, value in payload.items() if key != "epochs"})}


def _probes_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    return {"probes": (look.n + min(_REFERENCE, len(look.train))) * (look.crafting + 6)}


def _probes(look: Look) -> Found:
    fit = look.train.first(min(_REFERENCE, len(look.train)))
    found = analysis.probes(
        look.model,
        look.select,
        (fit.images, fit.labels),
        (look.held_out.images, look.y),
        attack=look.attack,
        seed=look.seed,
        progress=look.part("probes"),
    )
    numbers = []
    for pair in (("clean", "clean"), ("clean", "adversarial"), ("adversarial", "adversarial")):
        numbers.append(number(f"last layer, {' to '.join(pair)}", found.of(*pair)[-1].accuracy, "%"))
    best = max(found.of("adversarial", "adversarial"), key=lambda row: row.accuracy)
    numbers.append(number("attacked images, best layer", best.accuracy, "%", best.layer))
    payload = {"layers": layers_of_rows(found.layers), "results": encoded([asdict(row) for row in found.results])}
    return Found(tidy("probe", found.rows()), numbers, payload)


def _probes_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    rows = tuple(decoded(analysis.ProbeRow, row) for row in payload["results"])
    return {"probes": analysis.Probes(layers_from(payload["layers"]), rows)}


# What they share ------------------------------------------------------------------------------------------------------


def _draws(look: Look, what: str) -> torch.Generator:
    return stream(look.seed, "analysis", what)


def _crafted(look: Look) -> Tensor:
    return analysis.craft(
        look.model, look.x, look.y, look.attack, generator=_draws(look, "craft"), progress=look.part("crafting")
    )


def _groups(look: Look, usual: str = "") -> dict[str, Group]:
    return bind_groups(look.model, parts_of(look.model, look.select, usual), look.x[:2])


def _moved(group: Group, state: Mapping[str, Tensor]) -> bool:
    """Tell whether a group differs in any entry from another state; one that was frozen since needs no measurement."""
    entries = group.selection.inventory.entries
    for name, mask in group.selection.parts.items():
        differs = entries[name].tensor.detach().cpu() != state[name].cpu()
        if bool((differs if mask is None else differs & mask.cpu()).any()):
            return True
    return False


def _named(groups: Any) -> bool:
    """Tell whether every group can be named in a file of scores: it holds no part of a tensor."""
    return all(group.names for group in groups)


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def _worst_payload(found: analysis.WorstCase) -> dict[str, Any]:
    return encoded(asdict(found))


def _worst(payload: Payload) -> analysis.WorstCase:
    rows = tuple(decoded(analysis.WorstCaseRow, row) for row in payload["results"])
    return decoded(analysis.WorstCase, {**payload, "results": rows})


ANALYSES: dict[str, Analysis] = {
    one.name: one
    for one in (
        Analysis(
            "cka",
            "Representation similarity",
            "Which layers represent the same: within a net, between clean and attacked images, between two nets?",
            True,
            True,
            "CKA of all pairs of layers with its permutation baseline, Procrustes distance of equal layers",
            _cka_cost,
            _cka,
            _cka_load,
        ),
        Analysis(
            "signal",
            "Perturbation to signal",
            "How much of a perturbation arrives at each layer, beside noise of the same size?",
            True,
            False,
            "ratio of perturbation to signal by layer and channel, amplification of each norm layer",
            _signal_cost,
            _signal,
            _signal_load,
        ),
        Analysis(
            "criticality",
            "Criticality",
            "Which layers does the net need as they are: with other values in their place, or the worst ones nearby?",
            True,
            False,
            "accuracy lost by layer and source, rise of the loss by layer, scores for the selectors top and bottom",
            _criticality_cost,
            _criticality,
            _criticality_load,
        ),
        Analysis(
            "norms",
            "Norm layers over time and across arms",
            "How far are the norm layers' statistics from what each kind of image shows them, and how many channels die?",
            True,
            False,
            "scale, shift, dead channels, distances and rates of each norm layer at each kept moment of training",
            _norms_cost,
            _norms,
            _norms_load,
            uses=("images", "attack"),
            lacks="no norm layer",
        ),
        Analysis(
            "transplant",
            "Transplants",
            "Which part of a net carries its robustness into another one?",
            False,
            True,
            "clean and robust accuracy of each net with each part of the other, statistics kept and re-estimated",
            _transplant_cost,
            _transplant,
            _transplant_load,
            alike=True,
        ),
        Analysis(
            "interpolation",
            "Interpolation and sharpness",
            "What lies on the way: of each part from its initial values, or between two nets?",
            True,
            True,
            "clean and robust loss and accuracy along each line, sharpness of each part",
            _interpolation_cost,
            _interpolation,
            _interpolation_load,
            alike=True,
        ),
        Analysis(
            "overfitting",
            "Overfitting",
            "Is robustness on unseen images lost while that on training images grows?",
            True,
            False,
            "gaps between training and validation by epoch, best epoch against last",
            lambda look: {"curve": 1.0},
            _overfitting,
            _overfitting_load,
            uses=(),
        ),
        Analysis(
            "probes",
            "Linear probes",
            "From which layer can the class be read, on clean and on attacked images?",
            True,
            False,
            "accuracy of a linear classifier on each layer's features, fitted and tested on clean or attacked images",
            _probes_cost,
            _probes,
            _probes_load,
        ),
    )
}
"""Name -> analysis, in the order in which they are run and reported."""
