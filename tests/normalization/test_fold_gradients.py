"""A forward whose gradient is not that of what it computes runs as it is: a trace would lose it."""

import pytest
import torch
from torch import nn

from robustlayers.attacks import PGD, Linf
from robustlayers.evaluation import correct
from robustlayers.normalization import crafting_forward, fold_rules


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Quantized(nn.Module):
    def forward(self, x):
        return _StraightThrough.apply(x)


class Centered(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            mean = x.mean(dim=(2, 3), keepdim=True)
        return x - mean


class CenteredByFunction(nn.Module):
    @torch.no_grad()
    def mean(self, x):
        return x.mean(dim=(2, 3), keepdim=True)

    def forward(self, x):
        return x - self.mean(x)


class CenteredBySwitch(nn.Module):
    def forward(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        mean = x.mean(dim=(2, 3), keepdim=True)
        torch.set_grad_enabled(before)
        return x - mean


def net_with(first):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            first, nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        ).eval()


def gradient(forward, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(forward(x)[:, 1].sum(), x)[0]


FIRST = [Quantized, Centered, CenteredByFunction, CenteredBySwitch]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("planted", [False, True])
def test_the_gradient_is_the_models(first, planted, monkeypatch):
    """And the check would notice if the trace took what it is given."""
    if planted:
        monkeypatch.setattr(fold_rules, "_gradients_as_written", torch.enable_grad)
    net, x = net_with(first()), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    forward = crafting_forward(net)
    agrees = torch.allclose(gradient(forward, x), gradient(net, x), atol=1e-6)
    assert agrees != planted
    if not planted:
        assert forward.folded == 1 and set(forward.as_it_is) == {"0"}


def test_an_attack_gets_through_a_quantizer(monkeypatch):
    net, x = net_with(Quantized()), torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).argmax(1)
    attack = PGD(Linf(0.2), steps=10)
    held = int(correct(net, x, y, attack).sum())
    monkeypatch.setattr(fold_rules, "_gradients_as_written", torch.enable_grad)
    blind = int(correct(net_with(Quantized()), x, y, attack).sum())
    assert held < blind


def test_torch_is_as_it_was():
    crafting_forward(net_with(Centered()))
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not (x * 2).requires_grad
    assert _StraightThrough.apply(x).requires_grad
    torch.set_grad_enabled(True)
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
