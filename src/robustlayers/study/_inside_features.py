"""What is asked about features of a net: similarity of layers, the size of a perturbation in them, linear probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlayers import analysis
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.study._looks import (
    REFERENCE,
    Arrays,
    Found,
    Look,
    Number,
    Payload,
    decoded,
    encoded,
    layers_from,
    layers_of_rows,
    number,
    tidy,
)

__all__ = [
    "cka",
    "cka_cost",
    "cka_load",
    "probes",
    "probes_cost",
    "probes_load",
    "signal",
    "signal_cost",
    "signal_load",
]

_DRAWS = 20  # of the permutation baseline
_GRAMS = 6.0  # what the inner products of all layers take, in passes of the net


def cka_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    grams = 2 * look.n * (1 + _GRAMS)
    if look.other is not None:
        return {"CKA": grams, "Procrustes": grams}
    return {"crafting": look.n * look.crafting, "CKA": grams / 2, "CKA under attack": grams, "Procrustes": grams}


def cka(look: Look) -> Found:
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


def cka_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    found = {}
    for name, facts in payload.items():
        layers = layers_from(facts["layers"])
        values = arrays[name].astype(float)
        found[name] = analysis.CKA(layers, layers, values, None, facts["samples"], facts["batch_size"], "CKA")
    return found


def signal_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    return {"crafting": look.n * look.crafting, "signal": look.n * 8.0}


def signal(look: Look) -> Found:
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


def signal_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    names = [name for name in ("adversarial", "gaussian", "uniform") if name in arrays]
    samples = {name: arrays[name].astype(float)[None] for name in names}
    ratios = analysis.SignalRatio(layers_from(payload["layers"]), samples, {}, norms=("l2",))
    found: dict[str, Any] = {"ratio": ratios}
    if "norms" in payload:
        layers, left_out = payload["norms"]
        values = tuple(arrays[f"norm {k}"].astype(float) for k in range(len(layers)))
        found["amplification"] = analysis.Amplification(tuple(layers), values, tuple(left_out))
    return found


def probes_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    return {"probes": (look.n + min(REFERENCE, len(look.train))) * (look.crafting + 6)}


def probes(look: Look) -> Found:
    fit = look.train.first(min(REFERENCE, len(look.train)))
    found = analysis.probes(
        look.model,
        look.select,
        (fit.images, fit.labels),
        (look.held_out.images, look.y),
        attack=look.attack,
        seed=look.seed,
        progress=look.part("probes"),
    )
    pairs = (("clean", "clean"), ("clean", "adversarial"), ("adversarial", "adversarial"))
    numbers = [number(f"last layer, {' to '.join(pair)}", found.of(*pair)[-1].accuracy, "%") for pair in pairs]
    best = max(found.of("adversarial", "adversarial"), key=lambda row: row.accuracy)
    numbers.append(number("attacked images, best layer", best.accuracy, "%", best.layer))
    payload = {"layers": layers_of_rows(found.layers), "results": encoded([asdict(row) for row in found.results])}
    return Found(tidy("probe", found.rows()), numbers, payload)


def probes_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    rows = tuple(decoded(analysis.ProbeRow, row) for row in payload["results"])
    return {"probes": analysis.Probes(layers_from(payload["layers"]), rows)}


def _draws(look: Look, what: str) -> torch.Generator:
    return stream(look.seed, "analysis", what)


def _crafted(look: Look) -> Tensor:
    return analysis.craft(
        look.model, look.x, look.y, look.attack, generator=_draws(look, "craft"), progress=look.part("crafting")
    )
