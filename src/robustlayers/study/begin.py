"""Where the groups of a phase begin: the starts of a study file, applied to the model before the phase's first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.files import file_digest, read_tensors
from robustlayers.core.random import stream_seed
from robustlayers.models import Network, read_weights
from robustlayers.selection import Partition, Selection
from robustlayers.study.faults import Faults
from robustlayers.study.schema import PhaseConfig, Recipe, StartConfig
from robustlayers.study.semantics import build_model, data_of, phase_groups
from robustlayers.study.validate import Place
from robustlayers.training import STARTS, concerned, copy_entries, start_group

__all__ = ["INITIAL", "begin", "start_content", "start_faults", "start_text"]

INITIAL = "initial"
"""The untrained model, as a name that `from` takes."""

_PLAIN = ("keep", "reinitialize")


def begin(
    model: Network, recipe: Recipe, phase: PhaseConfig, seed: int, first_epoch: int, ends: Mapping[str, Path]
) -> None:
    """Apply the phase's starts in place; `ends` are the files with the state after each earlier phase.

    `reinitialize` copies from a model built anew from a seed that is derived from (seed, first epoch of the phase).
    """
    if all(start == "keep" for start in phase.start.values()):
        return
    partition = Partition(model, phase_groups(recipe, phase))
    dataset = data_of(recipe.data)[0]
    fresh = stream_seed(seed, "reinitialize", first_epoch)
    for group, start in phase.start.items():
        selection = partition[group]
        if start == "reinitialize":
            copy_entries(selection, build_model(recipe.model, dataset, fresh).state_dict(), "the fresh model")
        elif isinstance(start, str):
            start_group(selection, start, fresh)
        elif start.load is not None:
            copy_entries(selection, read_weights(start.load, start.map), start.load, strict=True)
        elif start.phase == INITIAL:
            copy_entries(selection, build_model(recipe.model, dataset, seed).state_dict(), "the untrained model")
        else:
            copy_entries(selection, read_tensors(ends[str(start.phase)]), f"phase {start.phase}")


def start_faults(recipe: Recipe, place: Place) -> list[Fault]:
    """Return what is wrong with the starts of a recipe whose groups are right."""
    found = Faults(place)
    if any(phase.start for phase in recipe.phases):
        model = build_model(recipe.model, data_of(recipe.data)[0], 0)
        for index, phase in enumerate(recipe.phases):
            partition = Partition(model, phase_groups(recipe, phase))
            earlier = [before.name for before in recipe.phases[:index] if before.epochs]
            for group, start in phase.start.items():
                with found.at("phases", index, "start", group):
                    if group not in partition.groups:
                        raise UserError(one_of("group", group, partition.groups))
                    _check(partition[group], start, earlier)
    return found.faults


def _check(selection: Selection, start: str | StartConfig, earlier: Sequence[str]) -> None:
    """Raise `UserError` if a start is unknown, does not concern its group, or names a source that is not there."""
    if isinstance(start, str):
        if start in _PLAIN:
            return
        if start not in STARTS:
            raise UserError(one_of("start", start, [*_PLAIN, *STARTS, "{load: FILE}", "{from: PHASE}"]))
        if not concerned(selection, start):
            raise UserError(f"start {start!r} concerns no tensor of the group")
        return
    if (start.load is None) == (start.phase is None):
        raise UserError("a start is a word, {load: FILE} or {from: PHASE}")
    if start.phase is not None:
        if start.phase not in (*earlier, INITIAL):
            raise UserError(one_of("earlier phase", start.phase, [*earlier, INITIAL]))
        return
    # The model was built for this check alone: copying is the check.
    copy_entries(selection, read_weights(str(start.load), start.map), str(start.load), strict=True)


def start_content(start: str | StartConfig) -> Any:
    """Return what decides a start's result, for the identity of a phase: a file counts by its content."""
    if isinstance(start, str):
        return start
    if start.load is not None:
        return {"load": file_digest(Path(start.load)), "map": start.map}
    return {"from": start.phase}


def start_text(start: str | StartConfig) -> str:
    """Return a start as a person reads it."""
    if isinstance(start, str):
        return start
    return f"load {start.load}" if start.load is not None else f"from {start.phase}"
