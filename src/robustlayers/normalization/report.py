"""Norm layers under the loupe: their scales, shifts and statistics, and how far these are from what a pass shows them.

Per layer: how scale and shift are spread, which channels are dead, how much the layer stretches. Per layer and pass (clean,
adversarial, noisy images): the statistics of its inputs, their distance from the running ones, and how fast its scale and
shift would learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.core.random import stream
from robustlayers.data import to_float
from robustlayers.normalization._observed import By, Moments, Observation, attacked, left_alone, on_branch
from robustlayers.normalization._report_data import LayerPass, NormLayer, NormReport, Numbers
from robustlayers.normalization.distances import l2, lipschitz, symmetric_kl, wasserstein
from robustlayers.normalization.layers.common import ScaleShift, channels_of
from robustlayers.selection.inventory import Inventory, is_norm, norm_layers
from robustlayers.selection.order import order_of
from robustlayers.selection.selectors import resolve

__all__ = ["LayerPass", "NormLayer", "NormReport", "effective_rates", "norm_report", "study_rows"]

Attack = Callable[..., Tensor]
"""Called as `attack(forward, x, y, generator=g)`; returns images of the shape of x."""


def norm_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    inputs: Mapping[str, Attack | None] | None = None,
    branches: Mapping[str, str] | None = None,
    select: str = "norm",
    by: By = "running",
    dead: float | str = 0.01,
    gradients: bool = True,
    seed: int = 0,
) -> NormReport:
    """Return what the norm layers of `model` hold, and how it compares with what `batches` show them.

    Each batch, x or (x, y), goes once through the model for each of `inputs`: a name and the attack that makes the images
    of that pass, None for the images as they are; left out, it is `{"clean": None}`. Attacks meet the model by running
    statistics. `branches` says through which branch a pass goes in the layers that have one of that name, as
    `{"adversarial": "auxiliary"}` for a dual norm; else it is the one in use.

    Layers are norm layers and the norm layers inside of norm layers (`bn1.main`, `bn1.auxiliary`), those that hold others
    and no tensors left out. They stand in execution order; those inside of one layer stand together, those that never run
    last. Works for torch's norm layers, subclasses, and every module that counts as normalization, by these attributes:
    `weight`, `bias`, `running_mean`, `running_var`, `eps`. What a layer lacks is empty.

    The model is left as it was (modes, branches, parameters, gradients, buffers, hooks, random states), also after an
    exception. All numbers are computed in float64 from the values that the model computes.

    Args:
        model: any module; labels and `gradients` need logits [n, classes].
        batches: x as the model takes it, [n, ...], y int64 [n]. Each batch weighs the same in the statistics.
        inputs: name of a pass -> attack or None.
        branches: name of a pass -> name of a branch.
        select: the layers, those of which the selector picks a tensor; `norm` is all of them.
        by: what normalizes in the pass, `running` or `batch` statistics; by running ones a batch norm layer shows what
            all layers before it, as they predict, make of the images.
        dead: |scale| under which a channel is dead. Frankle, Schwab and Morcos 2021 (arXiv 2003.00152) find about a third
            of them where only batch norm is trained.
        gradients: whether to compute `scale_rate` and `shift_rate`, a backward for each batch, where labels are given.
        seed: of the attacks' draws, which are a function of (seed, pass, batch).

    Raises:
        UserError: no norm layer or none selected; unknown branch or `by`; an attack without labels; an input that the
            model does not take; no batch; a batch with one value per channel.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    >>> found = norm_report(net, [torch.tensor([[0.0, 0.0], [2.0, 4.0]])])
    >>> found.layers[0].passes["clean"].mean, found.layers[0].passes["clean"].variance, found.dead_share
    ((1.0, 2.0), (2.0, 8.0), 0.0)
    """
    threshold = number(dead, "dead")
    if threshold <= 0:
        raise UserError(f"dead: {threshold:g} is not allowed; allowed: more than 0")
    if by not in ("running", "batch"):
        raise UserError(one_of("statistics to normalize by", str(by), ("running", "batch")))
    inputs = {"clean": None} if inputs is None else dict(inputs)
    branches = dict(branches or {})
    for name in branches:
        if name not in inputs:
            raise UserError(one_of("pass", name, inputs))
    inventory = Inventory(model)
    batch_count = images = 0
    order: list[str] = []
    with left_alone(model):
        layers = _chosen(inventory, select)
        parameters = {
            f"{name}.{attribute}": parameter
            for name, module in layers.items()
            for attribute in ("weight", "bias")
            if gradients and (parameter := module._parameters.get(attribute)) is not None
        }
        seen = {
            name: Observation(model, {n: Moments(n, m, _channels(m)) for n, m in layers.items()}, parameters, by)
            for name in inputs
        }
        for batch in batches:
            x, y = _parts(batch, batch_count)
            order = order or _in_order(inventory, layers, x)
            for name, attack in inputs.items():
                with on_branch(model, branches.get(name)):
                    generator = stream(seed, "norm-report", name, batch_count, device=x.device)
                    shown = x if attack is None else attacked(model, attack, x, y, generator)
                    seen[name].run(shown, y)
            batch_count, images = batch_count + 1, images + len(x)
        if not batch_count:
            raise UserError("norm report: there was no batch")
        found = tuple(_layer(name, layers[name], seen, threshold) for name in order)
    return NormReport(found, tuple(inputs), by, threshold, batch_count, images)


def effective_rates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: str = "all",
    attack: Attack | None = None,
    by: By = "running",
    seed: int = 0,
) -> dict[str, float]:
    """Return ||g|| / ||w|| by name for the parameters that `select` picks: how fast each would learn, whoever trains it.

    g is the gradient of the mean cross-entropy over `batches`, each (x, y), of the images or of what `attack` makes of
    them. Weights before a norm layer can be scaled without changing the network: their gradient shrinks as they grow, and
    this ratio says how far a step turns them (van Laarhoven 2017, arXiv 1706.05350). Parameters that are 0, and those that
    the output does not depend on, are left out.
    The model is left as it was; attack, `by` and errors are those of `norm_report`.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> list(effective_rates(net, [(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))]))
    ['0.weight']
    """
    if by not in ("running", "batch"):
        raise UserError(one_of("statistics to normalize by", str(by), ("running", "batch")))
    inventory = Inventory(model)
    picked = [inventory.entries[name] for name in resolve(inventory, select)]
    parameters = {entry.name: entry.tensor for entry in picked if isinstance(entry.tensor, nn.Parameter)}
    if not parameters:
        raise UserError(f"selector {select!r} picks no parameter of {type(model).__name__}")
    observation = Observation(model, {}, parameters, by)
    with left_alone(model):
        for position, batch in enumerate(batches):
            x, y = _parts(batch, position)
            if y is None:
                raise UserError("effective rates need labels: batches of (x, y)")
            generator = stream(seed, "norm-report", "rates", position, device=x.device)
            observation.run(x if attack is None else attacked(model, attack, x, y, generator), y)
    if not observation.images:
        raise UserError("effective rates: there was no batch")
    return {name: rate for name in parameters if (rate := observation.rate(name)) is not None}


def study_rows(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    noise: Attack | None = None,
    batch_size: int = 256,
    seed: int = 0,
    split: str = "validation",
) -> list[dict[str, Any]]:
    """Return the rows of a trained model's norm report for a study, for one checkpoint; [] for one without norm layers.

    The passes are `clean`, `adversarial` (`attack`) and, where it is given, `noise`. `images` are bytes or floats in [0, 1],
    [n, c, h, w], on the model's device, taken in the order given as batches of at most `batch_size` and alike in size. To the
    columns of `NormReport.rows` come `split`, `attack` (spelled out, empty for rows of none) and `normalization`. A value
    that is not finite stands as None.
    """
    if not norm_layers(model):
        return []
    if not len(images):
        raise UserError("norm report: there is no image")
    x = to_float(images) if images.dtype == torch.uint8 else images
    parts = math.ceil(len(x) / batch_size)
    inputs = {"clean": None, "adversarial": attack} | ({} if noise is None else {"noise": noise})
    batches = zip(x.tensor_split(parts), labels.tensor_split(parts), strict=True)
    texts = {name: _spelled(one) for name, one in inputs.items()}
    return [
        {
            **row,
            "value": row["value"] if math.isfinite(row["value"]) else None,
            "split": split if row["pass"] else "",
            "attack": texts.get(row["pass"], ""),
            "normalization": "running" if row["pass"] else "",
        }
        for row in norm_report(model, batches, inputs=inputs, seed=seed).rows()
    ]


def _spelled(attack: Attack | None) -> str:
    describe: Callable[[], str] | None = getattr(attack, "describe", None)
    return "" if attack is None else type(attack).__name__ if describe is None else describe()


def _parts(batch: Any, position: int) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not parts or not isinstance(parts[0], Tensor) or not len(parts[0]):
        raise UserError(f"norm report: batch {position + 1} is empty, or neither x nor (x, y)")
    return parts[0], parts[1] if len(parts) > 1 else None


def _chosen(inventory: Inventory, select: str) -> dict[str, nn.Module]:
    """Return the norm layers that hold something of their own, in registration order."""
    what = type(inventory.model).__name__
    layers = {
        name: module
        for name, module in norm_layers(inventory.model).items()
        if any(True for _ in _own_tensors(module)) or not any(is_norm(part) for part in _below(module))
    }
    if not layers:
        raise UserError(f"{what} has no norm layer")
    if select == "norm":  # those without tensors too, which no selector can pick
        return layers
    owners = {owner for tensor in resolve(inventory, select) for owner in inventory.entries[tensor].owners}
    chosen = {name: module for name, module in layers.items() if module in owners}
    if not chosen:
        raise UserError(f"selector {select!r} picks no norm layer of {what}")
    return chosen


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _below(module: nn.Module) -> Iterable[nn.Module]:
    return (part for part in module.modules() if part is not module)


def _in_order(inventory: Inventory, layers: Mapping[str, nn.Module], x: Tensor) -> list[str]:
    """Return the names in execution order; what is inside one norm layer stays together, what never runs stands last."""
    starts = order_of(inventory, x[:2]).starts
    whole = norm_layers(inventory.model)

    def start(name: str) -> float:
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        outermost = next(one for one in above if one in whole)
        return starts.get(outermost, math.inf)

    return sorted(layers, key=start)  # stable: registration order where the start is the same


def _tensor(module: nn.Module, attribute: str) -> Tensor | None:
    value = getattr(module, attribute, None)
    return value.detach() if isinstance(value, Tensor) else None


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    mean, variance = _tensor(module, "running_mean"), _tensor(module, "running_var")
    return None if mean is None or variance is None or mean.shape != variance.shape else (mean, variance)


def _channels(module: nn.Module) -> int | None:
    try:
        return channels_of(module)
    except UserError:
        held = _statistics(module)
        weight = _tensor(module, "weight")
        return held[0].numel() if held is not None else None if weight is None else weight.numel()


def _numbers(values: Tensor | None) -> Numbers:
    return () if values is None else tuple(values.detach().double().flatten().tolist())


def _layer(name: str, module: nn.Module, seen: Mapping[str, Observation], threshold: float) -> NormLayer:
    scale, held = _tensor(module, "weight"), _statistics(module)
    eps = _eps(module)
    stretch = None
    if held is not None:
        stretch = lipschitz(scale, held[1], eps)
    elif isinstance(module, ScaleShift) and scale is not None:
        stretch = scale.abs()
    return NormLayer(
        name=name,
        kind=type(module).__name__,
        scale=_numbers(scale),
        shift=_numbers(_tensor(module, "bias")),
        running_mean=_numbers(held[0] if held else None),
        running_variance=_numbers(held[1] if held else None),
        lipschitz=_numbers(stretch),
        dead=tuple(place for place, value in enumerate(_numbers(scale)) if abs(value) < threshold),
        passes={one: _pass(name, module, o) for one, o in seen.items() if o.moments[name].forwards},
    )


def _eps(module: nn.Module) -> float:
    eps = getattr(module, "eps", None)
    return float(eps) if isinstance(eps, int | float) else 0.0


def _pass(name: str, module: nn.Module, seen: Observation) -> LayerPass:
    moments, held, eps = seen.moments[name], _statistics(module), _eps(module)
    mean, variance = moments.mean.cpu(), moments.variance.cpu()
    known = held is not None and held[0].shape == mean.shape
    running = (held[0].cpu(), held[1].cpu()) if held is not None and known else None
    stretch = None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and len(variance):
        scale = _tensor(module, "weight")
        stretch = lipschitz(None if scale is None else scale.cpu(), variance, eps)
    return LayerPass(
        forwards=moments.forwards,
        mean=_numbers(mean),
        variance=_numbers(variance),
        mean_l2=l2(running[0], mean) if running else None,
        variance_l2=l2(running[1], variance) if running else None,
        kl=_numbers(symmetric_kl(*running, mean, variance, eps)) if running else (),
        wasserstein=_numbers(wasserstein(*running, mean, variance)) if running else (),
        lipschitz=_numbers(stretch),
        scale_rate=seen.rate(f"{name}.weight"),
        shift_rate=seen.rate(f"{name}.bias"),
    )
