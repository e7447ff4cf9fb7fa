"""What two processes compute together, and one alone for comparison: `python together.py OUT` in each of the two.

A case is a function of the processes; what it returns, named tensors and texts, is written by each process.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from robustlayers import models
from robustlayers.attacks import PGD, Linf, Threat
from robustlayers.core.files import write_json, write_tensors
from robustlayers.core.random import stream
from robustlayers.core.ranks import joined
from robustlayers.data import Augment, Images, to_float
from robustlayers.evaluation import worst_case
from robustlayers.normalization import NormPolicy, Switch, inference
from robustlayers.selection import Partition
from robustlayers.training import (
    AverageSettings,
    Diverged,
    OptimizerSettings,
    PartialStep,
    PhaseTrainer,
    Schedule,
    Shards,
)

ATTACK = PGD(Linf(0.1), steps=3, keep="last")
HALVES = {"norm": "norm", "rest": "rest"}
BY_BATCH = NormPolicy(craft=Switch(by="batch", update=False))
MIXED = {"adversarial": 0.5, "natural": 0.5}


class Branching(nn.Module):
    """Uses `bright` only if a pixel of the batch is brighter than all of the usual ones, and `never` not at all."""

    def __init__(self):
        super().__init__()
        self.usual, self.bright, self.never = (nn.Linear(64, 3) for _ in range(3))

    def forward(self, x):
        y = self.usual(x.flatten(1))
        return y + self.bright(x.flatten(1)) if bool((x > 0.9995).any()) else y


def net(name="mlp", dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "mlp":
            parts = [nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6), nn.BatchNorm1d(6)]
            made = nn.Sequential(nn.Flatten(), *parts, nn.Linear(6, 3))
        elif name == "plain":
            made = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 3))
        elif name == "branching":
            made = Branching()
        elif name == "no-track":
            made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
            made.append(nn.Linear(144, 3))
        elif name == "instance":
            made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
            made += nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        else:
            made = models.build("resnet", seed=1, depth=8, width=3, channels=1, classes=3, norm=name)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.weight is not None:
                    module.weight.data.uniform_(0.5, 1.5)
    return made.to(dtype)


def batch(n, dtype=torch.float64):
    generator = stream(0, "shared-batch", n)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=dtype) * 0.999
    return x, torch.randint(0, 3, (n,), generator=generator)


class Forgetful(Shards):
    """A planted fault: the gradients of the norm layers stay those of the process."""

    def __call__(self, gradients, wanted):
        averaged = super().__call__(gradients, wanted)
        return {name: gradients[name] if value.dim() < 2 else value for name, value in averaged.items()}


class Unweighted(Shards):
    """A planted fault: a process with fewer images counts as much as one with more."""

    share = property(lambda self: 1 / self.ranks.count)  # type: ignore[assignment]


class OwnDraws(Shards):
    """A planted fault: each process draws for its own images as if they were the first ones."""

    def draws(self, generator):
        return generator


class Local(Shards):
    """A planted fault: the statistics of the process in the place of those of the batch."""

    def together(self):
        return torch.enable_grad()


FAULTS = {"forgetful": Forgetful, "unweighted": Unweighted, "own-draws": OwnDraws, "local": Local}


def gradients(
    ranks,
    *,
    n=7,
    model="mlp",
    groups=None,
    signals=None,
    statistics="sync",
    fault=None,
    dtype=torch.float64,
    bright=None,
    attack=ATTACK,
    updates=0,
    **options,
):
    """Gradients of a step over a batch of `n`, and buffers after it; after some updates of the weights, if given."""
    made = net(model, dtype)
    x, y = batch(n, dtype)
    if bright is not None:
        x[bright] = 1.0
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)
    groups = groups or {"all": "all"}
    shards = FAULTS.get(fault, Shards)(made, statistics, ranks=ranks)
    step = PartialStep(
        made,
        Partition(made, groups),
        signals or dict.fromkeys(groups, "adversarial"),
        attack=attack,
        optimizer=optimizer,
        average=shards if ranks.count > 1 else None,
        **options,
    )
    for index in range(updates):
        with shards.of(x, y) as (part, labels):
            step(part, labels, generator=shards.draws(stream(0, "test-attack", index)))
    with shards.of(x, y) as (part, labels):
        found = step.gradients(part, labels, generator=shards.draws(stream(0, "test-attack", "last")))
        shards.whole(found.log)
    tensors = {f"grad/{name}": value for name, value in found.by_name.items()}
    tensors |= {f"buffer/{name}": value for name, value in made.named_buffers()}
    tensors |= {f"weight/{name}": value.detach() for name, value in made.named_parameters()}
    tensors |= {f"loss/{name}": value.double() for name, value in found.log.losses.items()}
    tensors |= {f"correct/{name}": value for name, value in found.log.correct.items()}
    return tensors | {"size": torch.tensor(found.log.size)}


GRADIENTS = {
    "natural": {"signals": {"all": "natural"}},
    "adversarial": {},
    "adversarial, equal parts": {"n": 8},
    "a part without images": {"n": 3},
    "two objectives": {"signals": {"all": MIXED}},
    "two objectives as one batch": {"signals": {"all": MIXED}, "policy": NormPolicy(joint=Switch())},
    "as one batch, a part without images": {"signals": {"all": MIXED}, "policy": NormPolicy(joint=Switch()), "n": 3},
    "norm only": {"groups": HALVES, "signals": {"norm": "adversarial", "rest": "frozen"}},
    "norm frozen": {"groups": HALVES, "signals": {"norm": "frozen", "rest": "natural"}},
    "some entries": {"groups": {"part": "random(like=norm, of=linear)", "rest": "rest"}},
    "mixed signals": {"groups": HALVES, "signals": {"norm": "adversarial", "rest": "natural"}},
    "crafting by the batch": {"policy": BY_BATCH},
    "rice": {"policy": "rice", "n": 9},
    "trades": {"policy": "trades", "signals": {"all": MIXED}},
    "l2 start": {"attack": PGD(Threat("l2", 1.0), steps=2, keep="last")},
    "kl attack": {"attack": PGD(Linf(0.1), steps=2, loss="kl"), "signals": {"all": MIXED}},
    "awp": {"ascent": "awp", "signals": {"all": MIXED}},
    "sam on norm": {"ascent": {"name": "sam", "select": "norm"}},
    "rwp": {"ascent": {"name": "rwp", "steps": 2, "limit": 1.1}},
    "resnet": {"model": "batch", "n": 6},
    "dual": {"model": "dual", "n": 6, "signals": {"all": MIXED}},
    "without running statistics": {"model": "no-track", "signals": {"all": "natural"}},
    "instance norm": {"model": "instance"},
    "cumulative statistics": {"policy": NormPolicy(adversarial=Switch(by="batch", update=True, momentum="cumulative"))},
    "updates": {"updates": 3, "groups": HALVES, "signals": {"norm": "adversarial", "rest": "natural"}},
    "random norm": {"model": "random", "n": 6},
}

# Where batch norm rounds to bf16 differs.
ROUGH = {"model": "batch", "n": 6, "dtype": torch.float32, "precision": "bf16", "signals": {"all": "natural"}}

FAULTY = {
    "forgetful": {"fault": "forgetful"},
    "unweighted": {"fault": "unweighted", "statistics": "sync", "model": "plain"},
    "own-draws": {"fault": "own-draws"},
    "local": {"fault": "local"},
}

STILL = PGD(Linf(0.1), steps=2, random_start=False)
GHOSTS = {
    f"{statistics}, {signal}": {"statistics": statistics, "signals": {"all": signal}, "attack": STILL}
    for statistics in ("none", "mean")
    for signal in ("natural", "adversarial")
}
# Image 5 is the second one's, so that the first process has no gradient for `bright`.
GHOSTS["a gradient in one process only"] = {"model": "branching", "signals": {"all": "natural"}, "bright": 5}


def images(n=21):
    generator = stream(0, "shared-images")
    return Images(torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(n) % 3)


def trainer(ranks, statistics="sync", model="mlp", **options):
    settings = {
        "epochs": 2,
        "attack": ATTACK,
        "batch_size": 6,
        "optimizer": OptimizerSettings(lr=0.05, momentum=0.9),
        "schedule": Schedule("cosine"),
        "augment": Augment(crop=1, flip=True),
        "seed": 3,
    }
    signals = {"norm": "adversarial", "rest": "natural"}
    return PhaseTrainer(
        net(model, torch.float32), HALVES, signals, images(), ranks=ranks, statistics=statistics, **settings | options
    )


def trained(ranks, *, cut=None, **options):
    """State after two epochs, saved and loaded anew after `cut` steps if given."""
    made = trainer(ranks, **options)
    losses = []
    if cut is not None:
        log = made.run(cut)
        state = {name: tensor.clone() for name, tensor in made.state().items()}
        losses += [] if log is None else [log.loss]
        made = trainer(ranks, **options)
        made.load_state(state)
    while made.done < made.epochs:
        log = made.run()
        losses.append(log.loss)
    with made.result() as model:
        result = {f"result/{name}": value.clone() for name, value in model.state_dict().items()}
    moved = {f"kept/{change.group}": torch.tensor(change.kept) for change in made.verify()}
    passes = torch.tensor([log.forward_passes, log.backward_passes])
    return made.state() | result | moved | {"losses": torch.tensor(losses), "passes": passes}


TRAINED = {
    "sync": {},
    "mean": {"statistics": "mean"},
    "none": {"statistics": "none"},
    "average": {"average": AverageSettings("swa", start=0.0, statistics="recalibrate")},
    "layer rates": {"optimizer": OptimizerSettings(lr=0.05, rates="rgn", rates_batches=2)},
    "steps": {"epochs": None, "steps": 5},
}


def diverged(ranks):
    """What a run that diverges says."""
    made = trainer(ranks, optimizer=OptimizerSettings(lr=1e30), epochs=4)
    try:
        while made.done < made.epochs:
            made.run()
    except Diverged as error:
        return str(error)
    return "did not diverge"


def untouched(ranks):
    """Buffers after exchanges of statistics that nothing has moved."""
    made = net(dtype=torch.float32)
    for statistics in ("mean", "none"):
        shards = Shards(made, statistics, ranks=ranks)
        with shards.of(*batch(7)):
            pass
    return dict(made.named_buffers())


def verdicts(ranks):
    """Verdicts of images in batches of 4, the last of which is short."""
    made, some = net("batch", torch.float32), images(18)
    with inference(made):
        labels = made(to_float(some.images)).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    attacks = {"weak": PGD(Linf(0.001), steps=2), "strong": PGD(Linf(0.02), steps=2)}
    return worst_case(made, some.images, labels, attacks, 4, ranks=ranks)


def cases(ranks):
    """Everything by name: {case: tensors}, and texts."""
    found = {}
    for kind, settings in (("gradients", GRADIENTS), ("faulty", FAULTY), ("ghosts", GHOSTS)):
        for name, options in settings.items():
            if ranks.count > 1 or kind != "ghosts":
                own = options if ranks.count > 1 else {key: value for key, value in options.items() if key != "fault"}
                found |= {f"{kind}/{name}/{key}": value for key, value in gradients(ranks, **own).items()}
    for name, options in TRAINED.items():
        found |= {f"trained/{name}/{key}": value for key, value in trained(ranks, **options).items()}
        if ranks.count > 1:
            cut = {"cut": 2, **options}
            found |= {f"resumed/{name}/{key}": value for key, value in trained(ranks, **cut).items()}
    found |= {f"untouched/{name}": value for name, value in untouched(ranks).items()}
    found |= {f"rough/{name}": value for name, value in gradients(ranks, **ROUGH).items()}
    found |= {f"verdicts/{name}": value for name, value in verdicts(ranks).items()}
    return {name: value.clone().contiguous() for name, value in found.items()}, {"diverged": diverged(ranks)}


def main(out):
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        tensors, texts = cases(ranks)
        write_tensors(Path(out) / f"{ranks.index}.safetensors", tensors)
        facts = {"told": ranks.tell({"by": ranks.index}), "first": ranks.first(), "index": ranks.index}
        write_json(Path(out) / f"{ranks.index}.json", texts | facts)


if __name__ == "__main__":
    main(sys.argv[1])
