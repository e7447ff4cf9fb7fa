"""What is asked about features of a net: the size of a perturbation in them, and linear probes."""

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
    Payload,
    decoded,
    encoded,
    layers_from,
    layers_of_rows,
    number,
    tidy,
)

__all__ = [
    "probes",
    "probes_cost",
    "probes_load",
    "signal",
    "signal_cost",
    "signal_load",
]

_ROUNDED: dict[analysis.Rounding, str] = {"round": "rounded", "cast": "cast"}


def signal_cost(look: Look) -> Mapping[str, float]:
    analysis.layers_of(look.model, look.select, example=look.x[:4])
    return {"crafting": look.n * look.crafting, "signal": look.n * 20.0}


def signal(look: Look) -> Found:
    adversarial = _crafted(look)
    perturbed = {"adversarial": adversarial}
    for kind in ("gaussian", "uniform"):
        perturbed[kind] = analysis.noise_like(look.x, adversarial, kind, generator=_draws(look, kind))
    rounded = {
        f"{name}, {_ROUNDED[how]}": analysis.as_bytes(x, how) for name, x in perturbed.items() for how in _ROUNDED
    }
    found = analysis.signal_ratio(
        look.model, look.x, perturbed | rounded, layers=look.select, progress=look.part("signal")
    )
    rows = tidy("ratio", found.rows())
    rows += tidy("channels", [row for row in found.channel_rows() if row["perturbation"] in perturbed])
    excess = {}
    for ending in ("", ", cast"):
        for norm in found.norms:
            excess[f"{norm}{ending}"] = found.over(f"adversarial{ending}", f"gaussian{ending}", norm)
    rows += tidy(
        "excess",
        [
            {"measure": name, "layer": layer.name, "value": float(value) if np.isfinite(value) else None}
            for name, values in excess.items()
            for layer, value in zip(found.layers, values, strict=True)
        ],
    )
    widths = [len(ratios) for ratios in found.by_channel().values["adversarial"]]
    payload: dict[str, Any] = {"layers": layers_of_rows(found.layers), "excess": list(excess), "widths": widths}
    arrays = {name: torch.from_numpy(found.ratios(name)).float() for name in perturbed}
    by_channel = found.by_channel().values
    arrays |= {f"channels {name}": torch.from_numpy(np.concatenate(by_channel[name])).float() for name in perturbed}
    arrays["excess"] = torch.from_numpy(np.stack(list(excess.values()))).float()
    last = {name: float(found.quantiles(name)[-1, 2]) for name in perturbed}
    over = last["adversarial"] / last["gaussian"] if last["gaussian"] else float("nan")
    numbers = [number(f"{name}, last layer", value) for name, value in last.items()]
    numbers.append(number("adversarial over gaussian", over))
    numbers.append(number("the same, images cast to bytes", float(excess["l2, cast"][-1])))
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
    layers = layers_from(payload["layers"])
    samples = {name: arrays[name].astype(float)[None] for name in names}
    excess = dict(zip(payload["excess"], arrays["excess"].astype(float), strict=True))
    found: dict[str, Any] = {
        "ratio": analysis.SignalRatio(layers, samples, {}, norms=("l2",)),
        "excess": analysis.SignalExcess(layers, excess),
    }
    if "widths" in payload:  # results of earlier versions have five quantiles of each layer only
        ends = np.cumsum(payload["widths"])[:-1]
        spread = {name: tuple(np.split(arrays[f"channels {name}"].astype(float), ends)) for name in names}
        found["channels"] = analysis.ChannelSpread(layers, spread)
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
