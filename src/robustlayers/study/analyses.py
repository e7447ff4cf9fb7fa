"""The analyses that `robustlayers analyse` knows: each is one function and one line of the registry.

A function takes a `Look` and returns what it `Found`; `load` makes the result objects of `robustlayers.analysis` again
from what was kept, by the name of the figure that is drawn from each. `cost` names the parts of the work and how many
passes of single images each takes, which the time left is told from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from robustlayers.core.errors import UserError, one_of
from robustlayers.study import _inside_features as features
from robustlayers.study import _inside_pictures as pictures
from robustlayers.study import _inside_rift as rift
from robustlayers.study import _inside_similarity as similarity
from robustlayers.study import _inside_training as training
from robustlayers.study import _inside_transfer as transfer
from robustlayers.study import _inside_weights as weights
from robustlayers.study._looks import Arrays, Found, Look, Payload

__all__ = ["ANALYSES", "Analysis", "analysis_named"]


@dataclass(frozen=True)
class Analysis:
    """One analysis: what it looks at, what it writes, what it costs.

    `alone`: of one arm; `between`: of an arm against another one, which must be named, and `alike` if the two nets must
    have the same tensors for it; `together`: of all arms that are looked at, once. `trains`: makes nets of its own, so
    that it is done only where it is named. `uses` says what decides its result beside the nets: `images`, `attack`, `select`,
    and `sources`, the earlier states of the same run. `cost` is empty where a net has nothing to look at, as `lacks` says,
    and raises `UserError` for a selector that is wrong. `version` is raised when the same look would give other numbers
    or files; reports and rows then leave out what an earlier version has found of the same look.
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
    together: bool = False
    trains: bool = False


def analysis_named(name: str) -> Analysis:
    """Return an analysis by its name; an unknown one is a `UserError` with the nearest."""
    if name not in ANALYSES:
        raise UserError(one_of("analysis", name, ANALYSES))
    return ANALYSES[name]


ANALYSES: dict[str, Analysis] = {
    one.name: one
    for one in (
        Analysis(
            "cka",
            "Representation similarity",
            "Which layers represent the same: within a net, over training, clean and attacked, between two nets?",
            True,
            True,
            "CKA and Procrustes distance of all pairs of layers with baselines, CKA of each layer over training, on each split",
            similarity.cka_cost,
            similarity.cka,
            similarity.cka_load,
            uses=("images", "attack", "select", "sources"),
            version=3,
        ),
        Analysis(
            "signal",
            "Perturbation to signal",
            "How much of a perturbation arrives at each layer, beside noise of the same size?",
            True,
            False,
            "ratio of perturbation to signal by layer and channel, as floats and as bytes, amplification of each norm layer",
            features.signal_cost,
            features.signal,
            features.signal_load,
            version=3,
        ),
        Analysis(
            "criticality",
            "Criticality",
            "Which layers does the net need as they are: with other values in their place, or the worst ones nearby?",
            True,
            False,
            "accuracy lost by layer and source, rise of the loss by layer, scores for the selectors top and bottom",
            weights.criticality_cost,
            weights.criticality,
            weights.criticality_load,
            uses=("images", "attack", "select", "sources"),
        ),
        Analysis(
            "norms",
            "Norm layers over time and across arms",
            "How far are the norm layers' statistics from what each kind of image shows them, and how many channels die?",
            True,
            False,
            "scale, shift, dead channels, distances, rates and drift of each norm layer at each kept moment of training",
            training.norms_cost,
            training.norms,
            training.norms_load,
            uses=("images", "attack", "sources"),
            lacks="no norm layer",
            version=2,
        ),
        Analysis(
            "transplant",
            "Transplants",
            "Which part of a net carries its robustness into another one?",
            False,
            True,
            "clean and robust accuracy of each net with each part of the other, statistics kept and re-estimated",
            weights.transplant_cost,
            weights.transplant,
            weights.transplant_load,
            alike=True,
        ),
        Analysis(
            "interpolation",
            "Interpolation and sharpness",
            "What lies on the way: of each part from its initial values, or between two nets?",
            True,
            True,
            "clean and robust loss and accuracy along each line, sharpness of each part",
            weights.interpolation_cost,
            weights.interpolation,
            weights.interpolation_load,
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
            training.overfitting,
            training.overfitting_load,
            uses=(),
        ),
        Analysis(
            "probes",
            "Linear probes",
            "From which layer can the class be read, on clean and on attacked images?",
            True,
            False,
            "accuracy of a linear classifier on each layer's features, fitted and tested on clean or attacked images",
            features.probes_cost,
            features.probes,
            features.probes_load,
        ),
        Analysis(
            "pictures",
            "Pictures",
            "What do the first filters and the input gradients look like, and the loss around an image?",
            True,
            False,
            "first filters, input gradients, perturbations and a loss surface, of the same images in every arm",
            pictures.pictures_cost,
            pictures.pictures,
            pictures.pictures_load,
            uses=("attack",),
        ),
        Analysis(
            "transfer",
            "Transfer between arms",
            "Do images that were crafted on one net fool the others?",
            False,
            False,
            "accuracy of each net on images crafted on each, with exact intervals",
            transfer.transfer_cost,
            transfer.transfer,
            transfer.transfer_load,
            uses=("images", "attack"),
            together=True,
        ),
        Analysis(
            "rift",
            "Robust critical fine-tuning",
            "What does the least critical group gain from clean images? One half of the images chooses, the other measures.",
            True,
            False,
            "worst-case criticality of modules and parts, accuracy on the line from the net to the fine-tuned one, its weights",
            rift.rift_cost,
            rift.rift,
            rift.rift_load,
            lacks="no weights to fine-tune",
            version=2,
            trains=True,
        ),
    )
}
"""Name -> analysis, in the order in which they are run and reported."""
