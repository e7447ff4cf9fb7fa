"""How often, and from which images, one step updates the running statistics of each norm layer."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch

_spec = importlib.util.spec_from_file_location("step_cases", Path(__file__).with_name("step_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ALL, ATTACK, CRAFT_IN_TRAIN_MODE = cases.ALL, cases.ATTACK, cases.CRAFT_IN_TRAIN_MODE
NORM_AND_REST, STATISTICS = cases.NORM_AND_REST, cases.STATISTICS
Own, counts, step_of = cases.Own, cases.counts, cases.step_of


@pytest.mark.parametrize(
    ("groups", "signals", "policy", "updates"),
    [
        (ALL, {"all": "natural"}, None, 1),
        (ALL, {"all": "adversarial"}, None, 1),
        (ALL, {"all": {"natural": 0.5, "adversarial": 0.5}}, None, 2),  # once by the clean images, once by the others
        (ALL, {"all": "natural"}, CRAFT_IN_TRAIN_MODE, 1),  # nothing is crafted
        (ALL, {"all": "adversarial"}, CRAFT_IN_TRAIN_MODE, 10 + 1),
        (ALL, {"all": "adversarial"}, NormPolicy(craft=Switch("batch", False)), 1),
        (ALL, {"all": "adversarial"}, NormPolicy(craft=Switch("running", True)), 10 + 1),
        (ALL, {"all": "adversarial"}, NormPolicy(adversarial=Switch("running")), 1),
        (ALL, {"all": "adversarial"}, NormPolicy(adversarial=Switch("batch", False)), 0),
        (NORM_AND_REST, {"norm": "frozen", "others": "adversarial"}, None, 0),
        (NORM_AND_REST, {"norm": "frozen", "others": "adversarial"}, CRAFT_IN_TRAIN_MODE, 0),
        (NORM_AND_REST, {"norm": "frozen", "others": "natural"}, NormPolicy(clean=Switch("batch", True)), 0),
        (NORM_AND_REST, {"norm": "adversarial", "others": "frozen"}, None, 1),
        (NORM_AND_REST, {"norm": "natural", "others": "adversarial"}, None, 1),
        (NORM_AND_REST, {"norm": "natural", "others": "adversarial"}, CRAFT_IN_TRAIN_MODE, 10 + 1),
        (NORM_AND_REST, {"norm": "natural", "others": "adversarial"}, NormPolicy(craft=Switch("batch", "auto")), 1),
        (STATISTICS, {"statistics": "natural", "others": "adversarial"}, None, 1),
        (STATISTICS, {"statistics": "adversarial", "others": "natural"}, None, 1),
        (STATISTICS, {"statistics": "natural", "others": "frozen"}, None, 1),
        (STATISTICS, {"statistics": "frozen", "others": "adversarial"}, CRAFT_IN_TRAIN_MODE, 0),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_updates_per_step(net, batch, name, groups, signals, policy, updates):
    model = net(name)
    step = step_of(model, groups, signals, policy)
    step(*batch())
    assert set(counts(model).values()) == {updates}
    step(*batch(seed=1))
    assert set(counts(model).values()) == {2 * updates}


def reference_statistics(model, x):
    """Running statistics after a plain forward in train mode."""
    model = copy.deepcopy(model).train()
    model(x)
    return {name: t for name, t in model.state_dict().items() if "running" in name or "tracked" in name}


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
@pytest.mark.parametrize("others", ["adversarial", "frozen", "natural"])
def test_statistics_of_natural_images_come_from_the_clean_pass_alone(net, batch, name, others):
    model = net(name, torch.float64)
    x, y = batch(dtype=torch.float64)
    expected = reference_statistics(model, x)
    step_of(model, STATISTICS, {"statistics": "natural", "others": others})(x, y)
    for key, value in expected.items():
        assert torch.allclose(model.state_dict()[key], value, rtol=0, atol=1e-12), key


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_statistics_of_adversarial_images_come_from_the_adversarial_pass_alone(net, batch, name):
    model = net(name, torch.float64)
    x, y = batch(dtype=torch.float64)
    x_adv = ATTACK(copy.deepcopy(model).eval(), x, y, generator=stream(0, "attack", 5))
    expected, clean = reference_statistics(model, x_adv), reference_statistics(model, x)
    step = step_of(model, STATISTICS, {"statistics": "adversarial", "others": "natural"})
    step(x, y, generator=stream(0, "attack", 5))
    for key, value in expected.items():
        assert torch.allclose(model.state_dict()[key], value, rtol=0, atol=1e-12), key
        if "mean" in key:
            assert not torch.allclose(value, clean[key], rtol=0, atol=1e-6)  # the two differ


def test_train_mode_crafting_is_that_of_a_loop_that_never_leaves_train_mode(net, batch):
    """Rice et al. 2020: the model stays in train mode while the attack runs, and its statistics follow."""
    model = net("resnet", torch.float64)
    reference = copy.deepcopy(model).train()
    x, y = batch(dtype=torch.float64)
    step_of(model, ALL, {"all": "adversarial"}, CRAFT_IN_TRAIN_MODE)(x, y, generator=stream(0, "attack", 5))
    x_adv = ATTACK(reference, x, y, generator=stream(0, "attack", 5))
    functional.cross_entropy(reference(x_adv), y).backward()
    torch.optim.SGD(reference.parameters(), lr=0.01).step()
    for (key, one), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12), key


def test_gradients_alone_move_statistics_as_a_step_does_and_nothing_else(net, batch):
    model, other = net("mlp"), net("mlp")
    signals = {"norm": "adversarial", "others": "natural"}
    step_of(model, NORM_AND_REST, signals).gradients(*batch())
    step_of(other, NORM_AND_REST, signals)(*batch())
    before = net("mlp").state_dict()
    for (key, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if "running" in key or "tracked" in key:
            assert torch.equal(one, two) and not torch.equal(one, before[key])
        else:
            assert torch.equal(one, before[key])
            assert "weight" not in key or not torch.equal(two, before[key])


class Stubborn(nn.BatchNorm1d):
    """A user's norm layer that updates a buffer of its own in every training forward."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input):  # noqa: A002
        if self.training:
            self.seen += 1
        return super().forward(input)


class Counting(nn.Module):
    """A module that normalizes nothing and has a buffer that changes in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += 1
            self.last = x.detach().mean()
        return x


def users_model():
    torch.manual_seed(0)
    first, second = (spectral_norm(nn.Linear(64, 5)), nn.Linear(5, 3))
    return nn.Sequential(nn.Flatten(), first, Stubborn(5), Counting(), Own(5), second)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "policy",
    [None, CRAFT_IN_TRAIN_MODE, NormPolicy(Switch("batch", False), Switch("batch", False), Switch("batch", False))],
)
def test_buffers_of_a_users_own_layers_are_frozen_too(batch, bits, policy):
    with torch.random.fork_rng(devices=[]):
        model = users_model()
    buffers = {name for name, _ in model.named_buffers()}
    assert {"1.weight_u", "2.seen", "3.count", "3.last", "4.level"} <= buffers
    objects = dict(model.named_buffers())
    before = bits(model)
    step = step_of(
        model,
        {"last": "'5'", "others": "rest"},
        {"last": {"natural": 0.5, "adversarial": 0.5}, "others": "frozen"},
        policy,
    )
    step(*batch())
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed == {"5.weight", "5.bias"}
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_buffers_of_a_users_own_layers_learn_where_they_are_trained(batch, bits):
    with torch.random.fork_rng(devices=[]):
        model = users_model()
    before = bits(model)
    step_of(model, ALL, {"all": "adversarial"})(*batch())
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed >= {name for name, _ in model.named_buffers()} - {"1.weight_v"}
    assert int(model[2].seen) == 1 and int(model[2].num_batches_tracked) == 1 and int(model[3].count) == 1


def test_frozen_buffers_stay_frozen_on_a_model_that_was_moved_after_the_step_was_made(batch, bits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Counting(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    step = step_of(model, {"last": "'4'", "others": "rest"}, {"last": "natural", "others": "frozen"})
    model.double()  # puts other tensors in the place of the buffers
    before = bits(model)
    step(*batch(dtype=torch.float64))
    assert {name for name, value in bits(model).items() if value != before[name]} == {"4.weight", "4.bias"}


def test_statistics_of_one_layer_under_two_signals_are_an_error(net):
    model = net("mlp")
    for signals in ({"mean": "natural", "others": "frozen"}, {"mean": "natural", "others": "adversarial"}):
        with pytest.raises(UserError) as error:
            step_of(model, {"mean": "*.running_mean", "others": "rest"}, signals)
        assert str(error.value) == (
            "the statistics of BatchNorm1d must share one signal: 2.running_mean, 2.running_var, 2.num_batches_tracked"
        )
    step_of(model, {"mean": "*.running_mean", "others": "rest"}, {"mean": "natural", "others": "natural"})
