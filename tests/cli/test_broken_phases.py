"""Mistakes in what a phase may do beside training: recalibrations, sets, sources, windows, ascents, averages, stops.

Each case changes a valid study and names all lines on standard error, from the number of the line on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# The second phase of the base study begins at line 18; a key after its name is on line 19.
PHASE = "name: adapt\n"
WHOLE = "    epochs: 1\n    train:\n      norm: adversarial\n      rest: frozen\nfactors:"
NONE = "{phases.adapt.epochs: 0}"
MODEL = "{name: small-cnn, width: 8}"


def key(text: str) -> tuple[str, str]:
    """Add a key to the second phase, on line 19."""
    return PHASE, f"{PHASE}    {text}\n"


def instead(text: str) -> tuple[str, str]:
    """Let the second phase do something other than train, on line 19."""
    return WHOLE, f"    {text}\nfactors:"


CASES: dict[str, tuple[tuple[str, str], str]] = {
    # what a phase does
    "train and recalibrate": (
        key("recalibrate: {}"),
        "18: phases.1: train and recalibrate exclude each other; make them phases of their own",
    ),
    "recalibrate and set": (
        instead("recalibrate: {}\n    set: {norm: {from: pretrain}}"),
        "18: phases.1: recalibrate and set exclude each other; make them phases of their own",
    ),
    "nothing to do": (instead("attack: fgsm"), "18: phases.1: key 'train' is missing"),
    "no length": (
        ("    epochs: 1\n    train:\n", "    train:\n"),
        "18: phases.1: key 'epochs' is missing",
    ),
    "epochs and steps": (key("steps: 10"), "18: phases.1: epochs and steps exclude each other; give one of them"),
    "no steps": (
        ("    epochs: 1\n    train:\n", "    steps: 0\n    train:\n"),
        "19: phases.1.steps: 0 is not allowed; allowed: at least 1",
    ),
    "half a step": (
        ("    epochs: 1\n    train:\n", "    steps: 2.5\n    train:\n"),
        "19: phases.1.steps: 2.5 is not allowed; allowed: a whole number",
    ),
    "key of a phase": (
        key("recalibrat: {}"),
        "19: phases.1.recalibrat: unknown key 'recalibrat'; nearest: recalibrate, ...",
    ),
    "unknown word for set": (key("sets: {}"), "19: phases.1.sets: unknown key 'sets'; nearest: set, ..."),
    # recalibrate
    "recalibrate for epochs": (
        instead("epochs: 3\n    recalibrate: {}"),
        "18: phases.1: epochs: 3 is not allowed with recalibrate; allowed: 0 or 1",
    ),
    "recalibrate on what": (
        instead("recalibrate: {on: natural}"),
        "19: phases.1.recalibrate.on: unknown value 'natural'; allowed: adversarial, clean, noise",
    ),
    "recalibrate with a momentum of 0": (
        instead("recalibrate: {momentum: 0}"),
        "19: phases.1.recalibrate.momentum: 0 is not allowed; allowed: more than 0",
    ),
    "recalibrate with a large momentum": (
        instead("recalibrate: {momentum: 1.5}"),
        "19: phases.1.recalibrate.momentum: 1.5 is not allowed; allowed: at most 1",
    ),
    "recalibrate an option": (
        instead("recalibrate: {momentun: 0.1}"),
        "19: phases.1.recalibrate.momentun: unknown key 'momentun'; nearest: momentum; allowed: ...",
    ),
    "recalibrate a list": (
        instead("recalibrate: [norm]"),
        "19: phases.1.recalibrate: a list is not allowed; allowed: a mapping",
    ),
    "recalibrate what is not there": (
        instead("recalibrate: {select: nrom}"),
        "19: phases.1.recalibrate: unknown selector 'nrom'; nearest: norm",
    ),
    "recalibrate what has no statistics": (
        instead("recalibrate: {select: conv}"),
        "19: phases.1.recalibrate: selector '(conv) & norm.statistics' picks nothing from SmallCNN",
    ),
    "recalibrate a part of the statistics": (
        instead("recalibrate: {select: bn1.running_mean}"),
        "19: phases.1.recalibrate: recalibration: a layer's statistics belong together, and the selection leaves out ...",
    ),
    "recalibrate with an attack that is not there": (
        instead("recalibrate: {on: adversarial}\n    attack: pgdd-3"),
        "20: phases.1.attack: unknown attack 'pgdd'; nearest: pgd, apgd, apgd-t; allowed: ...",
    ),
    # set
    "set nothing": (instead("set: {}"), "19: phases.1.set: must not be empty"),
    "set for epochs": (
        instead("set: {norm: {from: pretrain}}\n    epochs: 2"),
        "18: phases.1: epochs: 2 is not allowed with set; allowed: 0 or 1",
    ),
    "set a word": (
        instead("set: {norm: reset}"),
        "19: phases.1.set.norm: unknown start 'reset'; allowed: keep, ...; or {load: FILE}, {from: PHASE}, ...",
    ),
    "set a selector": (
        instead("set: {nrom: {from: pretrain}}"),
        "19: phases.1.set.nrom: unknown selector 'nrom'; nearest: norm",
    ),
    "set what does not concern it": (
        instead("set: {conv: reset-statistics}"),
        "19: phases.1.set.conv: start 'reset-statistics' concerns no tensor of the group",
    ),
    "set twice": (
        instead("set: {norm: {from: initial}, bn1: {from: initial}}"),
        "19: phases.1.set.bn1: overlaps with group 'norm': bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 1 more",
    ),
    "set from a later phase": (
        instead("set: {norm: {from: adapt}}"),
        "19: phases.1.set.norm: unknown earlier phase 'adapt'; allowed: initial, present, pretrain",
    ),
    # sources
    "two sources": (
        instead("set: {norm: {from: pretrain, rewind: 0}}"),
        "19: phases.1.set.norm: a start is a word, {load: FILE}, {from: PHASE}, {rewind: EPOCH} or {run: FOLDER}",
    ),
    "no source": (
        instead("set: {norm: {mix: 0.5}}"),
        "19: phases.1.set.norm: a start is a word, {load: FILE}, {from: PHASE}, {rewind: EPOCH} or {run: FOLDER}",
    ),
    "mix of nothing": (
        instead("set: {norm: {from: pretrain, mix: 0}}"),
        "19: phases.1.set.norm.mix: 0 is not allowed; allowed: more than 0",
    ),
    "mix of too much": (
        instead("set: {norm: {from: pretrain, mix: 3/2}}"),
        "19: phases.1.set.norm.mix: '3/2' is not allowed; allowed: at most 1",
    ),
    "rewind to the future": (
        instead("set: {norm: {rewind: 2}}"),
        "19: phases.1.set.norm: rewind: 2 is after the 1 epoch(s) before this phase; 0 is the untrained model",
    ),
    "rewind to before the beginning": (
        instead("set: {norm: {rewind: -1}}"),
        "19: phases.1.set.norm.rewind: -1 is not allowed; allowed: at least 0",
    ),
    "rewind to a name": (
        instead("set: {norm: {rewind: pretrain}}"),
        "19: phases.1.set.norm.rewind: 'pretrain' is not allowed; allowed: a whole number",
    ),
    "checkpoint": (
        instead("set: {norm: {from: pretrain, checkpoint: bst}}"),
        "19: phases.1.set.norm.checkpoint: unknown value 'bst'; nearest: best, last; allowed: best, last",
    ),
    "checkpoint of the untrained model": (
        instead("set: {norm: {from: initial, checkpoint: best}}"),
        "19: phases.1.set.norm: checkpoint has no meaning there",
    ),
    "arm and map without a run and a file": (
        instead("set: {norm: {from: pretrain, arm: norm, map: {a: b}}}"),
        "19: phases.1.set.norm: map and arm have no meaning there",
    ),
    "run that is not there": (
        instead("set: {norm: {run: runs/nowhere}}"),
        "19: phases.1.set.norm: runs/nowhere: no study here: it has no plan.json",
    ),
    "file that is not there": (
        instead("set: {norm: {load: nowhere.safetensors, mix: 0.5}}"),
        "19: phases.1.set.norm: nowhere.safetensors: no such file",
    ),
    # windows
    "window of a group that is not there": (
        key("windows: {nrm: [0, 0.5]}"),
        "19: phases.1.windows: unknown group 'nrm'; nearest: norm; allowed: norm, rest",
    ),
    "window of a frozen group": (
        key("windows: {rest: [0, 0.5]}"),
        "19: phases.1.windows: group 'rest' is frozen: it has no window to learn in",
    ),
    "window of three": (
        key("windows: {norm: [0, 0.5, 1]}"),
        "19: phases.1.windows: window of 'norm' has 3 numbers; ...",
    ),
    "window backwards": (
        key("windows: {norm: [0.5, 0.2]}"),
        "19: phases.1.windows: window of 'norm' is 0.5 to 0.2; allowed: from 0 to 1, the first below the second",
    ),
    "window beyond the phase": (
        key("windows: {norm: [0, 20]}"),
        "19: phases.1.windows: window of 'norm' is 0 to 20; allowed: from 0 to 1, the first below the second",
    ),
    "no one learns": (
        key("windows: {norm: [0, 0.5]}"),
        "19: phases.1.windows: no group learns after 0.5 of the phase; let the windows cover it",
    ),
    "window of words": (
        key("windows: {norm: [0, half]}"),
        "19: phases.1.windows.norm.1: 'half' is not a number; write 0.03 or 8/255",
    ),
    # perturbation
    "perturbation": (
        key("perturbation: rmp"),
        "19: phases.1.perturbation: unknown perturbation schedule 'rmp'; nearest: ramp; ...",
    ),
    "perturbation setting": (
        key("perturbation: {name: ramp, unitl: 0.5}"),
        "19: phases.1.perturbation.unitl: unknown setting of the perturbation schedule 'unitl'; nearest: until; ...",
    ),
    "perturbation without a name": (
        key("perturbation: {until: 0.5}"),
        "19: phases.1.perturbation: the perturbation schedule needs a name",
    ),
    "hinge backwards": (
        key("perturbation: {name: hinge, since: 0.5, until: 0.25}"),
        "19: phases.1.perturbation: it rises from 0.5 until 0.25 of the phase; allowed: ...",
    ),
    "low": (
        key("perturbation: {name: ramp, low: 2}"),
        "19: phases.1.perturbation...: low 2; allowed: a factor from 0 to 1",
    ),
    "perturbation in words": (
        key("perturbation: {name: ramp, until: half}"),
        "19: phases.1.perturbation.until: 'half' is not a number; write 0.03 or 8/255",
    ),
    # ascent
    "ascent": (key("ascent: apw"), "19: phases.1.ascent: unknown ascent 'apw'; nearest: awp; allowed: ..."),
    "ascent setting": (
        key("ascent: {name: awp, gamma: 0.01}"),
        "19: phases.1.ascent.gamma: unknown setting of an ascent 'gamma'; allowed: ...",
    ),
    "select of an average": (
        key("average: {name: ema, select: 3}"),
        "19: phases.1.average.select: 3 is not a selector; write all, norm or stage(1)",
    ),
    "ascent of the wrong kind": (
        key("ascent: {name: sam, scaling: global}"),
        "19: phases.1.ascent.scaling: sam does not take it; only awp, rwp",
    ),
    "ascent of no size": (
        key("ascent: {name: sam, size: 0}"),
        "19: phases.1.ascent.size: 0 is not allowed; ...",
    ),
    "ascent on what is not there": (
        key("ascent: {name: awp, select: stage(9)}"),
        "19: phases.1.ascent...: SmallCNN has 2 stage(s), not 9",
    ),
    "ascent on vectors": (
        key("ascent: {name: awp, select: norm}"),
        "19: phases.1.ascent: ascent awp: awp leaves out tensors with fewer than two dimensions, ...; set vectors: true",
    ),
    "ascent on statistics": (
        key("ascent: {name: sam, select: norm.statistics}"),
        "19: phases.1.ascent: ascent sam: selector 'norm.statistics' picks no parameters, only buffers",
    ),
    # average
    "average": (key("average: swaa"), "19: phases.1.average: unknown average 'swaa'; nearest: swa; allowed: ema, swa"),
    "average setting": (
        key("average: {name: ema, decays: 0.9}"),
        "19: phases.1.average.decays: unknown setting of the average 'decays'; nearest: decay; allowed: ...",
    ),
    "average of no decay": (
        key("average: {name: ema, decay: 1}"),
        "19: phases.1.average.decay: 1.0 is not allowed; allowed: more than 0, less than 1",
    ),
    "swa with a decay": (
        key("average: {name: swa, decay: 0.9}"),
        "19: phases.1.average.decay: only ema has one, and this is swa",
    ),
    "average of statistics": (
        key("average: {name: ema, select: norm.statistics}"),
        "19: phases.1.average: selector 'norm.statistics' picks no parameter",
    ),
    "average on attacks that nothing needs": (
        ("train: {all: natural}", "train: {all: natural}\n    average: {name: ema, on: adversarial}"),
        "18: phases.0.average: recalibrating on adversarial inputs needs a group that learns from them",
    ),
    # stop
    "patience": (key("stop: {patience: 0}"), "19: phases.1.stop.patience: 0 is not allowed; allowed: at least 1"),
    "stop without patience": (key("stop: {metric: clean}"), "19: phases.1.stop.patience: key 'patience' is missing"),
    "metric": (
        key("stop: {patience: 2, metric: robst}"),
        "19: phases.1.stop.metric: unknown value 'robst'; nearest: robust; allowed: auto, clean, robust",
    ),
    "least": (
        key("stop: {patience: 2, least: -0.1}"),
        "19: phases.1.stop.least: -0.1 is not allowed; allowed: at least 0",
    ),
    # optimizer
    "lr and scale": (
        key("optimizer: {groups: {norm: {lr: 0.1, scale: 2}}}"),
        "19: phases.1.optimizer...: optimizer of a group: lr 0.1 and scale 2 exclude each other; give one of them",
    ),
    "drift without turns": (
        key("optimizer: {groups: {norm: {drift: true}}}"),
        "19: phases.1.optimizer...: optimizer of a group: drift needs an every of more than 1, ...",
    ),
    "every": (
        key("optimizer: {groups: {norm: {every: 0}}}"),
        "19: phases.1.optimizer.groups.norm.every: 0 is not allowed; allowed: at least 1",
    ),
    "clip": (key("optimizer: {clip: 0}"), "19: phases.1.optimizer.clip: 0 is not allowed; allowed: more than 0"),
    "rates": (
        key("optimizer: {rates: rng}"),
        "19: phases.1.optimizer.rates: unknown value 'rng'; nearest: rgn; allowed: fixed, rgn",
    ),
    "momentum of a group of adam": (
        key("optimizer: {name: adam, groups: {norm: {momentum: 0.5}}}"),
        "19: phases.1.optimizer: ...momentum...",
    ),
    "schedule of a group": (
        key("optimizer: {groups: {norm: {schedule: {name: cosin}}}}"),
        "19: phases.1.optimizer.groups.norm.schedule.name: unknown value 'cosin'; nearest: cosine; allowed: ...",
    ),
    "cycles": (
        key("schedule: {name: cyclic, cycles: 0}"),
        "19: phases.1.schedule.cycles: 0 is not allowed; allowed: at least 1",
    ),
    # in one arm
    "window in a patch": (
        (NONE, "{phases.adapt.windows: {rest: [0, 1]}}"),
        """25: factors.group.none."phases.adapt.windows": group 'rest' is frozen: it has no window to learn in""",
    ),
    "rewind in a patch": (
        (NONE, "{phases.adapt.start: {norm: {rewind: 9}}}"),
        """25: factors.group.none."phases.adapt.start".norm: rewind: 9 is after the 1 epoch(s) before this phase; ...""",
    ),
    "ascent in a patch": (
        (NONE, "{phases.adapt.ascent: {name: awp, select: bn1}}"),
        """25: factors.group.none."phases.adapt.ascent": ascent awp: awp leaves out ...; set vectors: true""",
    ),
    "stop in a patch": (
        (NONE, "{phases.adapt.stop.patience: none}"),
        """25: factors.group.none."phases.adapt.stop.patience": 'none' is not allowed; allowed: a whole number""",
    ),
    # models
    "factory without trust": (
        (MODEL, '{name: "torch.nn:Linear"}'),
        "8: model.name: torch.nn:Linear is code that would be run; add --trust if you trust it",
    ),
}


def matches(line: str, want: str) -> bool:
    """Tell whether a line is what is wanted, in which ... leaves a part open."""
    first, *others = want.split("...")
    if not line.startswith(first):
        return False
    position = len(first)
    for piece in others:
        found = line.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return bool(others) or position == len(line)


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_one_line_at_its_place(
    name: str, edited: Callable[..., str], refused: Callable[..., list[str]]
) -> None:
    edit, expected = CASES[name]
    text = edited(edit)
    if "phases.adapt" not in edit[1]:  # one arm: others would train other groups in the second phase
        text = text[: text.index("factors:")] + text[text.index("seeds:") : text.index("claims:")]
    Path("s.yaml").write_text(text)
    lines = refused("run", "s.yaml", "--out", "out")
    assert len(lines) == 1 and matches(lines[0], f"s.yaml:{expected}"), lines


def test_mistakes_of_several_phases_are_told_at_once(
    edited: Callable[..., str], refused: Callable[..., list[str]]
) -> None:
    text = edited(("train: {all: natural}", "train: {all: natural}\n    ascent: apw"), key("windows: {nrm: [0, 1]}"))
    text = text[: text.index("factors:")] + text[text.index("seeds:") : text.index("claims:")]
    Path("s.yaml").write_text(text)
    found = [line.split(": unknown")[0] for line in refused("plan", "s.yaml")]
    assert found == ["s.yaml:18: phases.0.ascent", "s.yaml:20: phases.1.windows"]
