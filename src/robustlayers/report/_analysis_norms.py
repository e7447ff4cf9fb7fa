"""Norm layers across arms and over time: one figure for all arms, since one arm at a time they are drawn elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from robustlayers.report import _analysis_changes as changes
from robustlayers.report import loupe, style
from robustlayers.report._analysis_axes import Panel, empty, head, legend, line, name_layers, panel
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["draw"]

_NORM_PANELS = (
    ("", "dead_share", "Dead channels, %", 100.0),
    ("clean", "kl_mean", "Distance, clean images, nats", 1.0),
    ("adversarial", "kl_mean", "Distance, attacked images, nats", 1.0),
    ("", "lipschitz_median", "Stretch |γ| / σ, median", 1.0),
    ("adversarial", "scale_rate", "Gradient by weight ‖g‖ / ‖γ‖, attacked images", 1.0),
)
_NORM_CAPTION = (
    "How to read it: norm layers in execution order from left to right, a line for each arm. Distance is the symmetric KL "
    "divergence of the running statistics from those of the layer's inputs in that pass: where an arm's line lies high, its "
    "statistics do not fit these images. Gradient by weight is the share of γ that a step of size 1 would move."
)
_TIME_CAPTION = (
    "How to read it: the mean over all norm layers at each moment of training that was kept, from the untrained net to the "
    "net as it is. A distance on attacked images that falls while that on clean ones rises is a net whose statistics move "
    "over to the attack."
)
_DRIFT_CAPTION = (
    "How to read it: how far the running statistics have moved, as the symmetric KL divergence between two moments, mean over "
    "channels. An arm whose statistics are frozen lies at the lower edge; one that still moves late has not settled."
)
_RATE_CAPTION = (
    "How to read it: ‖lr g‖ / ‖θ‖ of each trained group, mean over the updates of its phase and over seeds: the share of a "
    "group that one step moves. Arms of which the marks lie together differ in other things than how fast they learn."
)


def draw(summary: Summary, shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    """Return the figures of all arms together: by layer, over the moments that were kept, drift, effective rates."""
    place = {arm.name: index for index, arm in enumerate(summary.arms)}
    every = [{"arm": result.arm, **row} for result in shown for row in result.rows]
    rows = [row for row in every if row["part"] != "drift"]
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows if row["layer"] != "all"))
    arms = [result.arm for result in shown]
    now = {arm: loupe.means([row for row in rows if row["arm"] == arm and row["moment"] == "now"]) for arm in arms}
    panels = [
        panel(
            "Layer by layer",
            _NORM_CAPTION,
            f"inside-norms-layers{suffix}",
            "All arms",
            [row for row in rows if row["moment"] == "now"],
            lambda: _across(arms, place, layers, now),
        )
    ]
    moments = {arm: list(dict.fromkeys(str(row["moment"]) for row in rows if row["arm"] == arm)) for arm in arms}
    if all(len(names) > 1 for names in moments.values()):
        whole = _whole(rows)
        keys = ("arm", "moment", "pass", "metric")
        data = [{**dict(zip(keys, key, strict=True)), "value": value} for key, value in whole.items()]
        name = f"inside-norms-time{suffix}"
        panels.append(
            panel("Over time", _TIME_CAPTION, name, "All arms", data, lambda: _over_time(arms, place, moments, whole))
        )
    drift = [row for row in every if row["part"] == "drift"]
    if any(row["metric"] == "kl_mean" for row in drift):
        panels.append(
            panel(
                "Drift of the statistics",
                _DRIFT_CAPTION,
                f"inside-norms-drift{suffix}",
                "All arms",
                drift,
                lambda: changes.drift(arms, place, moments, layers, drift),
            )
        )
    rates = changes.rates_of(summary, arms)
    if rates:
        name = f"inside-norms-rates{suffix}"
        panels.append(
            panel(
                "Effective learning rate",
                _RATE_CAPTION,
                name,
                "All arms",
                rates,
                lambda: changes.rates(arms, place, rates),
            )
        )
    return panels


def _across(
    arms: Sequence[str], place: Mapping[str, int], layers: Sequence[str], now: Mapping[str, Mapping[Any, float]]
) -> Figure:
    kinds = [k for k in _NORM_PANELS if any((layer, k[0], k[1]) in now[arm] for arm in arms for layer in layers)]
    figure = empty(50.0 + 108.0 * len(kinds) + 16 * math.ceil(len(arms) / 2), "")
    grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (shown, metric, title, scale) in zip(grid, kinds, strict=True):
        for arm in arms:
            found = [(x, now[arm].get((layer, shown, metric))) for x, layer in enumerate(layers)]
            line(axes, arm, place[arm], [(x, scale * value) for x, value in found if value is not None])
        head(axes, title, metric)
    name_layers(grid, layers)
    legend(figure, grid[0], arms)
    return figure


def _whole(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], float]:
    """Return (arm, moment, pass, metric) -> the value of the whole net, else the mean over its layers."""
    shown = {(kind[0], kind[1]) for kind in _NORM_PANELS}
    found: dict[tuple[str, ...], list[float]] = {}
    whole: dict[tuple[str, ...], float] = {}
    for row in rows:
        if (row["pass"], row["metric"]) in shown and row["value"] is not None:
            key = (str(row["arm"]), str(row["moment"]), str(row["pass"]), str(row["metric"]))
            if row["layer"] == "all":
                whole[key] = float(row["value"])
            else:
                found.setdefault(key, []).append(float(row["value"]))
    return {key: math.fsum(values) / len(values) for key, values in found.items()} | whole


def _over_time(
    arms: Sequence[str],
    place: Mapping[str, int],
    moments: Mapping[str, Sequence[str]],
    whole: Mapping[tuple[str, ...], float],
) -> Figure:
    kinds = [kind for kind in _NORM_PANELS if any(key[2:] == kind[:2] for key in whole)]
    names = max(moments.values(), key=len)
    figure = empty(70.0 + 108.0 * len(kinds) + 16 * math.ceil(len(arms) / 2), "")
    grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (shown, metric, title, scale) in zip(grid, kinds, strict=True):
        for arm in arms:
            # The net as it is stands last, also where an arm has fewer moments.
            at = {moment: x for x, moment in enumerate(names)} | {"now": len(names) - 1}
            points = [(at[m], whole.get((arm, m, shown, metric))) for m in moments[arm] if m in at]
            line(axes, arm, place[arm], [(x, scale * value) for x, value in points if value is not None])
        head(axes, title, metric)
    grid[-1].set_xticks(range(len(names)), [style.plain(name, 18) for name in names], parse_math=False)
    if len(names) > 3:
        grid[-1].tick_params(axis="x", rotation=90)
    legend(figure, grid[0], arms)
    return figure
