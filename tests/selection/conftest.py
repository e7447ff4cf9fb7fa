"""Networks as users write them: no layout of their own, tied tensors, modules used twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class OwnNorm(nn.BatchNorm2d):
    """A user's norm layer."""


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = OwnNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Named like the networks of common zoos, without a `layout()`."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage in range(1, 5):
            inputs, outputs = width * 2 ** max(0, stage - 2), width * 2 ** (stage - 1)
            blocks = [BasicBlock(inputs, outputs, 1 if stage == 1 else 2), BasicBlock(outputs, outputs)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(8 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class Deep(nn.Module):
    """Twelve stages: layer1 ... layer12."""

    def __init__(self) -> None:
        super().__init__()
        for stage in range(1, 13):
            self.add_module(f"layer{stage}", nn.Sequential(nn.Linear(2, 2)))
        self.fc = nn.Linear(2, 2)


class Tied(nn.Module):
    """Tensors under several names: a module used twice, and a weight of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.first
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embed.weight


class Confusing(nn.Module):
    """Modules called like keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(2, 3)
        self.head = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
        self.bn = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, 2)
        self.add_module("odd-name", nn.Linear(2, 2))


_USERS = {"resnet": ResNet, "deep": Deep, "tied": Tied, "confusing": Confusing, "block": BasicBlock}


@pytest.fixture(scope="session")
def user() -> Callable[..., nn.Module]:
    """Build `resnet`, `deep`, `tied` or `confusing`."""

    def make(name: str = "resnet", *args: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _USERS[name](*args)

    return make
