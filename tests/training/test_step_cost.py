"""A step makes the passes it needs and no more, and each backward stops at the shallowest tensor that learns."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers.attacks import APGD, FGSM, PGD, Linf, Noise
from robustlayers.core.errors import UserError
from robustlayers.selection import Partition
from robustlayers.training import PartialStep

PGD_LAST = PGD(Linf(0.1), steps=3, keep="last")
ATTACKS = {
    "pgd, last": (PGD_LAST, 3, 3),
    "pgd, best": (PGD(Linf(0.1), steps=3), 4, 3),
    "pgd, restarts": (PGD(Linf(0.1), steps=2, restarts=2), 6, 4),
    "fgsm": (FGSM(Linf(0.1)), 1, 1),
    "apgd": (APGD(Linf(0.1), steps=4), None, None),
    "noise": (Noise(Linf(0.1)), None, None),
}


@pytest.fixture
def counter(monkeypatch):
    """Count forwards of a model by a hook and backwards by the one function that makes them."""

    class Counter:
        forward = backward = 0

        def watch(self, model):
            def count(*_):
                self.forward += 1

            model.register_forward_hook(count)

    found = Counter()
    honest = torch.autograd.grad

    def grad(*args, **named):
        found.backward += 1
        return honest(*args, **named)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return found


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("signals", "own"),
    [
        (("natural", "natural"), (1, 1)),
        (("frozen", "natural"), (1, 1)),
        (("adversarial", "adversarial"), (1, 1)),
        (("adversarial", "frozen"), (1, 1)),
        (("natural", "adversarial"), (2, 2)),
        (({"natural": 0.5, "adversarial": 0.5}, "frozen"), (2, 2)),
        (({"natural": 0.5, "adversarial": 0.5}, "adversarial"), (2, 2)),
    ],
)
def test_the_log_and_the_forecast_are_what_is_made(net, batch, counter, attack, signals, own):
    made, forward, backward = ATTACKS[attack]
    model = net("small-cnn")
    counter.watch(model)
    partition = Partition(model, {"one": "norm", "two": "rest"})
    step = PartialStep(model, partition, dict(zip(("one", "two"), signals, strict=True)), optimizer=None, attack=made)
    log = step.gradients(*batch()).log
    assert (log.forward_passes, log.backward_passes) == (counter.forward, counter.backward) == step.passes_per_batch()
    crafts = "adversarial" in str(signals)
    if forward is not None or not crafts:
        assert (counter.forward, counter.backward) == (
            own[0] + crafts * (forward or 0),
            own[1] + crafts * (backward or 0),
        )
    assert log.size == 6 and set(log.losses) == {n for n in ("natural", "adversarial") if n in str(signals)}


def test_statistics_alone_cost_a_forward_and_no_backward(net, batch, counter):
    model = net("small-cnn")
    counter.watch(model)
    partition = Partition(model, {"statistics": "norm.statistics", "others": "rest"})
    step = PartialStep(model, partition, {"statistics": "natural", "others": "frozen"}, optimizer=None)
    seen = []
    model.linear.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    log = step.gradients(*batch()).log
    assert (log.forward_passes, log.backward_passes) == (counter.forward, counter.backward) == (1, 0)
    assert step.passes_per_batch() == (1, 0)
    assert seen == [False]  # nothing is recorded either


def recorded(model, step, batch):
    """For each training pass of a step: the norm layers and convolutions whose output autograd recorded."""
    found = []

    def mark(name):
        def hook(module, inputs, output):
            # While an attack runs, the images themselves are recorded; in a training pass only parameters are.
            if not crafting[0]:
                found[-1].append(name if output.requires_grad else f"({name})")

        return hook

    crafting = [False]
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    handles = [m.register_forward_hook(mark(n)) for n, m in model.named_modules() if isinstance(m, kinds)]

    def start(module, inputs):
        crafting[0] = inputs[0].requires_grad
        if not crafting[0]:
            found.append([])

    handles.append(model.register_forward_pre_hook(start))
    step(*batch())
    for handle in handles:
        handle.remove()
    return [" ".join(names) for names in found]


@pytest.mark.parametrize(
    ("groups", "signals", "expected"),
    [
        (
            {"head": "head", "others": "rest"},
            {"head": "natural", "others": "frozen"},
            ["(conv1) (bn1) (layer1.0.conv1) (layer1.0.bn1) (layer2.0.conv1) (layer2.0.bn1) linear"],
        ),
        (
            {"head": "head", "others": "rest"},
            {"head": "adversarial", "others": "frozen"},
            ["(conv1) (bn1) (layer1.0.conv1) (layer1.0.bn1) (layer2.0.conv1) (layer2.0.bn1) linear"],
        ),
        (
            {"late": "stage(2)", "others": "rest"},
            {"late": "natural", "others": "frozen"},
            ["(conv1) (bn1) (layer1.0.conv1) (layer1.0.bn1) layer2.0.conv1 layer2.0.bn1 linear"],
        ),
        (
            {"norm": "norm.affine", "others": "rest"},
            {"norm": "natural", "others": "frozen"},
            ["(conv1) bn1 layer1.0.conv1 layer1.0.bn1 layer2.0.conv1 layer2.0.bn1 linear"],
        ),
        (  # each pass for the groups of its own objective
            {"head": "head", "middle": "stage(1)", "others": "rest"},
            {"head": "natural", "middle": "adversarial", "others": "frozen"},
            [
                "(conv1) (bn1) (layer1.0.conv1) (layer1.0.bn1) (layer2.0.conv1) (layer2.0.bn1) linear",
                "(conv1) (bn1) layer1.0.conv1 layer1.0.bn1 layer2.0.conv1 layer2.0.bn1 linear",
            ],
        ),
        (
            {"all": "all"},
            {"all": "natural"},
            ["conv1 bn1 layer1.0.conv1 layer1.0.bn1 layer2.0.conv1 layer2.0.bn1 linear"],
        ),
    ],
)
def test_backward_stops_at_the_shallowest_tensor_that_learns(net, batch, groups, signals, expected):
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = PartialStep(
        model, Partition(model, groups), signals, optimizer=optimizer, attack=PGD(Linf(0.1), steps=2, keep="last")
    )
    assert recorded(model, step, batch) == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_what_learns_has_a_gradient_and_its_memory(net, batch):
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    partition = Partition(model, {"head": "head", "others": "rest"})
    step = PartialStep(model, partition, {"head": "natural", "others": "frozen"}, optimizer=optimizer)
    step(*batch())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"linear.weight", "linear.bias"}
    assert set(map(id, optimizer.state)) == {id(model.linear.weight), id(model.linear.bias)}


def test_the_log_counts_right_answers_before_the_update(net, batch):
    model = net("small-cnn")
    x, y = batch(20)
    step = PartialStep(
        model,
        Partition(model, {"norm": "norm", "others": "rest"}),
        {"norm": "frozen", "others": {"natural": 1, "adversarial": 1}},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        attack=PGD_LAST,
    )
    model.eval()
    right = (model(x).argmax(1) == y).sum()
    loss = nn.functional.cross_entropy(model(x), y).detach()
    log = step(x, y)
    assert torch.equal(log.correct["clean"], right) and torch.allclose(log.losses["natural"], loss)
    assert int(log.correct["adversarial"]) <= int(right)
    assert torch.equal(log.loss, log.losses["natural"] + log.losses["adversarial"])


def test_an_attack_without_counts_counts_as_none(net, batch):
    model = net("mlp")
    step = PartialStep(
        model,
        Partition(model, {"all": "all"}),
        {"all": "adversarial"},
        optimizer=None,
        attack=lambda f, x, y, *, generator: x,
    )
    assert step.passes_per_batch() == (1, 1)
    log = step.gradients(*batch()).log
    assert (log.forward_passes, log.backward_passes) == (1, 1)
    with pytest.raises(UserError, match="no optimizer"):
        step(*batch())


@pytest.fixture(scope="module")
def partial_step():
    """The benchmark, whose counting of computed gradients is tested here."""
    with pytest.MonkeyPatch.context() as patch:  # scripts import one another by name
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return importlib.import_module("partial_step")


# The net in order: conv1 bn1 layer1.conv1 layer1.bn1 layer2.conv1 layer2.bn1 linear. Expected: gradients of weights and of
# inputs in the training pass of its objective; the images' own gradient is never wanted there.
COSTS = {
    "everything": ("all", 7, 6),
    "norm layers": ("norm", 3, 5),  # not below bn1: neither its input nor conv1
    "scales of the first norm layer": ("bn1.weight", 1, 5),
    "statistics": ("norm.statistics", 0, 0),
    "head": ("head", 1, 0),
    "bias of the head": ("linear.bias", 0, 0),
    "last stage": ("stage(2)", 2, 2),  # bn and linear pass on to its convolution
    "last norm layer": ("layer2.0.bn1", 1, 1),
    "first convolution": ("conv1", 1, 6),
    "a middle convolution": ("layer1.0.conv1", 1, 4),
    "all but norm layers": ("all - norm", 4, 6),
}


@pytest.mark.parametrize("objective", ["natural", "adversarial"])
@pytest.mark.parametrize("part", COSTS)
def test_no_gradient_is_computed_for_what_is_frozen_nor_below_what_learns(net, batch, partial_step, part, objective):
    model = net("small-cnn")
    selector, weights, inputs = COSTS[part]
    step = partial_step.make_step(model, selector, objective, 3)
    step(*batch())  # the first step makes what later ones use again
    counts = partial_step.count(model, lambda: step(*batch()))
    crafting = 0
    if objective == "adversarial":  # three steps through the whole net, with gradients of inputs alone
        folded = 4  # crafting meets no norm layers: they are folded into the convolutions
        crafting = 3 * folded
    assert counts == partial_step.Counts(weights, inputs + crafting)


def test_two_objectives_cost_what_each_of_them_needs(net, batch, partial_step):
    model = net("small-cnn")
    step = PartialStep(
        model,
        Partition(model, {"head": "head", "late": "stage(2)", "others": "rest"}),
        {"head": "natural", "late": "adversarial", "others": "frozen"},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        attack=FGSM(Linf(0.1)),
    )
    counts = partial_step.count(model, lambda: step(*batch()))
    assert counts == partial_step.Counts(1 + 2, 0 + 2 + 4)


def test_the_count_sees_what_a_naive_step_wastes(net, batch, partial_step):
    """Published loops freeze by leaving tensors out of the optimizer: all gradients are computed all the same."""
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.1)

    def naive():
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert partial_step.count(model, naive) == partial_step.Counts(7, 6)
