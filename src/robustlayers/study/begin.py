"""Where the groups of a phase begin: the starts of a study file, applied to the model before the phase's first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.files import file_digest, read_tensors
from robustlayers.core.random import stream_seed
from robustlayers.models import read_weights
from robustlayers.models.parts import Normalize
from robustlayers.selection import Selection
from robustlayers.study.faults import Faults
from robustlayers.study.phases import phase_epochs, phase_partition
from robustlayers.study.runs import find_run
from robustlayers.study.schema import PhaseConfig, Recipe, StartConfig
from robustlayers.study.semantics import build_model, data_of, model_for_checks
from robustlayers.study.validate import Place
from robustlayers.training import STARTS, concerned, copy_entries, interpolate, start_group

__all__ = ["INITIAL", "PRESENT", "Ends", "begin", "start_content", "start_faults", "start_notes", "start_text"]

INITIAL = "initial"
"""The untrained model, as a name that `from` takes."""

PRESENT = "present"
"""The model as the phase before left it, another name that `from` takes."""

_PLAIN = ("keep", "reinitialize")
_SOURCES = ("{load: FILE}", "{from: PHASE}", "{rewind: EPOCH}", "{run: FOLDER}")


@dataclass(frozen=True)
class Ends:
    """Where the states that a phase may start from lie."""

    phases: Mapping[str, tuple[Path, Path]]  # earlier phase -> its best and its last state
    epoch: Callable[[int], Path]  # epoch over all phases -> the state at its end


def begin(
    model: nn.Module,
    recipe: Recipe,
    phase: PhaseConfig,
    seed: int,
    first_epoch: int,
    ends: Ends,
) -> None:
    """Apply the phase's starts, or what it sets, in place.

    `reinitialize` copies from a model built anew from a seed that is derived from (seed, first epoch of the phase).
    """
    starts = phase.assign or phase.start
    if all(start == "keep" for start in starts.values()):
        return
    partition = phase_partition(model, recipe, phase)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for group, start in starts.items():
        if isinstance(start, str):
            _plain(partition[group], start, recipe, stream_seed(seed, "reinitialize", first_epoch))
            continue
        what = start_text(start)
        if start.load is not None:
            source, strict = read_weights(start.load, start.map), True
        elif start.phase == INITIAL or start.rewind == 0:
            source, strict = build_model(recipe.model, data_of(recipe.data)[0], seed).state_dict(), False
        elif (
            start.phase == PRESENT
        ):  # as all was before this phase: exchanging two groups does not depend on their order
            source, strict = before, False
        elif start.run is not None:
            source, strict = read_tensors(find_run(start).state(seed)), False
        elif start.rewind is not None:
            source, strict = read_tensors(ends.epoch(start.rewind)), False
        else:
            source, strict = read_tensors(ends.phases[str(start.phase)][start.checkpoint == "last"]), False
        _fill(partition[group], source, start, what, strict)


def _plain(selection: Selection, start: str, recipe: Recipe, seed: int) -> None:
    if start == "reinitialize":
        fresh = build_model(recipe.model, data_of(recipe.data)[0], seed)
        copy_entries(selection, fresh.state_dict(), "the fresh model")
    else:
        start_group(selection, start, seed)


def _fill(selection: Selection, source: Mapping[str, Tensor], start: StartConfig, what: str, strict: bool) -> None:
    if start.mix == 1:
        copy_entries(selection, source, what, strict=strict)
    else:
        interpolate(selection, source, start.mix, what)


def start_faults(recipe: Recipe, place: Place, seeds: Sequence[int] = (0,)) -> list[Fault]:
    """Return what is wrong with the starts of a recipe whose groups are right."""
    found = Faults(place)
    if any(phase.start or phase.assign for phase in recipe.phases):
        dataset, train, _, _ = data_of(recipe.data)
        model = build_model(recipe.model, dataset, 0)
        earlier: list[str] = []
        epochs = 0
        for index, phase in enumerate(recipe.phases):
            starts = phase.assign or phase.start
            partition = phase_partition(model, recipe, phase) if starts else None
            for group, start in starts.items():
                with found.at("phases", index, "set" if phase.assign else "start", group):
                    assert partition is not None
                    if group not in partition.groups:
                        raise UserError(one_of("group", group, partition.groups))
                    _check(partition[group], start, earlier, epochs, seeds)
            if not phase.skipped:
                earlier.append(phase.name)
                epochs += phase_epochs(phase, len(train))
    return found.faults


def _check(
    selection: Selection, start: str | StartConfig, earlier: Sequence[str], epochs: int, seeds: Sequence[int]
) -> None:
    """Raise `UserError` if a start is unknown, does not concern its group, or names a source that is not there."""
    if isinstance(start, str):
        if start in _PLAIN:
            return
        if start not in STARTS:
            raise UserError(f"{one_of('start', start, [*_PLAIN, *STARTS])}; or {', '.join(_SOURCES)}")
        if not concerned(selection, start):
            raise UserError(f"start {start!r} concerns no tensor of the group")
        return
    sources = [start.load, start.run, start.rewind]
    if start.run is None:
        sources.append(start.phase)
    if sum(source is not None for source in sources) != 1:
        raise UserError(f"a start is a word, {', '.join(_SOURCES[:-1])} or {_SOURCES[-1]}")
    idle = [
        key
        for key, given, allowed in (
            ("map", start.map, start.load),
            ("arm", start.arm, start.run),
            ("checkpoint", start.checkpoint != "last", start.run or start.phase not in (None, INITIAL, PRESENT)),
        )
        if given and not allowed
    ]
    if idle:
        raise UserError(f"{' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no meaning there")
    if start.rewind is not None:
        if start.rewind > epochs:
            raise UserError(
                f"rewind: {start.rewind} is after the {epochs} epoch(s) before this phase; 0 is the untrained model"
            )
        return
    if start.run is not None:
        run = find_run(start)
        for seed in seeds:
            # The model was built for this check alone: copying is the check.
            _fill(selection, read_tensors(run.state(seed)), start, start_text(start), False)
        return
    if start.phase is not None:
        if start.phase not in (*earlier, INITIAL, PRESENT):
            raise UserError(one_of("earlier phase", start.phase, [*earlier, INITIAL, PRESENT]))
        return
    _fill(selection, read_weights(str(start.load), start.map), start, str(start.load), True)


def start_notes(recipe: Recipe, phase: PhaseConfig) -> list[str]:
    """Return a line for each file that a phase loads which lacks an input normalization that nobody gave.

    Other files may lack it, so that it is no fault; then a model's own mean and standard deviation stay.
    """
    notes = []
    for group, start in (phase.assign or phase.start).items():
        if isinstance(start, str) or start.load is None:
            continue
        selection = phase_partition(model_for_checks(recipe.model, data_of(recipe.data)[0]), recipe, phase)[group]
        entries = [selection.inventory.entries[name] for name in selection.parts]
        source = read_weights(start.load, start.map)
        kept = [
            entry.name
            for entry in entries
            if isinstance(entry.module, Normalize)
            and entry.attribute not in recipe.model.options
            and not any(alias in source for alias in entry.names)
        ]
        if kept:
            notes.append(
                f"phase {phase.name}, group {group}: {start.load} has no {', '.join(kept)}; the model's own are used; "
                "give them as options of the model"
            )
    return notes


def start_content(start: str | StartConfig) -> Any:
    """Return what decides a start's result, for the identity of a phase: a file or a run counts by its content."""
    if isinstance(start, str):
        return start
    mix = {} if start.mix == 1 else {"mix": start.mix}
    if start.load is not None:
        return {"load": file_digest(Path(start.load)), "map": start.map, **mix}
    if start.rewind is not None:
        return {"rewind": start.rewind, **mix}
    chosen = {} if start.checkpoint == "last" else {"checkpoint": start.checkpoint}
    if start.run is not None:
        return {"run": find_run(start).node, **chosen, **mix}
    return {"from": start.phase, **chosen, **mix}


def start_text(start: str | StartConfig) -> str:
    """Return a start as a person reads it."""
    if isinstance(start, str):
        return start
    best = "best of " if start.checkpoint == "best" else ""
    if start.load is not None:
        text = f"load {start.load}"
    elif start.rewind is not None:
        text = f"rewind to epoch {start.rewind}"
    elif start.run is not None:
        text = f"from {best}{start.run}" + (f", arm {start.arm}" if start.arm else "")
        text += f", phase {start.phase}" if start.phase else ""
    else:
        text = f"from {best}{start.phase}"
    return text if start.mix == 1 else f"{1 - start.mix:g} own + {start.mix:g} {text}"
