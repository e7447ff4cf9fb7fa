import copy
import random

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robustlayers.attacks import PGD, Linf, Noise
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import crafting_forward, inference
from robustlayers.normalization.recalibration import Recalibration, recalibrate
from robustlayers.selection import Inventory, norm_layers
from robustlayers.selection.selectors import resolve

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def some(batch, sizes=(6, 6, 6, 6), dtype=torch.float64):
    return [batch(n, seed, dtype) for seed, n in enumerate(sizes)]


def chosen(model, selector):
    return resolve(Inventory(model), selector)


def close(model, other):
    found, wanted = model.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-12), name


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


# -- nothing else ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["norm.statistics & stage(2)", "bn1.running_* | bn1.num_batches_tracked"])
def test_selected_layers_alone_move_and_alone_normalize_by_the_batch(net, batch, selector):
    model, reference = net("resnet", torch.float64), net("resnet", torch.float64).eval()
    selection = chosen(model, selector)
    for name, module in norm_layers(reference).items():
        if f"{name}.running_mean" in selection:
            module.reset_running_stats()
            module.train().momentum = None
    with torch.no_grad():
        for x, _ in some(batch):
            reference(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, some(batch), select=selection)
    close(model, reference)
    assert {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])} == set(selection)


def trace(model):
    """Everything that could be left behind, statistics of norm layers aside."""
    return [
        (
            name,
            module.training,
            getattr(module, "momentum", None),
            [
                (key, id(p), p.requires_grad, p.tolist(), id(p.grad), None if p.grad is None else p.grad.tolist())
                for key, p in module._parameters.items()
            ],
            [(key, id(b)) for key, b in module._buffers.items()],
            [(key, b.tolist()) for key, b in module._buffers.items() if module not in norm_layers(model).values()],
            {key: (id(value), list(value)) for key, value in vars(module).items() if key.endswith("_hooks") and value},
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ] + [torch.get_rng_state().tolist(), torch.is_grad_enabled()]


class Counting(nn.Module):
    """A module with a buffer that changes in every forward, and draws from the global state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x + 0 * torch.rand(())


def lived_in(net):
    """A model in the middle of a user's life: modes, hooks, gradients and frozen parameters of its own."""
    model = nn.Sequential(net("mlp"), nn.Dropout(0.5), Counting(), nn.BatchNorm1d(3))
    model.train()
    model[0].eval()
    model[0][2].train()
    model[0][1].weight.requires_grad_(False)
    model[0][4].weight.grad = torch.ones_like(model[0][4].weight)
    model[0][2].register_forward_hook(lambda module, inputs, output: None)
    return model


def rude(forward, x, y, *, generator):
    """An attack that leaves everything behind."""
    forward.train().requires_grad_(True)
    forward(x).sum().backward()
    for module in forward.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
        module.momentum = 0.5
    torch.rand(3)
    return (x + 0.01 * torch.rand(x.shape, generator=generator)).requires_grad_()


@pytest.mark.parametrize("attack", [None, PGD(Linf("8/255"), steps=2), Noise(Linf("8/255"))])
def test_nothing_but_statistics_moves(net, batch, attack):
    model = lived_in(net)
    before = trace(model)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recalibrate(model, some(batch, dtype=torch.float32), attack=attack)
    assert trace(model) == before
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, statistics[name])}
    assert changed == set(chosen(model, "norm.statistics"))


def test_what_a_rude_attack_leaves_behind_is_put_back(net, batch):
    model, reference = lived_in(net), lived_in(net)
    before = [entry[:2] + entry[3:] if isinstance(entry, tuple) else entry for entry in trace(model)]
    recalibrate(model, some(batch, dtype=torch.float32), attack=rude)
    after = [entry[:2] + entry[3:] if isinstance(entry, tuple) else entry for entry in trace(model)]
    for entry, other in zip(before, after, strict=True):
        if isinstance(entry, tuple):  # a plain attribute set by an attack stays, as with `guard`
            assert entry[:-1] == other[:-1]
        else:
            assert entry == other
    inputs = [
        x + 0.01 * torch.rand(x.shape, generator=stream(0, "recalibration", place))
        for place, (x, _) in enumerate(some(batch, dtype=torch.float32))
    ]
    recalibrate(reference, inputs)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("where", ["layer", "attack", "batches"])
def test_after_an_exception_the_model_is_as_it_was(net, batch, bits, where):
    model = lived_in(net)
    calls = iter(range(10))

    def breaks(*_, **__):
        if next(calls) == 2:
            raise RuntimeError("in the middle")

    def attack(forward, x, y, *, generator):
        breaks()
        return x

    def batches():
        for each in some(batch, dtype=torch.float32):
            yield each
            if where == "batches":
                breaks()

    if where == "layer":
        model[1].register_forward_hook(breaks)
    before, values = trace(model), bits(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        recalibrate(model, batches(), attack=attack if where == "attack" else None)
    assert trace(model) == before
    assert bits(model) == values


def test_dropout_is_off_since_statistics_serve_evaluation(net, batch):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(64)).double()
    reference = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)).double()
    recalibrate(model, some(batch))
    recalibrate(reference, some(batch))
    assert torch.equal(model[2].running_mean, reference[1].running_mean)
    assert torch.equal(model[2].running_var, reference[1].running_var)


def test_it_works_under_inference_mode(net, batch):
    model, reference = net("resnet", torch.float64), net("resnet", torch.float64)
    attack = PGD(Linf("8/255"), steps=1)
    with torch.inference_mode():
        recalibrate(model, some(batch), attack=attack)
    recalibrate(reference, some(batch), attack=attack)
    close(model, reference)
    assert not any(buffer.is_inference() for buffer in model.buffers())


# -- attacked inputs ---------------------------------------------------------------------------------------------------


def crafted(model, batches, attack, *, order=range(4)):
    with inference(model):
        return [attack(model, *batches[k], generator=stream(5, "test", k)) for k in order]


@pytest.mark.parametrize("attack", [PGD(Linf("16/255"), steps=3), Noise(Linf("16/255")), Noise(Linf("16/255"), 3)])
@pytest.mark.parametrize("momentum", [None, 0.3])
def test_attacks_meet_the_statistics_from_before_on_every_batch(net, batch, attack, momentum):
    batches = some(batch)
    model, reference, moving = (net("resnet", torch.float64) for _ in range(3))
    inputs = crafted(reference, batches, attack)
    settings = {"attack": attack, "generator_of": lambda k: stream(5, "test", k), "momentum": momentum}
    recalibrate(model, batches, **settings)
    recalibrate(reference, inputs, momentum=momentum)
    close(model, reference)
    # The fault: statistics that move while later batches are crafted.
    if isinstance(attack, PGD):
        for place, each in enumerate(batches):
            recalibrate(
                moving, crafted(moving, [each] * 4, attack, order=[place]), momentum=momentum or 1 / (place + 1)
            )
        with pytest.raises(AssertionError):
            close(moving, reference)


def test_a_folded_forward_serves_the_attack(net, batch):
    batches, attack = some(batch), PGD(Linf("16/255"), steps=2)
    model, reference = net("resnet", torch.float64), net("resnet", torch.float64)
    recalibrate(model, batches, attack=attack, forward=crafting_forward(model))
    recalibrate(reference, batches, attack=attack)
    close(model, reference)


def test_without_generators_draws_depend_on_the_batch_number_alone(net, batch):
    draws = []

    def attack(forward, x, y, *, generator):
        draws.append(torch.rand(2, generator=generator).tolist())
        return x

    for _ in range(2):
        recalibrate(net(), some(batch, dtype=torch.float32), attack=attack)
        random.random()
    assert draws[:4] == draws[4:] and len({tuple(draw) for draw in draws}) == 4


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_a_resume_after_every_batch_gives_the_same_bits(net, batch, bits, momentum):
    batches = some(batch, dtype=torch.float32)
    settings = {"attack": PGD(Linf("8/255"), steps=1), "momentum": momentum}
    whole = net("resnet")
    recalibrate(whole, batches, **settings)
    for k in range(len(batches) + 1):
        first = Recalibration(net("resnet"), **settings)
        for each in batches[:k]:
            first.update(*each)
        state = first.state()
        if k < len(batches):
            first.update(*batches[k])  # which the state must not see
        model = net("resnet")
        second = Recalibration(model, **settings)
        second.load_state(state)
        for each in batches[k:]:
            second.update(*each)
        second.end()
        assert second.batches == 4
        assert bits(model) == bits(whole)
        if k < len(batches):
            assert any(not torch.equal(tensor, second.state()[name]) for name, tensor in state.items())


def test_a_batch_that_failed_is_no_part_of_the_estimate(net, batch, bits):
    model, reference = net(), net()
    recalibration = Recalibration(model)
    broken = batch()[0]
    for k, each in enumerate(some(batch, dtype=torch.float32)):
        if k == 2:
            with pytest.raises(RuntimeError):
                recalibration.update(broken[:, :, :4])  # reaches no norm layer
            handle = model[6].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                recalibration.update(broken)  # reaches all
            handle.remove()
        recalibration.update(*each)
    recalibration.end()
    recalibrate(reference, some(batch, dtype=torch.float32))
    assert bits(model) == bits(reference)


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
