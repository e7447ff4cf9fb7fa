"""The rows of the test matrix: the levels of each axis, models for them, a covering set of rows, a trainer for each row.

A row has one level of each axis. `covering` finds few rows in which every two levels of different axes meet.
"""

import itertools

import torch
from torch import nn

from robustlayers import models
from robustlayers.attacks import PGD, Linf
from robustlayers.core.random import stream
from robustlayers.data import Augment, Images
from robustlayers.normalization import NormPolicy, Switch, habit
from robustlayers.selection import Partition
from robustlayers.training import (
    Ascent,
    AverageSettings,
    GroupSettings,
    OptimizerSettings,
    Perturbation,
    PhaseTrainer,
    Schedule,
    concerned,
    copy_entries,
    start_group,
)

STEPS, EPOCHS, BATCH, IMAGES = 12, 4, 8, 24
ATTACK = PGD(Linf(0.1), steps=1, keep="last")

# -- models ----------------------------------------------------------------------------------------------------------


class Preactivation(nn.Module):
    """Norm layers before convolutions, and a shortcut around two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False)
        self.layer1 = nn.ModuleDict(
            {
                "bn1": nn.BatchNorm2d(2),
                "conv1": nn.Conv2d(2, 3, 3, padding=1, bias=False),
                "bn2": nn.BatchNorm2d(3),
                "conv2": nn.Conv2d(3, 3, 3, padding=1, bias=False),
                "shortcut": nn.Conv2d(2, 3, 1, bias=False),
            }
        )
        self.bn = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        layer = self.layer1
        x = layer["bn1"](self.conv1(x)).relu()
        x = layer["shortcut"](x) + layer["conv2"](layer["bn2"](layer["conv1"](x)).relu())
        return self.linear(self.bn(x).relu().mean((2, 3)))


class Counting(nn.Module):
    """A module that normalizes nothing and has a buffer that changes in every forward in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += 1
        return x


class Tied(nn.Module):
    """A user's own: a block that runs twice, a weight in two modules, dropout, a buffer outside of norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 6)
        self.bn = nn.BatchNorm1d(6)
        self.layer1 = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.mirror = nn.Linear(6, 6)
        self.mirror.weight = self.layer1[0].weight  # pyright: ignore[reportAttributeAccessIssue]
        self.drop = nn.Sequential(nn.Dropout(0.25), Counting())
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        x = self.bn(self.enter(x.flatten(1))).relu()
        x = self.layer1(self.layer1(x))
        return self.linear(self.drop(self.mirror(x)))


_OURS = {
    "small-cnn": ("small-cnn", {"width": 2}),
    "mlp": ("mlp", {"width": 6, "hidden": 3, "size": 8}),
    "resnet": ("resnet", {"depth": 8, "width": 2}),
    "preact-resnet": ("preact-resnet", {"depth": 18, "width": 2}),
}


def fresh(kind, seed):
    """A newly initialized model for images [n, 1, 8, 8] of 3 classes."""
    if kind in _OURS:
        name, options = _OURS[kind]
        return models.build(name, seed=seed, channels=1, classes=3, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"preactivation": Preactivation, "tied": Tied}[kind]()


def trained(kind):
    """The model with norm layers as after some training, so that a mix-up shows; the same bits every time."""
    model = fresh(kind, 1)
    generator = stream(0, "matrix", kind)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(0.2, 0.8, generator=generator)  # few channels: none is to be dead
                for name, buffer in module.named_buffers():
                    if name == "running_mean":
                        buffer.normal_(0, 0.3, generator=generator)
                    else:
                        buffer.fill_(3) if name == "num_batches_tracked" else buffer.uniform_(
                            0.5, 1.5, generator=generator
                        )
    return model


def images():
    """24 images of 3 classes: with a batch size of 8, 4 epochs are 12 steps."""
    pixels = torch.randint(0, 256, (IMAGES, 1, 8, 8), generator=stream(0, "matrix-images"), dtype=torch.uint8)
    return Images(pixels, torch.arange(IMAGES) % 3)


# -- levels ----------------------------------------------------------------------------------------------------------

# CONV stands for the layers that a model has: convolutions, or linear layers where it has none.
SELECTORS = [
    "norm",
    "norm.statistics",
    "stage(1)",
    "before(stage(1))",
    "random(like=norm)",
    "channels(CONV, share=0.5)",
    "norm | head",
    "~CONV",
    "all",
]
MORE_SELECTORS = ["head", "norm.weight", "norm.affine", "bias", "CONV", "last(2)", "depth(0, 0.5)", "stage(1) & norm"]

BOTH = {"natural": 0.5, "adversarial": 0.5}
# of what is picked, of the others
SIGNALS = {
    "adversarial, frozen": ("adversarial", "frozen"),
    "frozen, adversarial": ("frozen", "adversarial"),
    "adversarial, natural": ("adversarial", "natural"),
    "natural, adversarial": ("natural", "adversarial"),
    "both, frozen": (BOTH, "frozen"),
    "natural, both": ("natural", {"natural": 2.0, "adversarial": 0.5}),
}

STARTS = ["keep", "reinitialize", "reset-statistics", "shuffle", "scale-uniform"]
MORE_STARTS = ["scale-signs", "shift-one", "shift-zero", "scale-one"]

_COSINE = Schedule("cosine")
# (settings of all, settings of one group that learns)
OPTIMIZERS = {
    "sgd": ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, None),
    "adamw": ({"name": "adamw", "lr": 0.01, "decay": "weights", "clip": 0.5}, None),
    "groups": ({"clip": 1.0}, {"scale": 0.3, "momentum": 0.5, "schedule": _COSINE, "clip": 0.1, "weight_decay": 0.1}),
    "drift": ({}, {"every": 3, "drift": True}),
    "every": ({"name": "adam", "lr": 0.01}, {"every": 3}),
    "rgn": ({"rates": "rgn", "rates_batches": 2, "decay": "weights"}, None),
}
MORE_OPTIMIZERS = {
    "adam": ({"name": "adam", "lr": 0.01, "weight_decay": 0.01}, None),
    "plain": ({"momentum": 0.0, "weight_decay": 0.0}, None),
    "rgn, adam, every": ({"name": "adam", "lr": 0.01, "rates": "rgn", "rates_batches": 1}, {"every": 2, "lr": 0.02}),
    "rgn, drift": ({"rates": "rgn", "clip": 1.0}, {"every": 5, "drift": True, "scale": 5.0}),
}

MODELS = ["small-cnn", "mlp", "tied", "preactivation", "resnet"]

SCHEDULES = {
    "constant": Schedule(),
    "one-cycle": Schedule("one-cycle"),
    "piecewise": Schedule("piecewise", warmup=0.2),
    "cyclic": Schedule("cyclic", cycles=2),
}

POLICIES = {
    "default": NormPolicy(),
    "rice": habit("rice"),
    "by running": NormPolicy(clean=Switch("running"), adversarial=Switch("running"), ascent=Switch("auto", True)),
    "mixed": NormPolicy(
        craft=Switch("mixture", alpha=0.5), clean=Switch("frozen"), adversarial=Switch("batch", momentum="cumulative")
    ),
}
MORE_POLICIES = {name: habit(name) for name in ("trades", "clean-statistics", "adversarial-statistics", "frozen")}

ASCENTS = {
    "none": None,
    "awp": Ascent("awp", size=0.05),
    "sam on norm": Ascent("sam", select="norm", warmup=0.3),
    "rwp": Ascent("rwp", steps=2, vectors=True, limit=1.2),
}

AVERAGES = {
    "none": None,
    "ema": AverageSettings("ema", decay=0.7, statistics="live"),
    "swa": AverageSettings("swa", start=0.7, on="adversarial"),
    "ema of norm": AverageSettings("ema", decay=0.7, start=0.2, select="norm", statistics="average"),
}

HANDOVER = "handover"
TURNS = {
    "steady": {},
    HANDOVER: {"windows": {"picked": (0.0, 0.4), "others": (0.3, 1.0)}},
    "ramp": {"perturbation": Perturbation("ramp", until=0.6)},
}

AXES = {
    "selector": SELECTORS,
    "optimizer": list(OPTIMIZERS),
    "signals": list(SIGNALS),
    "start": STARTS,
    "model": MODELS,
    "schedule": list(SCHEDULES),
    "ascent": list(ASCENTS),
    "average": list(AVERAGES),
    "policy": list(POLICIES),
    "turns": list(TURNS),
    "crafting": ["fp32", "bf16"],
}
MORE_AXES = AXES | {
    "selector": SELECTORS + MORE_SELECTORS,
    "optimizer": list(OPTIMIZERS | MORE_OPTIMIZERS),
    "start": STARTS + MORE_STARTS,
    "model": [*MODELS, "preact-resnet"],
    "policy": list(POLICIES | MORE_POLICIES),
}


def fits(one, two):
    """Whether two levels, each (axis, level), can meet.

    A handover needs two groups that learn, and statistics alone cannot learn where nothing updates them.
    """
    pair = dict((one, two))
    if pair.get("policy") == "frozen" and pair.get("selector") == "norm.statistics":
        return False
    if pair.get("turns") != HANDOVER:
        return True
    return pair.get("selector") != "all" and "frozen" not in pair.get("signals", "")


# -- rows ------------------------------------------------------------------------------------------------------------


def pairs(axes):
    """Every two levels of different axes that can meet."""
    return [
        (one, two)
        for (first, ones), (second, twos) in itertools.combinations(axes.items(), 2)
        for one in ((first, level) for level in ones)
        for two in ((second, level) for level in twos)
        if fits(one, two)
    ]


def met(row):
    """The pairs of levels of a row."""
    return set(itertools.combinations(row.items(), 2))


def covering(axes):
    """Few rows, {axis: level}, in which all `pairs` meet; each begins with the first pair that has not met yet.

    The other axes take, one after the other, the level that has most pairs still to meet, then the one used least.
    """
    left = dict.fromkeys(pairs(axes))
    order = {axis: place for place, axis in enumerate(axes)}
    used = dict.fromkeys(((axis, level) for axis, levels in axes.items() for level in levels), 0)
    rows = []
    while left:
        chosen = dict(next(iter(left)))
        for axis, levels in axes.items():
            if axis in chosen:
                continue

            def gain(level, axis=axis, chosen=chosen):
                found = (axis, level)
                new = sum(
                    ((other, found) if order[other[0]] < order[axis] else (found, other)) in left
                    for other in chosen.items()
                )
                return new, -used[found]

            possible = [level for level in levels if all(fits((axis, level), other) for other in chosen.items())]
            chosen[axis] = max(possible, key=gain)
        row = {axis: chosen[axis] for axis in axes}
        for pair in met(row):
            left.pop(pair, None)
        for found in row.items():
            used[found] += 1
        rows.append(row)
    return rows


# -- a trainer for a row ---------------------------------------------------------------------------------------------


def groups_of(row):
    """The groups of a row and their signals."""
    layers = "linear" if row["model"] in ("mlp", "tied") else "conv"
    picked, others = SIGNALS[row["signals"]]
    if row["selector"] == "all":
        return {"picked": "all"}, {"picked": others if picked == "frozen" else picked}
    selector = row["selector"].replace("CONV", layers)
    return {"picked": selector, "others": "rest"}, {"picked": picked, "others": others}


def begin(model, groups, row):
    """Apply the row's start to the first group that it concerns."""
    start = row["start"]
    for selection in Partition(model, groups).groups.values():
        if start == "reinitialize":
            return copy_entries(selection, fresh(row["model"], 2).state_dict(), "a fresh model")
        if start == "keep" or concerned(selection, start):
            return start_group(selection, start, seed=5)
    raise AssertionError(f"{start} concerns no group")


def settings_of(row, partition, signals):
    """The row's optimizer: exceptions are of the first group that learns, of all where they divide a tensor."""
    common, own = (OPTIMIZERS | MORE_OPTIMIZERS)[row["optimizer"]]
    learning = [group for group in partition.groups if signals[group] != "frozen"]
    divided = any(mask is not None for group in partition.groups for mask in partition[group].parts.values())
    some = learning if divided else learning[:1]
    groups = {} if own is None else {group: GroupSettings(**own) for group in some}
    return OptimizerSettings(**{"lr": 0.05, "weight_decay": 0.001} | common, groups=groups)


def trainer_of(row):
    """A trainer for the row's phase, always from the same start."""
    model = trained(row["model"])
    groups, signals = groups_of(row)
    begin(model, groups, row)
    return PhaseTrainer(
        model,
        groups,
        signals,
        images(),
        epochs=EPOCHS,
        attack=ATTACK,
        batch_size=BATCH,
        optimizer=settings_of(row, Partition(model, groups), signals),
        schedule=SCHEDULES[row["schedule"]],
        policy=(POLICIES | MORE_POLICIES)[row["policy"]],
        augment=Augment(crop=1, flip=True),
        ascent=ASCENTS[row["ascent"]],
        average=AVERAGES[row["average"]],
        crafting=row["crafting"],
        seed=4,
        first_epoch=2,
        **TURNS[row["turns"]],
    )
