"""Norm layers of all kinds in the middle of their life, and everything that a context could leave behind in them."""

from itertools import product

import torch
from torch import nn

from robustlayers.core.random import stream


class PlainSubclass(nn.BatchNorm2d):
    """A user's class that changes nothing."""


class Stubborn(nn.BatchNorm2d):
    """A user's class that updates its statistics in every training forward, whatever `track_running_stats` says."""

    def forward(self, input):  # noqa: A002
        if self.training:
            mean = input.mean((0, 2, 3), keepdim=True)
            var = ((input - mean) ** 2).mean((0, 2, 3), keepdim=True)
            count = input.numel() / input.shape[1]
            self.num_batches_tracked += 1
            factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean = (1 - factor) * self.running_mean + factor * mean.flatten()  # another tensor object
                self.running_var.mul_(1 - factor).add_(factor * var.flatten() * count / (count - 1))
        else:
            mean, var = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        out = (input - mean) / (var + self.eps).sqrt()
        return out * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1) if self.affine else out


SHAPES = {"1d": (5, 4), "1d-long": (3, 4, 6), "2d": (3, 4, 2, 3), "3d": (3, 4, 2, 2, 2)}
LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d, "1d"),
    "BatchNorm1d on sequences": (nn.BatchNorm1d, "1d-long"),
    "BatchNorm2d": (nn.BatchNorm2d, "2d"),
    "BatchNorm3d": (nn.BatchNorm3d, "3d"),
    "SyncBatchNorm": (nn.SyncBatchNorm, "2d"),
    "PlainSubclass": (PlainSubclass, "2d"),
    "Stubborn": (Stubborn, "2d"),
    "InstanceNorm1d": (nn.InstanceNorm1d, "1d-long"),
    "InstanceNorm2d": (nn.InstanceNorm2d, "2d"),
    "InstanceNorm3d": (nn.InstanceNorm3d, "3d"),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def make(name, momentum=0.1, affine=True):
    """A float64 layer in the middle of its life, inside a model, and an input."""
    kind, shape = LAYERS[name]
    generator = stream(0, "layer", name)
    layer = kind(4, momentum=momentum, affine=affine, track_running_stats=True)
    with torch.no_grad():
        layer.running_mean.normal_(0, 1, generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(4)
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2, generator=generator)
    x = torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64) * 2 + 1
    return nn.Sequential(layer.double()), x


def buffers_of(layer):
    return {name: getattr(layer, name).clone() for name in BUFFERS}


SETTINGS = list(product(["batch", "running"], [True, False]))


class Breaks(nn.BatchNorm2d):
    def forward(self, input):  # noqa: A002
        super().forward(input)
        raise RuntimeError("inside the layer")


def state_of(model):
    """Everything that a context could leave behind."""
    return [
        (
            name,
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "track_running_stats", None),
            [(key, id(tensor), tensor is None or tensor.clone().tolist()) for key, tensor in module._buffers.items()],
            [
                (key, id(tensor), tensor.requires_grad)
                for key, tensor in module._parameters.items()
                if tensor is not None
            ],
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value is not None},
            sorted(vars(module)),
            id(vars(module).get("forward")),
        )
        for name, module in model.named_modules()
    ]
