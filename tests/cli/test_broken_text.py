"""Mistakes that can be told from the text of a study alone: typos, wrong types, bounds, YAML that guesses or hides.

Each case changes one thing in a valid study and names the line on standard error, from the number of the line on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN_ALL = "    epochs: 1\n    train: {all: natural}\n"
TRAIN_NORM = "      norm: adversarial\n"
PHASES = f"""\
phases:
  - name: pretrain
{TRAIN_ALL}  - name: adapt
    epochs: 1
    train:
{TRAIN_NORM}      rest: frozen
"""
LR = "  optimizer: {lr: 0.05}\n"
KEYS = PHASE_KEYS = "..."  # the schema grows

CASES = {
    # a misspelt, unknown or missing key
    "top key": ("seeds: 2", "seed: 2", f"29: seed: unknown key 'seed'; nearest: seeds; allowed: {KEYS}"),
    "epoch for epochs": (
        TRAIN_ALL,
        TRAIN_ALL.replace("epochs", "epoch"),
        f"16: phases.0.epoch: unknown key 'epoch'; nearest: epochs; allowed: {PHASE_KEYS}",
    ),
    "unknown phase key": (
        "name: adapt\n",
        "name: adapt\n    learning_rate: 0.1\n",
        f"19: phases.1.learning_rate: unknown key 'learning_rate'; nearest: recalibrate; allowed: {PHASE_KEYS}",
    ),
    "data key": (
        "train_images: 200",
        "train_image: 200",
        "6: data.train_image: unknown key 'train_image'; nearest: train_images, test_images; allowed: ...",
    ),
    "augment key": (
        "  validation: 0.1",
        "  validation: 0.1\n  augment: {flips: true}",
        "6: data.augment.flips: unknown key 'flips'; nearest: flip; allowed: crop, flip",
    ),
    "optimizer key": (
        LR,
        LR.replace("lr", "lr: 0.1, momentm"),
        "13: training.optimizer.momentm: unknown key 'momentm'; nearest: momentum; allowed: ...",
    ),
    "monitor key": (
        "{attack: pgd-1,",
        "{atack: pgd-1,",
        "33: evaluate.monitor.atack: unknown key 'atack'; nearest: attack; allowed: attack, images, select",
    ),
    "norm policy pass": (
        LR,
        LR + "  normalization: {crafting: {by: batch}}\n",
        "14: training.normalization.crafting: unknown key 'crafting'; nearest: craft; "
        "allowed: adversarial, again, ascent, clean, craft, evaluate, habit, joint, layers, log, score",
    ),
    "claim key": ("    that:", "    what:", "36: claims.0.what: unknown key 'what'; nearest: that; allowed: say, that"),
    "no question": ("question: Do norm layers alone gain robustness?\n", "", "1: question: key 'question' is missing"),
    "no phases": (PHASES, "", "1: phases: key 'phases' is missing"),
    "phases by name": (
        PHASES,
        "phases: {pretrain: {epochs: 1}}\n",
        "14: phases.pretrain: unknown preset 'pretrain'; allowed: bakiskan, frankle, norm-first, norm-last, partial-at, "
        "walter-a, walter-b; or a list of phases",
    ),
    "no phase": (PHASES, "phases: []\n", "14: phases: must not be empty"),
    "no eps": (", eps: 8/255", "", "9: threat.eps: key 'eps' is missing"),
    "no model name": ("{name: small-cnn, width: 8}", "{width: 8}", "8: model.name: key 'name' is missing"),
    "no train": ("    train: {all: natural}\n", "", "15: phases.0: key 'train' is missing"),
    "no phase name": ("  - name: pretrain\n    epochs: 1", "  - epochs: 1", "15: phases.0.name: key 'name' is missing"),
    "no say": ("  - say: norm layers gain\n    that", "  - that", "35: claims.0.say: key 'say' is missing"),
    # numbers
    "eps 8/0": ("eps: 8/255", "eps: 8/0", "9: threat.eps: '8/0' divides by zero"),
    "eps nan": ("eps: 8/255", "eps: nan", "9: threat.eps: 'nan' is not a number; write 0.03 or 8/255"),
    "eps .nan": ("eps: 8/255", "eps: .nan", "9: threat.eps: .nan is not finite"),
    "eps .inf": ("eps: 8/255", "eps: .inf", "9: threat.eps: .inf is not finite"),
    "eps 1e999": ("eps: 8/255", "eps: 1e999", "9: threat.eps: 1e999 is not finite"),
    "eps -1": ("eps: 8/255", "eps: -1", "9: threat.eps: -1 is not allowed; allowed: more than 0"),
    "eps 0": ("eps: 8/255", "eps: 0", "9: threat.eps: 0 is not allowed; allowed: more than 0"),
    "eps 8": (
        "eps: 8/255",
        "eps: 8",
        "9: threat.eps: 8 is not allowed; allowed: at most 1, in pixel units of [0, 1]; write 8/255",
    ),
    "eps 8/225x": ("eps: 8/255", "eps: 8/225x", "9: threat.eps: '8/225x' is not a number; write 0.03 or 8/255"),
    "eps true": ("eps: 8/255", "eps: true", "9: threat.eps: true is not a number; write 0.03 or 8/255"),
    "eps list": ("eps: 8/255", "eps: [8, 255]", "9: threat.eps: a list is not a number; write 0.03 or 8/255"),
    "eps empty": ("eps: 8/255", "eps:", "9: threat.eps: empty is not a number; write 0.03 or 8/255"),
    "validation 1.5": (
        "validation: 0.1",
        "validation: 1.5",
        "5: data.validation: 1.5 is not allowed; allowed: at most 0.9",
    ),
    "validation text": (
        "validation: 0.1",
        "validation: ten percent",
        "5: data.validation: 'ten percent' is not a number; write 0.03 or 8/255",
    ),
    "train images 5": ("_images: 200", "_images: 5", "6: data.train_images: 5 is not allowed; allowed: at least 10"),
    "batch of one": (
        "batch_size: 64",
        "batch_size: 1",
        "12: training.batch_size: 1 is not allowed; allowed: at least 2",
    ),
    "lr 0": (LR, LR.replace("0.05", "0"), "13: training.optimizer.lr: 0 is not allowed; allowed: more than 0"),
    "lr text": (
        LR,
        LR.replace("0.05", "fast"),
        "13: training.optimizer.lr: 'fast' is not a number; write 0.03 or 8/255",
    ),
    "momentum 1": (
        LR,
        LR.replace("0.05", "0.1, momentum: 1"),
        "13: training.optimizer.momentum: 1 is not allowed; allowed: less than 1",
    ),
    "one beta": (
        LR,
        LR.replace("lr: 0.05", "name: adam, betas: [0.9]"),
        "13: training.optimizer.betas: needs 2 items",
    ),
    "beta 1.5": (
        LR,
        LR.replace("lr: 0.05", "name: adam, betas: [0.9, 1.5]"),
        "13: training.optimizer.betas.1: 1.5 is not allowed; allowed: less than 1",
    ),
    "nesterov without momentum": (
        LR,
        LR.replace("0.05", "0.1, momentum: 0, nesterov: true"),
        "13: training.optimizer: nesterov needs a momentum of more than 0",
    ),
    "milestone of epochs": (
        LR,
        LR + "  schedule: {name: piecewise, milestones: [50]}\n",
        "14: training.schedule.milestones.0: 50 is not allowed; allowed: less than 1",
    ),
    "lr of a phase": (
        "name: adapt\n",
        "name: adapt\n    optimizer: {lr: -1}\n",
        "19: phases.1.optimizer.lr: -1 is not allowed; allowed: more than 0",
    ),
    "epochs -1": (
        TRAIN_ALL,
        TRAIN_ALL.replace("1", "-1"),
        "16: phases.0.epochs: -1 is not allowed; allowed: at least 0",
    ),
    "epochs 1.5": (
        TRAIN_ALL,
        TRAIN_ALL.replace("1", "1.5"),
        "16: phases.0.epochs: 1.5 is not allowed; allowed: a whole number",
    ),
    "epochs true": (
        TRAIN_ALL,
        TRAIN_ALL.replace("1", "true"),
        "16: phases.0.epochs: true is not allowed; allowed: a whole number",
    ),
    "epochs text": (
        TRAIN_ALL,
        TRAIN_ALL.replace("1", "five"),
        "16: phases.0.epochs: 'five' is not allowed; allowed: a whole number",
    ),
    "crop 2.5": (
        "  validation: 0.1",
        "  validation: 0.1\n  augment: {crop: 2.5}",
        "6: data.augment.crop: 2.5 is not allowed; allowed: a whole number",
    ),
    "monitor images 0": (
        "images: 50}",
        "images: 0}",
        "33: evaluate.monitor.images: 0 is not allowed; allowed: at least 1",
    ),
    # seeds
    "seeds 0": ("seeds: 2", "seeds: 0", "29: seeds: 0 is not allowed; allowed: at least 1"),
    "seeds too many": ("seeds: 2", "seeds: 100000", "29: seeds: 100000 is not allowed; allowed: at most 1000"),
    "seeds text": ("seeds: 2", "seeds: two", "29: seeds: 'two' is not allowed; allowed: a whole number or a list"),
    "seeds 2.0": ("seeds: 2", "seeds: 2.0", "29: seeds: 2.0 is not allowed; allowed: a whole number or a list"),
    "seeds true": ("seeds: 2", "seeds: true", "29: seeds: true is not allowed; allowed: a whole number or a list"),
    "seeds mapping": (
        "seeds: 2",
        "seeds: {a: 1}",
        "29: seeds: a mapping is not allowed; allowed: a whole number or a list",
    ),
    "seed negative": ("seeds: 2", "seeds: [0, -1]", "29: seeds.1: -1 is not allowed; allowed: at least 0"),
    "seed text": ("seeds: 2", "seeds: [0, one]", "29: seeds.1: 'one' is not allowed; allowed: a whole number"),
    "seed twice": ("seeds: 2", "seeds: [1, 1]", "29: seeds: a seed stands there twice"),
    "no seeds": ("seeds: 2", "seeds: []", "29: seeds: needs at least one seed"),
    # words and types
    "norm linff": (
        "norm: linf,",
        "norm: linff,",
        "9: threat.norm: unknown value 'linff'; nearest: linf; allowed: l1, l2, linf",
    ),
    "norm 2": ("norm: linf,", "norm: 2,", "9: threat.norm: 2 is not allowed; allowed: linf, l2 or l1"),
    "optimizer": (
        LR,
        LR.replace("lr: 0.05", "name: sdg"),
        "13: training.optimizer.name: unknown value 'sdg'; nearest: sgd; allowed: ...",
    ),
    "schedule": (
        LR,
        LR + "  schedule: {name: cosin}\n",
        "14: training.schedule.name: unknown value 'cosin'; nearest: cosine; allowed: ...",
    ),
    "statistics by": (
        LR,
        LR + "  normalization: {craft: {by: runing}}\n",
        "14: training.normalization.craft.by: unknown value 'runing'; nearest: running; allowed: auto, batch, frozen, ...",
    ),
    "norm habit": (
        LR,
        LR + "  normalization: rise\n",
        "14: training.normalization: unknown value 'rise'; nearest: rice; allowed: adversarial-statistics, ...",
    ),
    "norm mixture": (
        LR,
        LR + "  normalization: {clean: {by: mixture}}\n",
        "14: training.normalization.clean: alpha, the share of the batch, goes with by: mixture, and the other way round",
    ),
    "statistics update": (
        LR,
        LR + "  normalization: {craft: {update: maybe}}\n",
        "14: training.normalization.craft.update: 'maybe' is not allowed; allowed: true, false or auto",
    ),
    "checkpoint": (
        "[best, last]",
        "[best, lst]",
        "32: evaluate.checkpoints.1: unknown value 'lst'; nearest: last, best; allowed: best, last",
    ),
    "checkpoint twice": ("[best, last]", "[best, best]", "32: evaluate.checkpoints: a checkpoint stands there twice"),
    "select": (
        "{attack: pgd-1,",
        "{attack: pgd-1, select: robst,",
        "33: evaluate.monitor.select: unknown value 'robst'; nearest: robust; allowed: auto, clean, robust",
    ),
    "flip yes": (
        "  validation: 0.1",
        "  validation: 0.1\n  augment: {flip: yes}",
        "6: data.augment.flip: 'yes' is not allowed; allowed: true or false",
    ),
    "text for a mapping": (
        "threat: {norm: linf, eps: 8/255}",
        "threat: linf",
        "9: threat: 'linf' is not allowed; allowed: a mapping",
    ),
    "nothing for a mapping": ("model: {name: small-cnn, width: 8}", "model:", "8: model: empty; allowed: a mapping"),
    "text for a list": ("[best, last]", "best", "32: evaluate.checkpoints: 'best' is not allowed; allowed: a list"),
    "list for text": (
        "{name: small-cnn,",
        "{name: [small-cnn],",
        "8: model.name: a list is not allowed; allowed: text",
    ),
    "list for a factor": (
        "    norm: {}",
        "    norm: [1]",
        "26: factors.group.norm: a list is not allowed; allowed: a mapping",
    ),
    "number for an attack": ("{name: pgd, steps: 2}", "7", "10: attack: 7 is not allowed; allowed: text or a mapping"),
    "number for a question": (
        "Do norm layers alone gain robustness?",
        "5",
        "1: question: 5 is not allowed; allowed: text",
    ),
    "number for a claim": (
        '"robust[group=norm] > robust[group=none]"',
        "5",
        "36: claims.0.that: 5 is not allowed; allowed: text",
    ),
    "text for train": ("{all: natural}", "all", "17: phases.0.train: 'all' is not allowed; allowed: a mapping"),
    "empty train": ("{all: natural}", "{}", "17: phases.0.train: must not be empty"),
    "empty question": ("Do norm layers alone gain robustness?", '""', "1: question: must not be empty"),
    "empty attacks": ("[pgd-3]", "[]", "31: evaluate.attacks: must not be empty"),
    "empty phase": ("phases:\n", "phases:\n  -\n", "15: phases.0: empty; allowed: a mapping"),
    "empty factor": ("seeds: 2", "  size: {}\nseeds: 2", "29: factors.size: needs at least one level"),
    "factor of nothing": ("seeds: 2", "  size:\nseeds: 2", "29: factors.size: empty; allowed: a mapping"),
    "signal 1": (
        TRAIN_NORM,
        TRAIN_NORM.replace("adversarial", "1"),
        "21: phases.1.train.norm: 1 is not allowed; allowed: text or a mapping",
    ),
    "weight text": (
        TRAIN_NORM,
        TRAIN_NORM.replace("adversarial", "{adversarial: half}"),
        "21: phases.1.train.norm.adversarial: 'half' is not a number; write 0.03 or 8/255",
    ),
    "phase named by a number": ("name: adapt\n", "name: 7\n", "18: phases.1.name: 7 is not allowed; allowed: text"),
    "phase without a name": (
        "name: adapt\n",
        'name: ""\n',
        "18: phases.1.name: a name must not be empty nor contain dots, quotes or line breaks",
    ),
    "study named by a path": (
        "name: base",
        "name: a/b",
        "2: name: names the folder of the results, so it must not contain slashes",
    ),
    # YAML
    "duplicate key": ("seeds: 2", "seeds: 2\nseeds: 3", "30: seeds: duplicate key, first on line 29"),
    "duplicate level": (
        "    norm: {}\n",
        "    norm: {}\n    norm: {}\n",
        "27: factors.group.norm: duplicate key, first on line 26",
    ),
    "tab": ("    train: {all", "\ttrain: {all", "17: not valid YAML: a tab where only spaces may stand"),
    "indentation": (
        "    train: {all",
        "   train: {all",
        "17: not valid YAML: the indentation does not match the lines above",
    ),
    "no bracket": (
        "{all: natural}\n",
        "{all: natural\n",
        "18: not valid YAML: expected ',' or '}', but got ':'; quote text that holds , [ ] { or }",
    ),
    "anchor": (
        "model: {name",
        "model: &m {name",
        "8: model: anchor &m: anchors are not read; share settings by a factor's patch, or quote text that begins with &",
    ),
    "alias": (
        "threat: {norm: linf, eps: 8/255}",
        "threat: *t",
        "9: threat: alias *t: aliases are not read; share settings by a factor's patch, or quote text that begins with *",
    ),
    "tag": ("seeds: 2", "seeds: !!int 2", "29: seeds: tag !!int: tags are not read; quote a text that begins with !"),
    "merge key": (
        "  checkpoints:",
        "  <<: {}\n  checkpoints:",
        "32: evaluate: merge keys (<<) are not read; share settings by a factor's patch",
    ),
    "octal": ("seeds: 2", "seeds: 010", "29: seeds: 010 has a leading zero; write 10, or quote it as text"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_one_line_at_its_place(
    name: str, edited: Callable[..., str], refused: Callable[..., list[str]], agree: Callable[..., None]
) -> None:
    old, new, expected = CASES[name]
    Path("s.yaml").write_text(edited((old, new)))
    agree(refused("run", "s.yaml", "--out", "out"), [f"s.yaml:{expected}"])
