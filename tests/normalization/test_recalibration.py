"""Recalibration estimates what torch does, for layers of every kind, and tells mistakes."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robustlayers.attacks import Linf, Noise
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization.recalibration import Recalibration, recalibrate
from robustlayers.selection import norm_layers

_spec = importlib.util.spec_from_file_location(
    "recalibration_cases", Path(__file__).with_name("recalibration_cases.py")
)
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

chosen, close, some = cases.chosen, cases.close, cases.some
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 6, 3), (4,)])
@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_it_is_torchs_update_bn(net, batch, name, sizes):
    model, reference = net(name, torch.float64), net(name, torch.float64)
    assert recalibrate(model, some(batch, sizes)) == len(sizes)
    update_bn(some(batch, sizes), reference)
    close(model, reference)


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_a_single_batch_is_torchs_bit_for_bit(net, batch, bits, name):
    model, reference = net(name), net(name)
    recalibrate(model, [batch()])
    update_bn([batch()], reference)
    assert bits(model) == bits(reference)


def test_each_batch_weighs_the_same_whatever_its_size():
    layer = nn.BatchNorm1d(1).double()
    batches = [torch.tensor([[0.0], [2.0], [4.0]]).double(), torch.tensor([[10.0], [20.0]]).double()]
    recalibrate(layer, batches)
    assert layer.running_mean.item() == (2 + 15) / 2  # by images it would be 7.2
    assert layer.running_var.item() == (4 + 50) / 2
    assert layer.num_batches_tracked.item() == 2


def test_sums_keep_more_digits_than_float32():
    layer = nn.BatchNorm1d(1)
    recalibrate(layer, [torch.full((2, 1), value) for value in (2.0**24, 1.0, 1.0)])
    assert layer.running_mean.item() == (2**24 + 2) / 3


def test_with_a_momentum_it_goes_on_from_the_present_values_as_training_does(net, batch):
    model, reference = net("resnet", torch.float64), net("resnet", torch.float64).train()
    for module in norm_layers(reference).values():
        module.momentum = 0.3
    recalibrate(model, some(batch), momentum=0.3)
    with torch.no_grad():
        for x, _ in some(batch):
            reference(x)
    close(model, reference)
    assert int(model.state_dict()["layer1.0.bn1.num_batches_tracked"]) == 3 + 4


# -- kinds of layers ---------------------------------------------------------------------------------------------------


class PlainSubclass(nn.BatchNorm2d):
    """A user's class that changes nothing."""


class Stubborn(nn.BatchNorm2d):
    """A user's class with an update of its own and another statistic, which puts new tensors in place of its buffers."""

    def __init__(self, features, **settings):
        super().__init__(features, **settings)
        self.register_buffer("running_max", torch.zeros(features))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, input):  # noqa: A002
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.seen += len(input)
                factor = self.momentum or 1 / float(self.num_batches_tracked)
                new = {"mean": input.mean((0, 2, 3)), "var": input.var((0, 2, 3)), "max": input.amax((0, 2, 3))}
                for name, value in new.items():
                    old = getattr(self, f"running_{name}")
                    setattr(self, f"running_{name}", old + factor * (value - old))
        return (input - self.running_mean.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1)


class Forgetful(nn.BatchNorm2d):
    """A user's class with a constant of its own in place of the momentum."""

    def forward(self, input):  # noqa: A002
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * input.mean((0, 2, 3)))
        return input - self.running_mean.view(1, -1, 1, 1)


class Own(nn.Module):
    is_normalization = True

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x):
        return x - self.level


LAYERS = {
    nn.BatchNorm1d: (5, 4),
    nn.BatchNorm2d: (3, 4, 2, 3),
    nn.BatchNorm3d: (3, 4, 2, 2, 2),
    nn.SyncBatchNorm: (3, 4, 2, 3),
    nn.InstanceNorm1d: (3, 4, 6),
    nn.InstanceNorm2d: (3, 4, 2, 3),
    PlainSubclass: (3, 4, 2, 3),
    Stubborn: (3, 4, 2, 3),
}


@pytest.mark.parametrize("own_momentum", [0.1, None])
@pytest.mark.parametrize("momentum", [None, 0.25])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_by_hand(kind, momentum, own_momentum):
    generator = stream(0, "layer", kind.__name__)
    layer = kind(4, momentum=own_momentum, track_running_stats=True).double()
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 2, generator=generator)
    inputs = [torch.randn(LAYERS[kind], generator=generator).double() * 3 + 1 for _ in range(3)]
    axes = tuple(range(2, inputs[0].ndim)) if "Instance" in kind.__name__ else (0, *range(2, inputs[0].ndim))
    mean, var, share = layer.running_mean.clone(), layer.running_var.clone(), momentum
    for step, x in enumerate(inputs, start=1):
        new_mean, new_var = (
            t.mean(0) if "Instance" in kind.__name__ else t for t in (x.mean(axes), x.var(axes, unbiased=True))
        )
        share = 1 / step if momentum is None else momentum
        mean, var = (1 - share) * mean + share * new_mean, (1 - share) * var + share * new_var
    recalibrate(layer, inputs, momentum=momentum)
    assert torch.allclose(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.running_var, var, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked.item() == (0 if "Instance" in kind.__name__ else 3)  # instance norm never counts
    if kind is Stubborn:
        assert layer.seen.item() == 9
        if momentum is None:
            maxima = torch.stack([x.amax((0, 2, 3)) for x in inputs])
            assert torch.allclose(layer.running_max, maxima.mean(0), rtol=1e-12)
    assert layer.momentum == own_momentum


class Twice(nn.Module):
    """One layer that runs twice, one that never does, and two that share their statistics."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
        self.first, self.second = nn.BatchNorm1d(64), nn.BatchNorm1d(64)
        for name in BUFFERS:
            setattr(self.second, name, getattr(self.first, name))

    def forward(self, x):
        return self.second(2 * self.first(1 + self.used(3 * self.used(x.flatten(1)))))


def test_layers_that_run_twice_or_never_or_share_statistics(batch):
    model = Twice().double()
    model.unused.running_mean.fill_(7)
    for name in BUFFERS:  # a conversion unties buffers
        setattr(model.second, name, getattr(model.first, name))
    reference = copy.deepcopy(model)
    names = Recalibration(model)
    for x, _ in some(batch):
        names.update(x)
    assert {name.partition(".")[0] for name in names.end()} == {"used", "first"}
    for module in norm_layers(reference).values():
        module.momentum = None
        if module is not reference.unused:
            module.reset_running_stats()
    with torch.no_grad():
        for x, _ in some(batch):
            reference.train()(x)
    close(model, reference)
    assert model.used.num_batches_tracked.item() == 8
    assert model.second.running_mean is model.first.running_mean


def test_layers_that_a_user_told_not_to_track_are_estimated_and_told_so_still(net, batch):
    model, reference = net("mlp", torch.float64), net("mlp", torch.float64)
    model[2].track_running_stats = False
    recalibrate(model, some(batch))
    update_bn(some(batch), reference)
    close(model, reference)
    assert model[2].track_running_stats is False


def test_old_statistics_that_are_not_finite_do_not_live_on(net, batch):
    model, reference = net("mlp", torch.float64), net("mlp", torch.float64)
    model[2].running_mean.fill_(torch.inf)
    model[2].running_var.fill_(torch.nan)
    recalibrate(model, some(batch))
    recalibrate(reference, some(batch))
    close(model, reference)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("norm", r"the selection has bn1.weight, bn1.bias, .* and [0-9]+ more; allowed: norm.statistics"),
        ("head", "the selection has linear.weight, linear.bias"),
        ("bn1.running_mean", "leaves out bn1.running_var, bn1.num_batches_tracked"),
        ("bn1.running_*", "leaves out bn1.num_batches_tracked"),
    ],
)
def test_selections_are_statistics_of_whole_layers(net, selector, message):
    model = net("resnet")
    with pytest.raises(UserError, match=message):
        Recalibration(model, chosen(model, selector))
    with pytest.raises(UserError, match="bound to another model"):
        Recalibration(model, chosen(net("resnet"), "norm.statistics"))


def test_a_divided_statistic_is_told(net):
    model = net()
    selection = chosen(model, "norm.statistics")
    mask = torch.zeros(7, dtype=torch.bool)
    mask[0] = True
    parts = {**selection.parts, "2.running_mean": mask}
    with pytest.raises(UserError, match=r"the selection divides 2.running_mean"):
        Recalibration(model, type(selection)(selection.inventory, parts))
    with pytest.raises(UserError, match="the selection is empty"):
        Recalibration(model, type(selection)(selection.inventory, {}))


def test_other_mistakes_are_told(net, batch, bits):
    x, y = batch()
    model = net()
    before = bits(model)
    images = torch.rand(4, 3, 2, 2)
    cases = [
        ("no norm layer of Sequential has running stat", lambda: recalibrate(nn.Sequential(nn.GroupNorm(1, 3)), [x])),
        ("running_mean by Forgetful ignores its momentum", lambda: recalibrate(Forgetful(3), [images])),
        ("level: Own has no momentum to set", lambda: recalibrate(Own(), [images])),
        ("there was no batch", lambda: recalibrate(model, [])),
        ("batch 2 is empty", lambda: recalibrate(model, [x, x[:0]])),
        ("batch 2 has one image: Expected more than 1", lambda: recalibrate(model, [x, x[:1]])),
        ("momentum: 1.5 is not allowed", lambda: recalibrate(model, [x], momentum=1.5)),
        ("momentum: 0 is not allowed", lambda: recalibrate(model, [x], momentum=0)),
        ("needs labels", lambda: recalibrate(model, [x], attack=Noise(Linf(0.1)))),
        ("are for an attack", lambda: recalibrate(model, [x], generator_of=lambda k: stream(0, "t", k))),
        ("2.running_mean is not finite after 1 batch", lambda: recalibrate(model, [x * torch.inf])),
        (
            "not one of a recalibration of these",
            lambda: Recalibration(model).load_state(Recalibration(net("resnet")).state()),
        ),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert bits(model) == before
    recalibration = Recalibration(model)
    recalibration.update(x, y)
    recalibration.end()
    with pytest.raises(UserError, match="has ended"):
        recalibration.update(x)


def test_no_batch_reaches_what_is_selected(batch):
    model = Twice()
    with pytest.raises(UserError, match="no batch reached a layer"):
        recalibrate(model, [batch()[0]], select=chosen(model, "unused.running_* | unused.num*"))
