"""A step in a loop of the user's own: any optimizer, any state of the model before it, nothing left behind after it."""

import copy

import pytest
import torch
from torch import nn

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.training import PartialStep

ATTACK = PGD(Linf(0.1), steps=2)
HEAD = {"head": "head", "others": "rest"}
MIXED = {"head": "adversarial", "others": "natural"}


def fingerprint(model, bits):
    """All that a step might disturb beside what it is for: flags, gradients, modes, attributes, hooks, objects."""
    return {
        "bits": bits(model),
        "parameters": [
            (id(p), p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()
        ],
        "buffers": [id(buffer) for buffer in model.buffers()],
        "modules": [
            (
                name,
                module.training,
                getattr(module, "track_running_stats", None),
                getattr(module, "momentum", None),
                sorted(vars(module)),
                [list(value) for key, value in vars(module).items() if key.endswith("hooks") and value is not None],
            )
            for name, module in model.named_modules()
        ],
        "random": torch.get_rng_state().tolist(),
    }


def lived_in(net, dtype=torch.float32):
    """A model as a user's script may leave it: mixed modes and flags, gradients here and there, a hook."""
    model = net("small-cnn", dtype)
    model.bn1.eval()
    model.layer1.train()
    model.layer2.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.conv1.register_forward_hook(lambda *_: None)
    return model


def step_of(model, groups=HEAD, signals=MIXED, attack=ATTACK, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return PartialStep(model, Partition(model, groups), signals, optimizer=optimizer, attack=attack, **options)


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


@pytest.mark.parametrize("policy", [None, NormPolicy(craft=Switch("batch", True), clean=Switch("running", True))])
def test_flags_modes_attributes_hooks_and_random_state_are_as_before(net, batch, bits, policy):
    model = lived_in(net)
    before = fingerprint(model, bits)
    step = step_of(model, policy=policy)
    step(*batch())
    after = fingerprint(model, bits)
    assert without(after, "bits", "parameters") == without(before, "bits", "parameters")
    assert [p[:2] for p in after["parameters"]] == [p[:2] for p in before["parameters"]]
    assert after["bits"] != before["bits"]


def test_gradients_alone_leave_even_grad_as_it_was(net, batch, bits):
    model = lived_in(net)
    before = fingerprint(model, bits)
    step_of(model, signals={"head": "adversarial", "others": "frozen"}).gradients(*batch())
    assert fingerprint(model, bits) == before


def test_the_state_that_the_user_left_the_model_in_changes_no_result(net, batch, bits):
    # In double precision, since a hook makes crafting take another path, which may differ in the last bits.
    double = torch.float64
    results = []
    models = [
        net("small-cnn", double),
        net("small-cnn", double).eval(),
        lived_in(net, double),
        net("small-cnn", double),
    ]
    models[3].requires_grad_(False)
    for model in models:
        step = step_of(model)
        for index in range(2):
            step(*batch(seed=index, dtype=double))
        results.append(bits(model))
    assert results[0] == results[1] == results[2] == results[3]


def test_it_trains_under_no_grad_too(net, batch, bits):
    model, other = net("small-cnn"), net("small-cnn")
    step_of(model)(*batch())
    with torch.no_grad():
        step_of(other)(*batch())
        assert not torch.is_grad_enabled()
    assert bits(model) == bits(other)


def test_earlier_gradients_and_momentum_of_frozen_parameters_do_nothing(net, batch, bits):
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(batch()[0]).square().sum().backward()
    optimizer.step()  # momentum everywhere
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    reference = copy.deepcopy(model)
    step = PartialStep(model, Partition(model, HEAD), {"head": "natural", "others": "frozen"}, optimizer=optimizer)
    before = bits(model)
    step(*batch())
    assert {name for name, value in bits(model).items() if value != before[name]} == {"linear.weight", "linear.bias"}
    # and the head made a step of its own momentum, not one without
    reference.eval()
    found = torch.autograd.grad(nn.functional.cross_entropy(reference(batch()[0]), batch()[1]), reference.linear.bias)[
        0
    ]
    velocity = optimizer.state[model.linear.bias]["momentum_buffer"]
    assert not torch.allclose(velocity, found + 0.1 * reference.linear.bias, atol=1e-3)
    assert torch.allclose(model.linear.bias, reference.linear.bias - 0.1 * velocity)


def test_while_the_optimizer_steps_what_is_frozen_needs_no_gradient_and_has_none(net, batch, monkeypatch):
    model = lived_in(net)
    step = step_of(model, signals={"head": "adversarial", "others": "frozen"})
    seen = {}

    def look(*_):
        seen.update({name: (p.requires_grad, p.grad is not None) for name, p in model.named_parameters()})

    monkeypatch.setattr(step.optimizer, "step", look)
    step(*batch())
    assert seen == {name: (name.startswith("linear."),) * 2 for name, _ in model.named_parameters()}


def test_phases_follow_each_other_with_one_optimizer_and_a_scheduler(net, batch, bits):
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    partition = Partition(model, HEAD)
    for signals, moving in (
        (("natural", "frozen"), True),
        (("frozen", "adversarial"), False),
        (("adversarial", "frozen"), True),
    ):
        step = PartialStep(
            model, partition, dict(zip(("head", "others"), signals, strict=True)), optimizer=optimizer, attack=ATTACK
        )
        before = bits(model)
        step(*batch())
        scheduler.step()
        changed = {name for name, value in bits(model).items() if value != before[name]}
        assert changed == ({"linear.weight", "linear.bias"} if moving else set(before) - {
            "linear.weight", "linear.bias", "normalize.mean", "normalize.std"
        })  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


class Stop(Exception):
    pass


def vandal(model, x, y, *, generator):
    """An attack that changes all it can reach, then fails."""
    model.train()
    model.requires_grad_(True)
    model(x.clone().requires_grad_()).sum().backward()
    model.conv1.register_forward_hook(lambda *_: None)
    torch.rand(3)
    raise Stop


def test_an_exception_in_the_attack_leaves_everything_as_it_was(net, batch, bits):
    model = lived_in(net)
    before = fingerprint(model, bits)
    step = step_of(model, attack=vandal)
    for call in (step, step.gradients):
        with pytest.raises(Stop):
            call(*batch())
        # the clean pass had not begun: crafting comes first
        assert fingerprint(model, bits) == before
    assert step.steps == 0 and not step.optimizer.state


@pytest.mark.parametrize("which", [1, 2])
def test_an_exception_in_a_training_pass_leaves_parameters_flags_modes_and_hooks_as_they_were(net, batch, bits, which):
    model = lived_in(net)
    passes = []

    def fail(module, inputs):
        if not inputs[0].requires_grad or module.linear.weight.requires_grad:  # not one of the attack's
            passes.append(1)
            if len(passes) == which:
                raise Stop

    model.register_forward_pre_hook(fail)
    before = fingerprint(model, bits)
    step = step_of(model, attack=PGD(Linf(0.1), steps=2, keep="last"))
    with pytest.raises(Stop):
        step(*batch())
    after = fingerprint(model, bits)
    assert without(after, "bits") == without(before, "bits")
    parameters = dict(model.named_parameters())
    assert all(after["bits"][name] == before["bits"][name] for name in parameters)


def test_an_exception_in_the_optimizer_leaves_flags_and_modes_as_they_were(net, batch, bits, monkeypatch):
    model = lived_in(net)
    before = fingerprint(model, bits)
    step = step_of(model)

    def fail(*_):
        raise Stop

    monkeypatch.setattr(step.optimizer, "step", fail)
    with pytest.raises(Stop):
        step(*batch())
    after = fingerprint(model, bits)
    assert after["modules"] == before["modules"]
    assert [p[:2] for p in after["parameters"]] == [p[:2] for p in before["parameters"]]


def test_the_noise_of_the_attack_is_a_function_of_seed_and_step(net, batch, bits):
    def run(seed, given=False, noise=0):
        model = net("mlp")
        step = step_of(model, {"all": "all"}, {"all": "adversarial"}, seed=seed)
        for index in range(2):
            torch.rand(noise)  # draws of other parts of the program
            step(*batch(), generator=stream(seed, "attack", index) if given else None)
        return bits(model)

    assert run(0) == run(0, noise=5) == run(0, given=True)
    assert run(0) != run(1)
    model = net("mlp")
    seen = []
    step = step_of(model, {"all": "all"}, {"all": "adversarial"})
    step.attack = lambda f, x, y, *, generator: seen.append(torch.rand(4, generator=generator)) or x
    step(*batch())
    step(*batch())
    assert not torch.equal(*seen)


def test_a_module_that_is_used_twice_and_a_tied_weight(batch, bits):
    """Gradients of all uses add up, and a tied tensor is frozen or trained as one."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(64, 6)
            self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
            self.again = self.block
            self.one = nn.Linear(6, 3, bias=False)
            self.two = nn.Linear(6, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            x = self.again(self.block(self.enter(x.flatten(1))).relu()).relu()
            return self.one(x) + self.two(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied()
    x, y = batch()
    reference = copy.deepcopy(model)
    nn.functional.cross_entropy(reference(x), y).backward()
    partition = Partition(model, {"enter": "enter", "others": "rest"})
    step = PartialStep(
        model, partition, {"enter": "frozen", "others": "natural"}, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    found = step.gradients(x, y).by_name
    for name, parameter in reference.named_parameters():
        if name.startswith("enter"):
            assert name not in found
        else:
            assert torch.allclose(found[name], parameter.grad, atol=1e-7), name
    assert int(model.block[1].num_batches_tracked) == 2  # it ran twice
    frozen = Partition(model, {"two": "two", "others": "rest"})
    before = bits(model)
    PartialStep(
        model, frozen, {"two": "frozen", "others": "natural"}, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )(x, y)
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert not changed & {"one.weight", "two.weight", "two.bias"} and "enter.weight" in changed


def test_a_group_that_the_forward_does_not_use_learns_nothing_and_breaks_nothing(batch, bits):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x.flatten(1))

    model = Half()
    partition = Partition(model, {"unused": "unused", "used": "rest"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    before = bits(model)
    log = PartialStep(model, partition, {"unused": "natural", "used": "frozen"}, optimizer=optimizer)(*batch())
    assert bits(model) == before and log.backward_passes == 0
    PartialStep(model, partition, {"unused": "natural", "used": "natural"}, optimizer=optimizer)(*batch())
    assert {n for n, v in bits(model).items() if v != before[n]} == {"used.weight", "used.bias"}


@pytest.mark.parametrize(
    ("signals", "attack", "faults"),
    [
        ({"head": "natural"}, None, ["group 'others' has no signal"]),
        ({}, None, ["group 'head' has no signal", "group 'others' has no signal"]),
        (
            {"haed": "natural", "others": "natural"},
            None,
            ["unknown group 'haed'; nearest: head; allowed: head, others", "group 'head' has no signal"],
        ),
        (
            {"head": "naturel", "others": "frozen"},
            None,
            ["unknown signal 'naturel'; nearest: natural; allowed: adversarial, frozen, natural"],
        ),
        ({"head": "frozen", "others": "frozen"}, ATTACK, ["every group is frozen: nothing to train"]),
        ({"head": "adversarial", "others": "frozen"}, None, ["a signal is adversarial, so an attack is needed"]),
        (
            {"head": {"natural": 1, "adversarial": 1}, "others": "frozen"},
            None,
            ["a signal is adversarial, so an attack is needed"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_the_step_is_made(net, signals, attack, faults):
    with pytest.raises(UserError) as error:
        step_of(net("small-cnn"), signals=signals, attack=attack)
    assert [str(fault) for fault in error.value.faults] == faults


def test_an_optimizer_without_the_tensors_to_train_is_told(net):
    model = net("small-cnn")
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.1)
    partition = Partition(model, HEAD)
    PartialStep(model, partition, {"head": "natural", "others": "frozen"}, optimizer=optimizer)
    with pytest.raises(UserError) as error:
        PartialStep(model, partition, {"head": "frozen", "others": "natural"}, optimizer=optimizer)
    assert str(error.value) == (
        "the optimizer lacks tensors that are to learn: conv1.weight, bn1.weight, bn1.bias, layer1.0.conv1.weight and 5 more"
    )


@pytest.mark.parametrize("signal", ["natural", "adversarial"])
def test_a_batch_without_images_or_with_labels_of_another_kind_is_refused_and_moves_nothing(net, batch, bits, signal):
    model, (x, y) = net("small-cnn"), batch()
    step = step_of(model, signals={"head": signal, "others": signal})
    before = bits(model)
    for labels, words in ((y.double(), "one integer label per image"), (y[1:], "one integer label per image")):
        with pytest.raises(UserError, match=words):
            step(x, labels)
    with pytest.raises(UserError, match="the batch is empty"):
        step(x[:0], y[:0])
    assert bits(model) == before


def test_labels_of_any_integer_type_are_the_same(net, batch, bits):
    x, y = batch()
    steps = [step_of(net("small-cnn")) for _ in range(2)]
    steps[0](x, y)
    steps[1](x, y.to(torch.int32))
    assert bits(steps[0].model) == bits(steps[1].model)


def test_a_partition_of_another_model_is_told(net):
    model = net("small-cnn")
    with pytest.raises(UserError, match=r"^the partition was bound to another model$"):
        PartialStep(model, Partition(copy.deepcopy(model), HEAD), MIXED, optimizer=None, attack=ATTACK)
