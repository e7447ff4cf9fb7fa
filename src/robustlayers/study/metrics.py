"""The numbers that a study measures for each arm, seed and checkpoint, by the names of their rows: what claims speak of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

from torch import nn

from robustlayers.core.errors import UserError, nearest
from robustlayers.core.quantities import pixels_text
from robustlayers.evaluation import CORRUPTIONS
from robustlayers.evaluation._views import branches_of
from robustlayers.evaluation.sanity import _STEPS, _grid
from robustlayers.selection.inventory import norm_layers
from robustlayers.study.claim_syntax import spelled
from robustlayers.study.extras import families_of
from robustlayers.study.finals import NAME, AutoAttack, measured_attack, name_of
from robustlayers.study.schema import Recipe
from robustlayers.study.semantics import build_threat, load_data, measured_attacks, model_for_checks

__all__ = ["FACTS", "NUMBERS", "measured_metrics", "unmeasured"]

FACTS = ("trained_share", "trained_parameters", "forward_passes", "backward_passes")
"""Metrics of a whole run, the same for every seed or known before it."""

_SCALES = ("norm_scaled_channels", "norm_dead_channels", "norm_dead_share")
_DISTANCES = ("norm_kl_mean_clean", "norm_kl_mean_adversarial", "norm_kl_mean_noise")

NUMBERS = (*(fact for fact in FACTS if fact != "trained_share"), *_SCALES[:2], *_DISTANCES)
"""Metrics that are no shares, so that a difference of them is not told in percentage points."""

_ALWAYS = ("clean", "robust", "clean_lowest_class", "robust_lowest_class", "ece", "train_clean", "train_robust")
_HELD_OUT = ("validation_clean", "validation_robust")
_OF_GROUPS = ("moved_parameters", "moved_buffers", "relative_l2", "largest", "effective_lr", "gradient_passes")


def measured_metrics(recipe: Recipe, *, model: bool = True) -> tuple[str, ...]:
    """Return the names of all rows that a run of this recipe will have at each checkpoint, and the facts of the run.

    Without the `model`, which may not be what can be built, it is taken for one with norm layers and without branches.

    Raises `UserError` for attacks, data or a model that there are not.
    """
    attacks = measured_attacks(recipe)
    names = [*_ALWAYS[:2], *attacks, *_ALWAYS[2:]]
    for name, attack in attacks.items():
        if isinstance(attack, AutoAttack):
            names += [f"{name}:{part}" for part in attack.attacks]
    if recipe.data.validation:
        names += [*_HELD_OUT, *(_of_norm_layers(recipe) if model else (*_SCALES, *_DISTANCES))]
    names += _corrupted(recipe)
    names += _sanity(recipe) if recipe.evaluate.sanity else ()
    if recipe.evaluate.branches and model:
        branches = branches_of(_model(recipe))
        crafting = [name for name, attack in attacks.items() if not isinstance(attack, AutoAttack)]
        names += [f"clean@{branch}" for branch in branches]
        names += [f"{name}@{on}>{by}" for name in crafting for on in branches for by in branches]
    return (*names, *FACTS)


def unmeasured(name: str, recipe: Recipe, names: Iterable[str]) -> str:
    """Return the sentence about a metric that is none of `names`: the setting that would measure it, or near names.

    >>> from robustlayers.study.schema import Recipe
    >>> recipe = Recipe.model_validate({"data": {"name": "fashion-mnist-mini"}, "model": {"name": "small-cnn"},
    ...     "threat": {"norm": "linf", "eps": "8/255"}, "phases": [{"name": "a", "epochs": 1, "train": {"all": "natural"}}]})
    >>> unmeasured("corrupted:fog", recipe, ["clean", "robust"])
    "metric 'corrupted:fog' is not measured; evaluate: {corruptions: [fog]} would measure it; allowed: clean, robust"
    >>> unmeasured("robst", recipe, ["clean", "robust"])
    "unknown metric 'robst'; nearest: robust; allowed: clean, robust"
    """
    names = sorted(names)
    hint = ""
    with suppress(UserError):  # whatever else is wrong with the recipe is told where it stands
        hint = _hint(name, recipe, names)
    if hint:
        text = f"metric {name!r} is not measured; {hint}"
    else:
        close = [spelled(one) for one in nearest(name, names)]
        text = f"unknown metric {name!r}" + (f"; nearest: {', '.join(close)}" if close else "")
    return f"{text}; allowed: {', '.join(_families(names))}"


def _model(recipe: Recipe) -> nn.Module:
    return model_for_checks(recipe.model, load_data(recipe.data.name))


def _of_norm_layers(recipe: Recipe) -> list[str]:
    """Return what the look at norm layers finds: scales where there are any, distances of statistics where there are."""
    layers = norm_layers(_model(recipe)).values()

    def has(attribute: str) -> bool:
        return any(getattr(layer, attribute, None) is not None for layer in layers)

    return [*(_SCALES if has("weight") else ()), *(_DISTANCES if has("running_mean") else ())]


def _corrupted(recipe: Recipe) -> list[str]:
    config = recipe.evaluate.corruptions
    if not config.families:
        return []
    families = families_of(config, load_data(recipe.data.name).test.shape[0])
    severities = sorted(config.severities)
    return [
        *(["corrupted"] if families else []),
        *(f"corrupted:{family}" for family in families),
        *(f"corrupted:{family}:{severity}" for family in families for severity in severities),
    ]


def _sanity(recipe: Recipe) -> list[str]:
    """Return the rows of a model that has a gradient; one without has only the first and the last of the attacks."""
    threat = build_threat(recipe.threat)
    attacks = ["clean", "fgsm", "pgd-20", "pgd-margin-20", *(["square-1000"] if threat.norm != "l1" else [])]
    values = load_data(recipe.data.name).test.images[0].numel()
    return [
        *(f"sanity:{attack}" for attack in attacks),
        *(f"sanity:eps={pixels_text(eps)}" for eps in (0.0, *_grid(threat, values))),
        *(f"sanity:steps={steps}" for steps in _STEPS),
    ]


def _families(names: Iterable[str]) -> list[str]:
    """Return names as a message lists them: one pattern for many of a kind, and quotes where the language needs them."""
    patterns = (
        (r"corrupted:[a-z-]+:\d", "corrupted:FAMILY:SEVERITY"),
        (r"corrupted:[a-z-]+", "corrupted:FAMILY"),
        (r"(sanity:eps)=.*", r"\1=EPS"),
        (r"(sanity:steps)=.*", r"\1=STEPS"),
        (r"(autoattack|apgd-.*):.*", r"\1:PART"),
        (r"clean@.*", "clean@BRANCH"),
        (r"(.*)@.*>.*", r"\1@CRAFTED>MEASURED"),
    )
    found = []
    for name in names:
        for pattern, text in patterns:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, text, name)
                break
        found.append(spelled(name))
    return list(dict.fromkeys(found))


def _hint(name: str, recipe: Recipe, names: Iterable[str]) -> str:
    """Return what a study would have to have for a metric; nothing for one that no study has."""
    head, _, rest = name.partition(":")
    evaluate = recipe.evaluate
    if any(known.startswith((f"{name}>", f"{name}=")) for known in names):
        return "quote a name that holds > or ="
    if name in _OF_GROUPS:
        return "it is of a phase and a group, and a claim names an arm only"
    if head == "corrupted":
        return _corruption_hint(rest, recipe)
    if head == "sanity" and not evaluate.sanity and name in _sanity(recipe):
        return "evaluate: {sanity: true} would measure it"
    if name in (*_HELD_OUT, *_SCALES, *_DISTANCES):
        if not recipe.data.validation:
            return "it is of validation images, and data: {validation: 0} leaves none"
        return "the model has no norm layers with such tensors"
    if "@" in name:
        if not evaluate.branches:
            return "evaluate: {branches: true} would measure it, of a model whose norm layers have branches"
        known = any("@" in one for one in names)
        return "" if known or branches_of(_model(recipe)) else "the norm layers of the model have no branches"
    try:
        attack = measured_attack(head, build_threat(recipe.threat))
    except UserError:
        return ""
    if rest and not (isinstance(attack, AutoAttack) and rest in attack.attacks):
        return ""
    if isinstance(attack, AutoAttack):
        return _autoattack_hint(recipe)
    return f"evaluate: {{attacks: [..., {head}]}} would measure it" if name_of(attack) == head else ""


def _corruption_hint(rest: str, recipe: Recipe) -> str:
    family, _, severity = rest.partition(":")
    config = recipe.evaluate.corruptions
    channels = load_data(recipe.data.name).test.shape[0]
    if not rest:
        return "evaluate: {corruptions: all} would measure it"
    if family not in CORRUPTIONS or (severity and severity not in tuple("12345")):
        return ""
    allowed = CORRUPTIONS[family].channels
    if allowed is not None and channels not in allowed:
        return f"{family} is not for images with {channels} channel(s)"
    if family in families_of(config, channels):
        return f"{severity} among evaluate.corruptions.severities would measure it"
    if not config.families:
        return f"evaluate: {{corruptions: [{family}]}} would measure it"
    return f"{family} among evaluate.corruptions would measure it"


def _autoattack_hint(recipe: Recipe) -> str:
    made = [name for name, attack in measured_attacks(recipe).items() if isinstance(attack, AutoAttack)]
    if made:
        return f"the name is for the standard on all test images, and here it is {', '.join(map(spelled, made))}"
    return f"evaluate: {{attacks: [..., {NAME}]}} would measure it, on all test images"
