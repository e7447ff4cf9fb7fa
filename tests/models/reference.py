"""Plain functions of a state dict, of which the tests write each architecture's forward a second time."""

import torch
from torch import nn
from torch.nn import functional


def randomized(model):
    """The model in evaluation mode with statistics, scales, shifts and biases that are not 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, name).data.uniform_(0.5, 1.5, generator=generator)
        elif getattr(module, "bias", None) is not None:
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()


def images(channels=3, size=16):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return functional.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=weight.shape[-1] // 2)


def norm(state, name, x):
    shape = (1, -1) + (1,) * (x.dim() - 2)
    weight, bias, mean, var = (
        state[f"{name}.{key}"].view(shape) for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
