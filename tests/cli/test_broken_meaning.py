"""Mistakes that need more than the text: names that do not exist, groups that do not fit the model, claims, patches.

Each case changes a valid study and names all lines on standard error, from the number of the line on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ATTACKS = OPTIONS = WIDTHS = "allowed: ..."  # libraries grow
METRICS = "allowed: ..."
RECIPE = "..."
PGD = "{name: pgd, steps: 2}"
MODEL = "{name: small-cnn, width: 8}"
NORM = "      norm: adversarial\n"
NONE = "{phases.adapt.epochs: 0}"
CLAIM = "robust[group=norm] > robust[group=none]"
TRAIN = "phases.1.train"

CASES = {
    # attacks
    "attack": (PGD, "pgdd-10", f"10: attack: unknown attack 'pgdd'; nearest: pgd, apgd, apgd-t; {ATTACKS}"),
    "attack loss": (
        PGD,
        "pgd-dlrr-3",
        "10: attack: unknown loss of an attack 'dlrr'; nearest: dlr; allowed: ...",
    ),
    "attack option": (
        PGD,
        "{name: pgd, step: 2/255}",
        f"10: attack.step: unknown option of pgd 'step'; nearest: steps, step_size, keep; {OPTIONS}",
    ),
    "attack option on its line": (
        PGD,
        "\n  name: pgd\n  steps: 2.5",
        "12: attack.steps: 2.5 is not allowed; allowed: a whole number, 0 or more",
    ),
    "attack option twice": (
        PGD,
        "{name: pgd-3, steps: 2}",
        "10: attack.steps: given twice, in the name 'pgd-3' and as an option",
    ),
    "attack step": (
        PGD,
        "{name: pgd, step_size: 2/255x}",
        "10: attack.step_size: '2/255x' is not a number; write 0.03 or 8/255",
    ),
    "attack of a phase": (
        "name: adapt\n",
        "name: adapt\n    attack: pgx-3\n",
        f"19: phases.1.attack: unknown attack 'pgx'; nearest: pgd, apgd; {ATTACKS}",
    ),
    "attack of the monitor": (
        "attack: pgd-1,",
        "attack: pgd1,",
        f"33: evaluate.monitor.attack: unknown attack 'pgd1'; nearest: pgd, apgd, apgd-t; {ATTACKS}",
    ),
    "attack of the evaluation": (
        "[pgd-3]",
        "[pgd-3, deepfool]",
        f"31: evaluate.attacks.1: unknown attack 'deepfool'; {ATTACKS}",
    ),
    "same attack twice": (
        "[pgd-3]",
        "[pgd-3, {name: pgd, steps: 3}]",
        "31: evaluate.attacks.1: pgd-3 stands there twice; rows could not tell them apart",
    ),
    # models and data
    "model": (
        MODEL,
        "{name: smal-cnn}",
        "8: model.name: unknown model 'smal-cnn'; nearest: small-cnn; allowed: ...",
    ),
    "model option": (
        MODEL,
        "{name: small-cnn, widht: 8}",
        f"8: model.widht: unknown option of model small-cnn 'widht'; nearest: width; {WIDTHS}",
    ),
    "model depth": (
        MODEL,
        "{name: resnet, depth: 21}",
        "8: model.depth: 21 is not allowed; nearest: 20; allowed: 8, 14, 20, ...",
    ),
    "model width": (
        MODEL,
        "{name: small-cnn, width: wide}",
        "8: model.width: 'wide' is not a whole number; allowed: at least 1",
    ),
    "model norm": (
        MODEL,
        "{name: small-cnn, norm: bach}",
        "8: model.norm: unknown norm 'bach'; nearest: batch; allowed: adapter, batch, ...",
    ),
    "channels of other data": (
        MODEL,
        "{name: small-cnn, channels: 3}",
        "8: model.channels: 3 does not fit fashion-mnist-mini, which has 1",
    ),
    "classes of other data": (
        MODEL,
        "{name: small-cnn, classes: 100}",
        "8: model.classes: 100 does not fit fashion-mnist-mini, which has 10",
    ),
    "mean of other data": (
        MODEL,
        "{name: small-cnn, mean: [0.4, 0.4, 0.4]}",
        "8: model.mean: 3 values for 1 channel(s); allowed: a number, or a list of 1",
    ),
    "data": (
        "name: fashion-mnist-mini",
        "name: fashion-mnst",
        "4: data.name: unknown data set 'fashion-mnst'; nearest: fashion-mnist, fashion-mnist-mini; allowed: ...",
    ),
    "too many training images": (
        "train_images: 200",
        "train_images: 20000",
        "6: data.train_images: 20000 is more than the 9000 training images of fashion-mnist-mini",
    ),
    "too many test images": (
        "test_images: 50",
        "test_images: 20000",
        "7: data.test_images: 20000 is more than the 2000 test images of fashion-mnist-mini",
    ),
    "best without validation": (
        "validation: 0.1",
        "validation: 0",
        "5: data.validation: 0 leaves no validation images, which choose the checkpoint 'best'; write 0.1, or leave 'best' out",
    ),
    "validation of no image": (
        "validation: 0.1",
        "validation: 0.0001",
        "5: data.validation: a share of 0.0001 of 10000 images takes none; enlarge it or set it to 0",
    ),
    "crop of the whole image": (
        "  validation: 0.1",
        "  validation: 0.1\n  augment: {crop: 28}",
        "6: data.augment.crop: 28 is too large for images of 28x28; allowed: less than 28",
    ),
    # groups and signals
    "selector": (NORM, "      nrom: adversarial\n", f"21: {TRAIN}.nrom: unknown selector 'nrom'; nearest: norm"),
    "selector function": (
        NORM,
        "      stge(1): adversarial\n",
        f"21: {TRAIN}.stge(1): unknown selector function 'stge'; nearest: stage, type...",
    ),
    "selector syntax": (
        NORM,
        "      norm &: adversarial\n",
        f"21: {TRAIN}.norm &: selector 'norm &': something is missing at column 7",
    ),
    "selector of no stage": (
        NORM,
        "      stage(9): adversarial\n",
        f"21: {TRAIN}.stage(9): SmallCNN has 2 stage(s), not 9",
    ),
    "empty selector": (NORM, '      " ": adversarial\n', f'21: {TRAIN}." ": empty selector'),
    "empty group": (
        NORM,
        "      norm & conv: adversarial\n",
        f"21: {TRAIN}.norm & conv: selector 'norm & conv' picks nothing from SmallCNN",
    ),
    "overlap": (
        NORM,
        NORM + "      bn1: natural\n",
        f"22: {TRAIN}.bn1: overlaps with group 'norm': bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 1 more",
    ),
    "leftover": (
        "      rest: frozen\n",
        "      conv: frozen\n",
        f"20: {TRAIN}: groups leave out normalize.mean, normalize.std, linear.weight, linear.bias; add them, "
        "or a group 'rest', to say what they learn from",
    ),
    "nothing for rest": (
        "{all: natural}",
        "{all: natural, rest: frozen}",
        "17: phases.0.train.rest: picks nothing: the other groups hold every tensor already",
    ),
    "signal": (
        NORM,
        "      norm: adversarail\n",
        f"21: {TRAIN}.norm: unknown signal 'adversarail'; nearest: adversarial; allowed: ...",
    ),
    "objective": (
        NORM,
        "      norm: {adversarial: 0.5, natrual: 0.5}\n",
        f"21: {TRAIN}.norm: unknown objective 'natrual'; nearest: natural; allowed: ...",
    ),
    "weight": (
        NORM,
        "      norm: {adversarial: 0.5, natural: -0.5}\n",
        f"21: {TRAIN}.norm: weight of natural: -0.5 is not positive; leave the objective out instead",
    ),
    "all frozen": (NORM, "      norm: frozen\n", f"20: {TRAIN}: every group is frozen: nothing to train"),
    # phases
    "phase twice": ("name: adapt\n", "name: pretrain\n", "18: phases.1.name: two phases are called 'pretrain'"),
    "phase called 7": (
        "name: adapt\n",
        'name: "7"\n',
        "18: phases.1.name: a phase's name must not be a number, which would name a position",
    ),
    "no epochs in one arm": (
        "epochs: 1\n    train: {all",
        "epochs: 0\n    train: {all",
        "14: phases: no phase has an epoch: nothing would be trained (in arm 'none')",
    ),
    # starts of groups
    "start": (
        "name: adapt\n",
        "name: adapt\n    start: {rest: reinitialise}\n",
        "19: phases.1.start.rest: unknown start 'reinitialise'; nearest: reinitialize; allowed: ...",
    ),
    "start of no group": (
        "name: pretrain\n",
        "name: pretrain\n    start: {al: reinitialize}\n",
        "16: phases.0.start.al: unknown group 'al'; nearest: all; allowed: all",
    ),
    "start of a group that one arm lacks": (
        "name: adapt\n",
        "name: adapt\n    start: {norm: reinitialize}\n",
        "19: phases.1.start.norm: unknown group 'norm'; allowed: head, rest (in arm 'head')",
    ),
    "start from a later phase": (
        "name: pretrain\n",
        "name: pretrain\n    start: {all: {from: adapt}}\n",
        "16: phases.0.start.all: unknown earlier phase 'adapt'; allowed: initial, present",
    ),
    "start from a file": (
        "name: adapt\n",
        "name: adapt\n    start: {rest: {load: nowhere.safetensors}}\n",
        "19: phases.1.start.rest: nowhere.safetensors: no such file",
    ),
    "start in a patch": (
        NONE,
        "{phases.adapt.start: {norm: {from: pretran}}}",
        """25: factors.group.none."phases.adapt.start".norm: unknown earlier phase 'pretran'; nearest: pretrain, present; """
        "allowed: initial, present, pretrain",
    ),
    # factors
    "unknown setting": (
        NONE,
        "{phases.adapt.epoch: 0}",
        """25: factors.group.none."phases.adapt.epoch": unknown key 'epoch'; nearest: epochs; """
        "allowed: ...",
    ),
    "unknown phase": (
        NONE,
        "{phases.adatp.epochs: 0}",
        """25: factors.group.none."phases.adatp.epochs": unknown item of phases 'adatp'; nearest: adapt; """
        "allowed: adapt, pretrain",
    ),
    "unknown part": (
        NONE,
        "{modle.width: 16}",
        """25: factors.group.none."modle.width": unknown key 'modle'; nearest: model; """
        "allowed: ...",
    ),
    "value in a patch": (
        NONE,
        "{model.width: big}",
        """25: factors.group.none."model.width": 'big' is not a whole number; allowed: at least 1""",
    ),
    "type in a patch": (
        NONE,
        "{phases.adapt.epochs: none}",
        """25: factors.group.none."phases.adapt.epochs": 'none' is not allowed; allowed: a whole number""",
    ),
    "attack in a patch": (
        NONE,
        "{attack.steps: -2}",
        """25: factors.group.none."attack.steps": -2 is not allowed; allowed: a whole number, 0 or more""",
    ),
    "group on its line in a patch": (
        "{head: adversarial, rest: frozen}",
        "\n        haed: adversarial\n        rest: frozen",
        """29: factors.group.head."phases.adapt.train".haed: unknown selector 'haed'; nearest: head""",
    ),
    "signal in a patch": (
        "{head: adversarial, rest: frozen}",
        "{head: adverserial, rest: frozen}",
        """28: factors.group.head."phases.adapt.train".head: unknown signal 'adverserial'; nearest: adversarial; """
        "allowed: ...",
    ),
    "seeds in a patch": (
        NONE,
        "{seeds: 5}",
        f"25: factors.group.none.seeds: 'seeds' is the same for all arms; allowed: {RECIPE}",
    ),
    "question in a patch": (
        NONE,
        "{question: why}",
        f"25: factors.group.none.question: 'question' is the same for all arms; allowed: {RECIPE}",
    ),
    "measuring in a patch": (
        NONE,
        "{evaluate.attacks: [pgd-1]}",
        """25: factors.group.none."evaluate.attacks": all arms are measured alike: no factor can change evaluate.attacks""",
    ),
    "conflict": (
        "seeds: 2",
        "  size:\n    wide: {phases.adapt.epochs: 2}\nseeds: 2",
        "30: factors.size.wide: sets phases.adapt.epochs, but factors.group.none sets phases.adapt.epochs; "
        "one setting, one factor",
    ),
    "conflict inside": (
        "seeds: 2",
        "  size:\n    wide: {phases.1.epochs: 2}\nseeds: 2",
        "30: factors.size.wide: sets phases.1.epochs, but factors.group.none sets phases.adapt.epochs; one setting, one factor",
    ),
    "twins": (
        "    norm: {}\n",
        "    norm: {}\n    same: {model.width: 8}\n",
        "27: factors.group.same: makes arm 'same' the same recipe as 'norm'; change something, or leave it out",
    ),
    # claims
    "claim syntax": (
        CLAIM,
        "robust[group=norm] = robust[group=none]",
        "36: claims.0.that: column 20: expected one of > < >= <=, found '='",
    ),
    "claim metric": (
        CLAIM,
        "robst[norm] > 0.1",
        f"36: claims.0.that: column 1: unknown metric 'robst'; nearest: robust, train_robust; {METRICS}",
    ),
    "claim attack": (
        CLAIM,
        "pgd-20[norm] > 0.1",
        "36: claims.0.that: column 1: metric 'pgd-20' is not measured; evaluate: {attacks: [..., pgd-20]} would measure it; "
        f"{METRICS}",
    ),
    "claim about what is not measured": (
        CLAIM,
        "corrupted:fog[norm] > 0.1",
        "36: claims.0.that: column 1: metric 'corrupted:fog' is not measured; evaluate: {corruptions: [fog]} would measure "
        f"it; {METRICS}",
    ),
    "claim level": (
        CLAIM,
        "robust[group=nrom] > 0.1",
        "36: claims.0.that: column 8: unknown level of group 'nrom'; nearest: norm, none; allowed: head, none, norm",
    ),
    "claim factor": (
        CLAIM,
        "robust[grp=norm] > 0.1",
        "36: claims.0.that: column 8: unknown factor 'grp'; nearest: group; allowed: group",
    ),
    "claim without an arm": (
        CLAIM,
        "robust > 0.1",
        "36: claims.0.that: column 1: robust must name one arm, but leaves free: group (none, norm, head)",
    ),
    "claim checkpoint": (
        CLAIM,
        "robust[norm, checkpoint=first] > 0.1",
        "36: claims.0.that: column 14: unknown checkpoint 'first'; allowed: best, last",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_one_line_at_its_place(
    name: str, edited: Callable[..., str], refused: Callable[..., list[str]], agree: Callable[..., None]
) -> None:
    old, new, expected = CASES[name]
    text = edited((old, new))
    if name.startswith("conflict"):  # with a second factor, claims have to name its level too
        text = text.replace(CLAIM, "robust[norm, wide] > robust[none, wide]")
    Path("s.yaml").write_text(text)
    agree(refused("run", "s.yaml", "--out", "out"), [f"s.yaml:{expected}"])
