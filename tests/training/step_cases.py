"""Steps whose updates of running statistics are counted, and a user's norm layer, for the tests of norm policies."""

import torch
from torch import nn

from robustlayers.attacks import PGD, Linf
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.training import PartialStep

ATTACK = PGD(Linf(0.1), steps=10, keep="last")
CRAFT_IN_TRAIN_MODE = NormPolicy(craft=Switch("batch", True))


def step_of(model, groups, signals, policy=None, attack=ATTACK):
    return PartialStep(
        model,
        Partition(model, groups),
        signals,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        attack=attack,
        policy=policy,
    )


def counts(model):
    return {name: int(t) - 3 for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}


ALL, NORM_AND_REST = {"all": "all"}, {"norm": "norm", "others": "rest"}
STATISTICS = {"statistics": "norm.statistics", "others": "rest"}
BOTH = {"all": {"natural": 0.5, "adversarial": 0.5}}


class Own(nn.Module):
    """A norm layer that shares nothing with torch's."""

    is_normalization = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.register_buffer("level", torch.zeros(features))

    def forward(self, x):
        level = self.level
        if self.training:
            level = x.mean(0)
            self.level = 0.9 * self.level + 0.1 * level.detach()
        return (x - level) * self.scale


def images(seed=0):
    generator = stream(seed, "images")
    return torch.rand(12, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(12) % 3
