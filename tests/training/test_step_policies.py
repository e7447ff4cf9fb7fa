"""What norm policies make of a step: attacks that change modes, mixtures, frozen statistics, momenta, layers apart."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch, habit
from robustlayers.selection import Partition

_spec = importlib.util.spec_from_file_location("step_cases", Path(__file__).with_name("step_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ALL, ATTACK, BOTH = cases.ALL, cases.ATTACK, cases.BOTH
CRAFT_IN_TRAIN_MODE, NORM_AND_REST = cases.CRAFT_IN_TRAIN_MODE, cases.NORM_AND_REST
Own, counts, step_of = cases.Own, cases.counts, cases.step_of


def train_mode_afterwards(model, x, y, *, generator):
    """An attack that leaves the whole model in train mode, and uses it there: a published fault."""
    model.train()
    model(x)
    return ATTACK(model, x, y, generator=generator)


def eval_mode_afterwards(model, x, y, *, generator):
    """An attack that goes into evaluation mode and back, as most published ones do."""
    model.eval()
    x_adv = ATTACK(model, x, y, generator=generator)
    model.train()
    return x_adv


@pytest.mark.parametrize("attack", [train_mode_afterwards, eval_mode_afterwards])
@pytest.mark.parametrize("policy", [None, CRAFT_IN_TRAIN_MODE, habit("rice"), habit("frozen")])
@pytest.mark.parametrize("groups", [ALL, NORM_AND_REST])
def test_an_attack_that_changes_modes_changes_no_policy(net, batch, bits, attack, policy, groups):
    signals = {group: "adversarial" if group in ("all", "others") else "frozen" for group in groups}
    found = []
    for one in (ATTACK, attack):
        model = net("small-cnn")
        step = step_of(model, groups, signals, policy, one)
        step(*batch(), generator=stream(0, "attack", 5))
        found.append((bits(model), counts(model)))
    if "all" not in groups:
        assert set(found[1][1].values()) == {0}
        norms = {name for name in found[1][0] if "bn" in name}
        before = bits(net("small-cnn"))
        assert norms and all(found[1][0][name] == before[name] for name in norms)
    elif policy in (None, habit("frozen")) and attack is eval_mode_afterwards:
        assert found[0][1] == found[1][1]
    else:  # what the attack did, by the policy: one forward more, and no scoring of an attack that is not ours
        extra = 0 if policy is None or policy == habit("frozen") else int(attack is train_mode_afterwards)
        score = int(policy == habit("rice"))
        assert {name: n + extra - score for name, n in found[0][1].items()} == found[1][1]


def test_an_attack_that_writes_into_frozen_statistics_while_others_move_is_undone(net, batch, bits):
    def writes(model, x, y, *, generator):
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
        model.train()
        return ATTACK(model, x, y, generator=generator)

    model = net("resnet")
    before = bits(model)
    groups = {"moves": "norm.statistics & stage(1)", "rest": "rest"}
    step_of(model, groups, {"moves": "adversarial", "rest": "frozen"}, CRAFT_IN_TRAIN_MODE, writes)(*batch())
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed == set(Partition(model, groups)["moves"])


def test_a_mixture_in_the_step_is_the_formula(net, batch):
    """Values and gradients of the whole step, against a model whose norm layers compute the mixture themselves."""

    class Mixing(nn.BatchNorm1d):
        def forward(self, input):  # noqa: A002
            mean = 0.3 * input.mean(0) + 0.7 * self.running_mean
            var = 0.3 * input.var(0, unbiased=False) + 0.7 * self.running_var
            return (input - mean) / (var + self.eps).sqrt() * self.weight + self.bias

    model, reference = net("mlp", torch.float64), net("mlp", torch.float64)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.__class__ = Mixing
    switch = Switch("mixture", False, alpha=0.3)
    x, y = batch(dtype=torch.float64)
    step = step_of(model, ALL, {"all": "natural"}, NormPolicy(clean=switch))
    found = step.gradients(x, y).by_name
    named = dict(reference.named_parameters())
    loss = functional.cross_entropy(reference(x), y)
    wanted = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=1e-10), name
    assert set(counts(model).values()) == {0}


def test_frozen_is_the_start_of_the_phase_however_far_the_running_statistics_are(net, batch):
    """With every pass by the frozen statistics, parameters go where they go with statistics that do not move."""
    moving, resting = net("resnet", torch.float64), net("resnet", torch.float64)
    switches = {
        name: Switch("frozen", update) for name, update in (("craft", False), ("clean", True), ("adversarial", True))
    }
    one = step_of(moving, ALL, BOTH, NormPolicy(**switches))
    two = step_of(resting, ALL, BOTH, habit("frozen"))
    for seed in range(2):
        x, y = batch(seed=seed, dtype=torch.float64)
        one(x, y, generator=stream(seed, "attack"))
        two(x, y, generator=stream(seed, "attack"))
    assert set(counts(moving).values()) == {4} and set(counts(resting).values()) == {0}
    for (name, a), b in zip(moving.named_parameters(), resting.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9), name


def test_momentum_and_cumulative_average_are_those_of_torch(net, batch):
    for momentum, own in ((0.5, 0.5), ("cumulative", None)):
        model, reference = net("mlp", torch.float64), net("mlp", torch.float64)
        for module in reference.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = own
        policy = NormPolicy(clean=Switch(momentum=momentum))
        for seed in range(3):
            x, y = batch(seed=seed, dtype=torch.float64)
            step_of(model, ALL, {"all": "natural"}, policy)(x, y)
            step_of(reference, ALL, {"all": "natural"})(x, y)
        for (key, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
            assert torch.equal(one, two), key
        assert all(getattr(module, "momentum", 0.1) == 0.1 for module in model.modules())


def test_layers_may_have_switches_of_their_own(net, batch):
    model = net("resnet")
    own = {"craft": Switch("batch", True), "adversarial": Switch("running", False)}
    step = step_of(model, ALL, {"all": "adversarial"}, NormPolicy(layers={"norm & stage(1)": own}))
    step(*batch())
    first = {name for name in counts(model) if name in Partition(model, {"a": "stage(1)", "b": "rest"})["a"]}
    assert first and counts(model) == {name: 10 if name in first else 1 for name in counts(model)}
    assert step.statistics_updates() == {name.rpartition(".")[0]: n for name, n in counts(model).items()}


def test_a_setting_that_a_layer_cannot_follow_is_an_error_before_the_first_step(net):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Own(4), nn.Linear(4, 3))
    for switch, message in (
        (Switch("mixture", alpha=0.5), "clean: 2: Own has no running mean and variance per channel to mix"),
        (Switch(momentum=0.5), "clean: 2: Own has no momentum to set"),
    ):
        with pytest.raises(UserError, match=message):
            step_of(model, ALL, {"all": "natural"}, NormPolicy(clean=switch))
