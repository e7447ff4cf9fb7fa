"""What is asked about the course of a training: norm layers over time, and overfitting by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from robustlayers import analysis
from robustlayers.normalization import norm_drift
from robustlayers.normalization.report import study_rows
from robustlayers.selection import norm_layers
from robustlayers.study._looks import (
    Arrays,
    Found,
    Look,
    Payload,
    decoded,
    encoded,
    number,
    tidy,
)
from robustlayers.training import snapshot

__all__ = ["norms", "norms_cost", "norms_load", "overfitting", "overfitting_load"]

_HELD = ("running_mean", "running_var", "weight", "bias")


def norms_cost(look: Look) -> Mapping[str, float]:
    if not norm_layers(look.model):
        return {}
    states = 1 + sum(name != "random" for name in look.sources)
    return {"norm layers": states * look.n * (look.crafting + 9)}


def norms(look: Look) -> Found:
    """Look at the layers over time: untrained, after each earlier phase and kept epoch, and as they are."""
    moments = {name: read for name, read in look.sources.items() if name != "random"}
    states = {**moments, "now": lambda: None}
    progress, rows = look.part("norm layers"), []
    now = snapshot(look.model)
    by_moment: dict[str, list[dict[str, Any]]] = {}
    kept_states: list[Mapping[str, Tensor]] = []
    layers = _with_tensors(look.model)
    try:
        for place, (moment, read) in enumerate(states.items()):
            look.model.load_state_dict(read() or now)
            state = look.model.state_dict()
            kept_states.append({name: state[name].clone() for layer in layers for name in layers[layer]})
            by_moment[moment] = study_rows(
                look.model, look.held_out.images, look.y, look.attack, noise=look.noise, seed=look.seed
            )
            progress(moment, place + 1, len(states))
    finally:
        look.model.load_state_dict(now)
    for moment, found in by_moment.items():
        kept = [{key: row[key] for key in ("layer", "pass", "metric", "value")} for row in found]
        rows += tidy("norm layers", [{"moment": moment, **row} for row in kept])
    if len(states) > 1 and layers:
        rows += tidy("drift", _drift(kept_states, list(states), layers))
    whole = {(r["pass"], r["metric"]): r["value"] for r in by_moment["now"] if r["layer"] == "all"}
    numbers = [number("dead channels", whole.get(("", "dead_share")), "%")]
    numbers += [
        number(f"distance of the statistics, {name}", whole.get((name, "kl_mean")))
        for name in ("clean", "adversarial", "noise")
    ]
    ends = [row["value"] for row in rows if row["part"] == "drift" and (row["layer"], row["moment"]) == ("all", "now")]
    numbers.append(number("drift of the statistics in the last stretch", ends[0] if ends else None))
    slim = [{key: row[key] for key in ("moment", "layer", "pass", "metric", "value")} for row in rows if "pass" in row]
    return Found(rows, numbers, {"rows": encoded(slim)})


def _with_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Return the norm layers that hold tensors of their own, and the names of these."""
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    for layer in norm_layers(model):
        names = [f"{layer}.{tensor}" if layer else tensor for tensor in _HELD]
        if any(name in state for name in names):
            found[layer] = [name for name in names if name in state]
    return found


def _drift(
    states: Sequence[Mapping[str, Tensor]], moments: Sequence[str], layers: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return how far each layer moved since the moment before and since the first; `all` is the mean over channels."""
    rows, sums = [], dict[tuple[str, str], list[float]]()
    for row in norm_drift(states, list(layers)):
        moment, since = (moments[int(str(row[key]))] for key in ("checkpoint", "since"))
        value, layer = float(str(row["value"])), str(row["layer"])
        shown = value if math.isfinite(value) else None
        rows.append({"moment": moment, "since": since, "layer": layer, "metric": row["metric"], "value": shown})
        if row["metric"] == "kl_mean":
            channels = states[0][layers[layer][0]].numel()
            whole = sums.setdefault((moment, since), [0.0, 0.0])
            whole[0] += channels * value
            whole[1] += channels
    for (moment, since), (total, channels) in sums.items():
        value = total / channels
        shown = value if math.isfinite(value) else None
        rows.append({"moment": moment, "since": since, "layer": "all", "metric": "kl_mean", "value": shown})
    return rows


def norms_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    return {"rows": payload["rows"]}


def overfitting(look: Look) -> Found:
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


def overfitting_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    epochs = tuple(decoded(analysis.EpochGap, row) for row in payload["epochs"])
    return {"gaps": analysis.Gaps(epochs, **{key: value for key, value in payload.items() if key != "epochs"})}
