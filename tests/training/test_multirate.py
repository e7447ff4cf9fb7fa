"""Multirate training against optimizers written out by hand, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.core.random import stream
from robustlayers.selection import Partition
from robustlayers.training import GroupSettings, Multirate, OptimizerSettings, build_optimizer, due, optimizer_tensors

SLOW = ("0.weight", "0.bias")
GROUPS = {"slow": "0.weight | 0.bias", "fast": "rest"}
SIGNALS = {"slow": {"natural": 1.0}, "fast": {"natural": 1.0}}
KINDS = {
    "sgd": OptimizerSettings("sgd", lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": OptimizerSettings("sgd", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    "plain": OptimizerSettings("sgd", lr=0.1, momentum=0.0, weight_decay=0.05),
    "adam": OptimizerSettings("adam", lr=0.02, weight_decay=0.05),
    "adamw": OptimizerSettings("adamw", lr=0.02, weight_decay=0.05),
}


def network(dtype=torch.float64):
    generator = stream(0, "network")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype)


def data(step, dtype=torch.float64):
    generator = stream(step, "data")
    return torch.randn(5, 3, generator=generator).to(dtype), torch.randint(0, 2, (5,), generator=generator)


def with_slow(settings, **own):
    return OptimizerSettings(
        settings.name, settings.lr, settings.momentum, settings.weight_decay, settings.nesterov,
        groups={"slow": GroupSettings(**own)},
    )  # fmt: skip


def made(model, settings):
    optimizer = build_optimizer(Partition(model, GROUPS), SIGNALS, settings)
    assert optimizer is not None
    return Multirate(optimizer, settings)


def backward(model, step, groups=("slow", "fast"), dtype=torch.float64):
    """Give a gradient to the tensors of these groups and to no other."""
    model.zero_grad(set_to_none=True)
    names = [name for name, _ in model.named_parameters() if ("slow" if name in SLOW else "fast") in groups]
    x, y = data(step, dtype)
    loss = functional.cross_entropy(model(x), y)
    for name, gradient in zip(
        names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True
    ):
        model.get_parameter(name).grad = gradient


def train(model, multirate, steps):
    for step in steps:
        backward(model, step, multirate.due(step))
        multirate.step(step)


class ByHand:
    """The change of one tensor by each optimizer, from its formula."""

    def __init__(self, settings):
        self.s, self.n, self.m, self.v = settings, 0, None, None

    def change(self, value, gradient, lr):
        s = self.s
        self.n += 1
        if s.name == "sgd":
            g = gradient + s.weight_decay * value
            self.m = g if self.m is None else s.momentum * self.m + g
            return -lr * (g + s.momentum * self.m if s.nesterov else self.m)
        decay = torch.zeros_like(value)
        if s.name == "adamw":
            decay = -lr * s.weight_decay * value
        else:
            gradient = gradient + s.weight_decay * value
        a, b = s.betas
        self.m = (1 - a) * gradient + (0 if self.m is None else a * self.m)
        self.v = (1 - b) * gradient**2 + (0 if self.v is None else b * self.v)
        return decay - lr * (self.m / (1 - a**self.n)) / ((self.v / (1 - b**self.n)).sqrt() + 1e-8)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_formulas_say(kind, drift):
    settings, k = KINDS[kind], 3
    model = network()
    train(model, made(model, with_slow(settings, every=k, drift=drift, scale=2.0)), range(10))

    reference = network()
    hands = {name: ByHand(settings) for name, _ in reference.named_parameters()}
    parts = {}
    for step in range(10):
        backward(reference, step)
        with torch.no_grad():
            for name, value in reference.named_parameters():
                if name not in SLOW:
                    value += hands[name].change(value, value.grad, settings.lr)
                    continue
                if step % k == 0:
                    change = hands[name].change(value, value.grad, 2 * settings.lr)
                    parts[name] = [change / k] * k if drift else [change]
                if parts[name]:
                    value += parts[name].pop()
    for name, value in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-11, atol=1e-13, msg=name)


def test_it_is_algorithm_1_of_the_paper():
    """With the slow rate h and the fast rate h / k, in the words of Vlaar and Leimkuhler: two nested loops."""
    h, k, mu = 0.3, 3, 0.8
    settings = OptimizerSettings(
        lr=h / k, momentum=mu, weight_decay=0.0, groups={"slow": GroupSettings(scale=k, every=k, drift=True)}
    )
    model = network()
    train(model, made(model, settings), range(4 * k))

    reference = network()
    momentum = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    fast = [name for name in momentum if name not in SLOW]
    for cycle in range(4):
        for i in range(k):
            backward(reference, cycle * k + i)
            for name in [*SLOW, *fast] if i == 0 else fast:
                momentum[name] = mu * momentum[name] + reference.get_parameter(name).grad
            with torch.no_grad():
                for name, value in reference.named_parameters():
                    value -= h / k * momentum[name]
    for name, value in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_every_of_one_is_the_plain_optimizer_in_every_bit(kind, bits):
    settings = with_slow(KINDS[kind], every=1)
    model, reference = network(torch.float32), network(torch.float32)
    multirate = made(model, settings)
    plain = build_optimizer(Partition(reference, GROUPS), SIGNALS, KINDS[kind])
    for step in range(6):
        for net in (model, reference):
            backward(net, step, dtype=torch.float32)
        multirate.step(step)
        plain.step()
        assert bits(model) == bits(reference)
    assert multirate.state() == {}


def rest_check(model, optimizer, update, steps):
    """Fails where a step on which the slow group is not due moves it or its optimizer state."""
    for step in steps:
        backward(model, step, ("slow", "fast"))
        before = {name: model.get_parameter(name).detach().clone() for name in SLOW}
        slots = optimizer_tensors(optimizer)
        update(step)
        moved = [name for name in SLOW if not torch.equal(before[name], model.get_parameter(name))]
        assert bool(moved) == (step % 3 == 0), f"step {step} moved {moved}"
        after = optimizer_tensors(optimizer)
        if step % 3:
            assert all(torch.equal(after[key], slots[key]) for key in slots if key.startswith("0.")), f"step {step}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_is_not_due_is_bit_equal_and_so_is_its_state(kind):
    model = network()
    multirate = made(model, with_slow(KINDS[kind], every=3))
    rest_check(model, multirate.optimizer, multirate.step, range(8))
    assert all(parameter.grad is not None for parameter in model.parameters())  # left out, not taken away


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_zero_in_their_place_would_be_caught(kind):
    """What a mask would do: momentum and weight decay go on moving the group."""
    model = network()
    multirate = made(model, with_slow(KINDS[kind], every=3))

    def masked(step):
        if step % 3:
            for name in SLOW:
                model.get_parameter(name).grad.zero_()
        multirate.optimizer.step()

    with pytest.raises(AssertionError, match=r"^step 1 moved"):
        rest_check(model, multirate.optimizer, masked, range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_drift_are_equal_and_add_up_to_the_update(kind):
    whole, spread = network(), network()
    train(whole, made(whole, with_slow(KINDS[kind], every=4)), range(1))
    multirate = made(spread, with_slow(KINDS[kind], every=4, drift=True))
    places = [{name: spread.get_parameter(name).detach().clone() for name in SLOW}]
    for step in range(4):
        train(spread, multirate, [step])
        places.append({name: spread.get_parameter(name).detach().clone() for name in SLOW})
    for name in SLOW:
        change = whole.get_parameter(name).detach() - places[0][name]
        assert change.abs().max() > 1e-3
        for step, place in enumerate(places):
            torch.testing.assert_close(place[name], places[0][name] + change * step / 4, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_resume_after_any_step_is_bit_identical(kind, bits, tmp_path):
    settings = with_slow(KINDS[kind], every=3, drift=True)
    straight = network(torch.float32).float()
    reference = made(straight, settings)
    saved = []
    for step in range(7):
        backward(straight, step, reference.due(step), torch.float32)
        reference.step(step)
        state = reference.state()
        write_tensors(tmp_path / str(step), state)
        saved.append((copy.deepcopy(straight.state_dict()), copy.deepcopy(reference.optimizer.state_dict())))
    for after, (weights, slots) in enumerate(saved[:-1]):
        results = []
        for load in (True, False):
            model = network(torch.float32)
            model.load_state_dict(weights)
            resumed = made(model, settings)
            resumed.optimizer.load_state_dict(copy.deepcopy(slots))
            if load:
                resumed.load_state(read_tensors(tmp_path / str(after)))
            for step in range(after + 1, 7):
                backward(model, step, resumed.due(step), torch.float32)
                resumed.step(step)
            results.append(bits(model))
        assert results[0] == bits(straight)
        assert (results[1] == bits(straight)) == (after % 3 == 2)  # the parts to come are part of the state


def test_a_state_is_a_copy_and_loading_clears():
    model = network()
    multirate = made(model, with_slow(KINDS["sgd"], every=3, drift=True))
    train(model, multirate, range(1))
    state = multirate.state()
    assert set(state) == {"0.weight/drift", "0.bias/drift"}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    multirate.load_state(state)
    train(model, multirate, range(1, 5))
    assert all(torch.equal(state[name], kept[name]) for name in state)
    multirate.load_state(state)
    multirate.state()["0.bias/drift"].zero_()
    state["0.bias/drift"].zero_()
    assert torch.equal(multirate.state()["0.bias/drift"], kept["0.bias/drift"])
    multirate.load_state({})
    assert multirate.state() == {}


def test_a_drifting_tensor_without_a_gradient_stays():
    model = network()
    multirate = made(model, with_slow(KINDS["sgd"], every=2, drift=True))
    before = model[0].weight.detach().clone()
    for step in range(3):
        backward(model, step, ("fast",))
        multirate.step(step)
    assert torch.equal(model[0].weight, before) and multirate.state() == {}
    train(model, multirate, [4])
    assert multirate.state()
    backward(model, 6, ("fast",))
    multirate.step(6)  # due, but without a gradient: the parts of the update before are not taken again
    assert multirate.state() == {}


def test_which_groups_are_due():
    settings = OptimizerSettings(groups={"slow": GroupSettings(every=2), "slower": GroupSettings(every=3)})
    groups = ["fast", "slow", "slower", "other"]
    found = ["".join(sorted(group[-1] for group in due(settings, step, groups))) for step in range(7)]
    assert found == ["rrtw", "rt", "rtw", "rrt", "rtw", "rt", "rrtw"]
    model = network()
    multirate = Multirate(torch.optim.SGD(model.parameters(), lr=0.1), settings, groups)
    assert multirate.due(1) == {"fast", "other"}
    backward(model, 1)
    before = model[0].weight.detach().clone()
    multirate.step(1)  # an optimizer that knows no groups moves all on every step
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.wait/drift": torch.ones(1)}, "unknown drift '0.wait/drift'; nearest: 0.weight/drift"),
        ({"0.weight": torch.ones(1)}, "unknown drift '0.weight'; nearest: 0.weight/drift"),
        ({"2.weight/drift": torch.ones(1)}, "unknown drift '2.weight/drift'; nearest: 0.weight/drift"),
        ({"0.weight/drift": torch.ones(1)}, "drift of 0.weight is [1], the model has [4, 3]"),
    ],
)
def test_a_state_of_something_else_is_told(tensors, message):
    multirate = made(network(), with_slow(KINDS["sgd"], every=3, drift=True))
    with pytest.raises(UserError) as error:
        multirate.load_state(tensors)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
