"""The presets themselves: published experiments, each a function of its options that returns plain phases.

A preset is one function and one line of `PRESETS`. The types of its parameters are what its options may be, a parameter
without a default is an option that must be given, and the first sentence of its docstring is what lists show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

from robustlayers.core.errors import Fault, UserError

__all__ = ["PRESETS", "File", "Made", "Preset", "Selector"]

Objective = Literal["natural", "adversarial"]
Statistics = Literal["follow", "frozen"]
Selector = NewType("Selector", str)
File = NewType("File", str)


@dataclass(frozen=True)
class Made:
    """What a preset makes: its phases in order, each with `train` and, if it has one, `start`; and groups they name."""

    phases: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A preset's function, and the names of all phases that it may make."""

    make: Callable[..., Made]
    phases: tuple[str, ...]


def _bakiskan(
    code: Literal["A1N2", "N1A2", "N2A1", "A2N1", "A1A2", "A2A1", "N1N2", "N2N1"],
    cut: Selector | None = None,
    single: Selector | None = None,
) -> Made:
    """Train the whole network, freeze one part, begin the other anew and train it with the second objective.

    Bakiskan, Cekic and Madhow 2022 and their code. The code's first letter is the objective of the early part, the second
    of the late one (A adversarial, N natural); the digits say which phase each part is from. `cut`: the early part is all
    that runs before this module, the late one begins with it. Or `single`: the early part is this layer, the late one
    all others.

    whole: {all: objective of the part with 1}
    part:  the part with 1 frozen; the part with 2 starts with reinitialize, running statistics included

    The published code lets the running statistics of the frozen part go on; here frozen is frozen. Its cuts are in the
    order of registration, these in the order of execution.
    """
    if (cut is None) == (single is None):
        raise UserError(Fault("needs cut or single, and only one of them: cut: layer2.1.bn1", path="cut"))
    if cut is not None:
        early, late, groups = "early", "late", {"early": f"before({cut})", "late": f"after({cut})"}
    else:
        early, late, groups = "single", "rest", {"single": str(single)}
    signals = {"A": "adversarial", "N": "natural"}
    order = {part: int(code[place + 1]) for part, place in ((early, 0), (late, 2))}
    objectives = {part: signals[code[place]] for part, place in ((early, 0), (late, 2))}
    kept, anew = sorted(order, key=lambda part: order[part])
    second = {part: "frozen" if part == kept else objectives[part] for part in (early, late)}
    return Made(
        {
            "whole": {"train": {"all": objectives[kept]}},
            "part": {"train": second, "start": {anew: "reinitialize"}},
        },
        groups,
    )


def _walter_a(load: File | None = None) -> Made:
    """Adversarially fine-tune only the norm layers of a naturally trained network.

    Walter, Stutz and Schiele 2022 (arXiv 2204.12393), first experiment; the paper names no hyperparameters.

    pretrain: {all: natural}; left out where `load` names a safetensors file with the trained network
    adapt:    {norm: adversarial, rest: frozen}
    """
    adapt: dict[str, Any] = {"train": {"norm": "adversarial", "rest": "frozen"}}
    if load is None:
        return Made({"pretrain": {"train": {"all": "natural"}}, "adapt": adapt})
    return Made({"adapt": {**adapt, "start": {"norm": {"load": load}, "rest": {"load": load}}}})


def _walter_b() -> Made:
    """Adversarially train only the norm layers of a network that was never trained.

    Walter, Stutz and Schiele 2022 (arXiv 2204.12393), second experiment: the control of walter-a.

    adapt: {norm: adversarial, rest: frozen}
    """
    return Made({"adapt": {"train": {"norm": "adversarial", "rest": "frozen"}}})


def _frankle(
    objective: Objective = "natural",
    initializer: Literal["uniform", "one", "oneone", "signs"] = "uniform",
    train: Literal["norm", "head", "norm+head", "shortcut", "random", "all-but-norm", "all"] = "norm",
    statistics: Statistics = "follow",
) -> Made:
    """Train only the norm layers of a random network, or as a control another part of it.

    Frankle, Schwab and Morcos 2021 (arXiv 2003.00152) and their code. The norm scales start as `initializer` says, also
    where they stay frozen: from U[0, 1], at 1, at 1 with the shifts at 1 (oneone), or from U[-1, 1] (signs); other shifts
    are as the model makes them, which is 0. As published, running statistics follow the data whatever is trained;
    `statistics: frozen` keeps them, and is what models without them need for a control. `shortcut` are the convolutions of
    shortcuts; `random` is as many entries of convolutions as the norm layers have parameters, scattered over all of them
    and not as many for each channel.

    part: {what `train` names: objective, norm.statistics: objective, rest: frozen}
    """
    norms = train in ("norm", "norm+head", "all")
    affine = objective if norms else "frozen"
    followed = objective if statistics == "follow" else "frozen"
    scale = {"uniform": "scale-uniform", "signs": "scale-signs"}.get(initializer, "scale-one")
    groups: dict[str, str]
    if initializer == "oneone":  # two starts, so two groups
        start = {"norm.weight": scale}
        if affine == followed:
            groups = {"norm.weight": affine, "norm - norm.weight": affine}
            start["norm - norm.weight"] = "shift-one"
        else:
            groups = {"norm.weight": affine, "norm.bias": affine, "norm.statistics": followed}
            start["norm.bias"] = "shift-one"
    elif affine == followed:
        groups, start = {"norm": affine}, {"norm": scale}
    else:
        groups, start = {"norm.affine": affine, "norm.statistics": followed}, {"norm.affine": scale}
    other = {
        "head": "head",
        "norm+head": "head",
        "shortcut": "shortcut & conv",
        "random": "random(like=norm, of=conv)",
    }.get(train)
    if other is not None:
        groups[other] = objective
    groups["rest"] = objective if train in ("all", "all-but-norm") else "frozen"
    return Made({"part": {"train": groups, "start": start}})


def _partial_at(scenario: Literal["st", "at", "partial-at", "full-at"] = "partial-at") -> Made:
    """Train an encoder, then its classifier: adversarial first and then adversarial on the new head alone.

    The training scenarios of the code published as CL-Robustness, with supervised pretraining in place of contrastive.
    The head that the encoder was trained with is replaced by a new one.

    pretrain: {all: natural} for st, else {all: adversarial}
    finetune: st and at {head: natural, rest: frozen}; partial-at {head: adversarial, rest: frozen};
              full-at {head: adversarial, rest: adversarial}; the head starts with reinitialize
    """
    first = "natural" if scenario == "st" else "adversarial"
    head = "adversarial" if scenario in ("partial-at", "full-at") else "natural"
    rest = "adversarial" if scenario == "full-at" else "frozen"
    return Made(
        {
            "pretrain": {"train": {"all": first}},
            "finetune": {"train": {"head": head, "rest": rest}, "start": {"head": "reinitialize"}},
        }
    )


def _norm_first(
    first: Objective = "adversarial", second: Objective = "adversarial", statistics: Statistics = "follow"
) -> Made:
    """Train the norm layers first, then everything else while their scales and shifts stay.

    The partial adversarial pretraining of norm layers, after the abstract of Zeise and Vlaar 2025. Running statistics
    follow in the second phase, since what they describe changes; `statistics: frozen` keeps them.

    norm:   {norm: first, rest: frozen}
    others: {norm.affine: frozen, rest: second}
    """
    return Made({"norm": _norm_alone(first), "others": _all_but_norm(second, statistics)})


def _norm_last(
    first: Objective = "adversarial", second: Objective = "adversarial", statistics: Statistics = "follow"
) -> Made:
    """Train everything but the norm layers' scales and shifts first, then the norm layers alone.

    The counterpart of norm-first. With `statistics: frozen` the first phase leaves the running statistics as they are in
    a new network, mean 0 and variance 1: it normalizes nothing.

    others: {norm.affine: frozen, rest: first}
    norm:   {norm: second, rest: frozen}
    """
    return Made({"others": _all_but_norm(first, statistics), "norm": _norm_alone(second)})


def _norm_alone(objective: str) -> dict[str, Any]:
    return {"train": {"norm": objective, "rest": "frozen"}}


def _all_but_norm(objective: str, statistics: str) -> dict[str, Any]:
    return {"train": {"norm.affine" if statistics == "follow" else "norm": "frozen", "rest": objective}}


PRESETS: dict[str, Preset] = {
    "bakiskan": Preset(_bakiskan, ("whole", "part")),
    "walter-a": Preset(_walter_a, ("pretrain", "adapt")),
    "walter-b": Preset(_walter_b, ("adapt",)),
    "frankle": Preset(_frankle, ("part",)),
    "partial-at": Preset(_partial_at, ("pretrain", "finetune")),
    "norm-first": Preset(_norm_first, ("norm", "others")),
    "norm-last": Preset(_norm_last, ("others", "norm")),
}
