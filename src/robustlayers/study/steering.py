"""How a trained net is measured: by the norm policy's `evaluate` switch of its last training phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from robustlayers.normalization import NormPolicy, Switch, inference
from robustlayers.normalization.context import normalization
from robustlayers.study.phases import build_policy
from robustlayers.study.plan import PhaseNode

__all__ = ["measured_as", "policy_of"]

_DEFAULT = NormPolicy().evaluate


def policy_of(nodes: Sequence[PhaseNode]) -> Switch:
    """Return how the net at the end of these phases is measured."""
    training = [node for node in nodes if node.phase.kind == "train"]
    return build_policy(training[-1].phase.normalization, training[-1].recipe.groups).evaluate if training else _DEFAULT


def measured_as(model: nn.Module, switch: Switch) -> tuple[nn.Module | Callable[[Tensor], Tensor], str]:
    """Return the net as it is measured, and that in words for the rows.

    By running statistics it is the model itself, of which attacks know a faster equivalent; otherwise a function.
    """
    by = "running" if switch.by == "auto" else switch.by
    text = switch.statistics_text if switch.by != "auto" else "running"
    text += "" if switch.branch is None else f", branch {switch.branch}"
    text += "" if switch.condition is None else f", condition {switch.condition:g}"
    if (by, switch.branch, switch.condition) == ("running", None, None):
        return model, text

    def forward(x: Tensor) -> Tensor:
        with (
            inference(model),
            normalization(model, by=by, alpha=switch.alpha, branch=switch.branch, condition=switch.condition),
        ):
            return model(x)

    return forward, text
