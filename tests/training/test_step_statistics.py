"""How often, and from which images, one step updates the running statistics of each norm layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch, crafting_forward, habit
from robustlayers.normalization.layers import DualBatchNorm, FilmNorm, JointBatchNorm, RandomNorm
from robustlayers.selection import Partition
from robustlayers.training import PartialStep, Turn

ATTACK = PGD(Linf(0.1), steps=10, keep="last")
CRAFT_IN_TRAIN_MODE = NormPolicy(craft=Switch("batch", True))


def step_of(model, groups, signals, policy=None, attack=ATTACK):
    return PartialStep(
        model,
        Partition(model, groups),
        signals,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        attack=attack,
        policy=policy,
    )


def counts(model):
    return {name: int(t) - 3 for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}


ALL, NORM_AND_REST = {"all": "all"}, {"norm": "norm", "others": "rest"}
STATISTICS = {"statistics": "norm.statistics", "others": "rest"}


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


class Own(nn.Module):
    """A norm layer that shares nothing with torch's."""

    is_normalization = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.register_buffer("level", torch.zeros(features))

    def forward(self, x):
        level = self.level
        if self.training:
            level = x.mean(0)
            self.level = 0.9 * self.level + 0.1 * level.detach()
        return (x - level) * self.scale


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


# -- more switches -------------------------------------------------------------------------------------------------

BOTH = {"all": {"natural": 0.5, "adversarial": 0.5}}


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


# -- branches ------------------------------------------------------------------------------------------------------

ADVPROP = NormPolicy(
    craft=Switch("running", False, branch="auxiliary"),
    adversarial=Switch(branch="auxiliary"),
    clean=Switch(branch="main"),
)


def dual():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        DualBatchNorm(nn.BatchNorm2d(4)),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()
    with torch.no_grad():
        model[1].auxiliary.weight.uniform_(0.5, 2)
        model[1].auxiliary.bias.normal_()
        model[1].auxiliary.running_mean.normal_(0, 0.3)
    return model


def images(seed=0):
    generator = stream(seed, "images")
    return torch.rand(12, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def test_each_pass_goes_through_its_branch_and_moves_no_others_private_tensors(bits):
    with torch.random.fork_rng(devices=[]):
        model = dual()
    before = bits(model)
    x, y = images()
    step_of(model, ALL, {"all": "natural"}, NormPolicy(clean=Switch(branch="auxiliary")))(x, y)
    assert model[1].branch == "main"
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed >= {name for name in before if name.startswith(("1.auxiliary", "4.", "7."))}
    assert not any(name.startswith("1.main") for name in changed)


def test_auxiliary_crafting_attacks_the_auxiliary_branch_in_the_folded_forward():
    with torch.random.fork_rng(devices=[]):
        model, reference = dual(), dual()
    x, y = images()
    seen = []

    def attack(forward, x, y, *, generator):
        seen.append(ATTACK(forward, x, y, generator=generator))
        return seen[-1]

    reference[1].branch = "auxiliary"
    expected = ATTACK(copy.deepcopy(reference).eval(), x, y, generator=stream(0, "attack"))
    reference[1].branch = "main"
    other = ATTACK(copy.deepcopy(reference).eval(), x, y, generator=stream(0, "attack"))
    assert not torch.allclose(expected, other, atol=1e-6)
    step = step_of(model, ALL, BOTH, ADVPROP)
    log, turn = type("Log", (), {"forward_passes": 0, "backward_passes": 0})(), Turn()
    for _ in range(2):  # the second with the fold that the first made
        found = step._crafting(x, y, stream(0, "attack"), 1.0, step.binding(turn), log, 0)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    folded = step._crafting._folded
    assert folded is not None and folded.folded == 1 and list(folded.as_it_is) == ["1"]
    foreign = step_of(model, ALL, BOTH, ADVPROP, attack)
    foreign.gradients(x, y, generator=stream(0, "attack"))
    assert torch.allclose(seen[0], expected, rtol=0, atol=1e-12)


def test_advprop_is_the_loop_that_switches_branches_by_hand():
    with torch.random.fork_rng(devices=[]):
        model, reference = dual(), dual()
    x, y = images()
    step_of(model, ALL, BOTH, ADVPROP)(x, y, generator=stream(0, "attack"))
    reference[1].branch = "auxiliary"
    x_adv = ATTACK(reference.eval(), x, y, generator=stream(0, "attack"))
    reference.train()
    reference[1].branch = "main"
    loss = functional.cross_entropy(reference(x), y)
    reference[1].branch = "auxiliary"
    (0.5 * loss + 0.5 * functional.cross_entropy(reference(x_adv), y)).backward()
    torch.optim.SGD(reference.parameters(), lr=0.01).step()
    for (key, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-9), key


def test_a_branch_set_by_the_user_makes_a_fold_follow():
    with torch.random.fork_rng(devices=[]):
        model = dual().eval()
    forward = crafting_forward(model)
    x, _ = images()
    for branch in ("auxiliary", "main", "auxiliary"):
        model[1].branch = branch
        forward.refresh()
        assert torch.allclose(forward(x), model(x), rtol=0, atol=1e-9)


def test_a_branch_that_no_layer_has_is_an_error(net):
    with pytest.raises(UserError, match="craft: branch 'auxiliary': no norm layer has branches"):
        step_of(net("mlp"), ALL, BOTH, ADVPROP)


def test_each_pass_has_its_condition():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), FilmNorm(DualBatchNorm(nn.BatchNorm2d(4))), nn.Flatten(), nn.Linear(144, 3)
    )
    policy = NormPolicy(
        craft=Switch("running", False, condition=0.4), clean=Switch(condition=0.0), adversarial=Switch(condition=0.4)
    )
    x, y = images()
    log = step_of(model, ALL, BOTH, policy)(x.float(), y)
    assert (model[1].condition, model[1].norm.branch) == (0.0, "main") and len(log.losses) == 2
    assert [int(model[1].norm.get_submodule(b).num_batches_tracked) for b in ("main", "auxiliary")] == [1, 1]


def random_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        RandomNorm(nn.BatchNorm2d(4)),
        RandomNorm(nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


@pytest.mark.parametrize("given", [True, False])
def test_random_norms_draw_by_the_step_and_not_by_what_was_drawn_before(given):
    """Steps 3 and 4 of a run are those of one that was resumed after step 2, whatever was drawn in between."""
    with torch.random.fork_rng(devices=[]):
        whole, resumed = random_net(), random_net()
    x, y = (t.float() if t.is_floating_point() else t for t in images())

    def run(step, model, places):
        for place in places:
            step.steps = place
            step(x, y, generator=stream(0, "attack", place) if given else None)
        return {name: t.clone() for name, t in model.state_dict().items()}

    kinds = [layer.draw() for layer in whole if isinstance(layer, RandomNorm)]
    expected = run(step_of(whole, ALL, BOTH), whole, range(4))
    state = run(step_of(resumed, ALL, BOTH), resumed, range(2))
    with torch.random.fork_rng(devices=[]):
        fresh = random_net()
    fresh.load_state_dict(state)
    fresh(x)
    found = run(step_of(fresh, ALL, BOTH), fresh, range(2, 4))
    assert len(kinds) == 2 and all(torch.equal(found[name], value) for name, value in expected.items())


def test_random_norms_draw_anew_in_each_step():
    with torch.random.fork_rng(devices=[]):
        model = random_net()
    seen = set()
    x, y = (t.float() if t.is_floating_point() else t for t in images())
    generator = stream(0, "one for all steps")
    step = step_of(model, ALL, {"all": "adversarial"})
    for _ in range(4):
        step(x, y, generator=generator)
        seen.add(model[1]._draws.position)
    assert len(seen) == 4


@pytest.mark.parametrize("statistics", [None, "both", "clean", "adversarial"])
def test_a_joint_batch_is_one_forward_of_both_kinds_of_images(statistics):
    """`cat` and the two OCT variants of Zhang et al. 2024, against a loop by hand."""

    def make():
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4) if statistics is None else JointBatchNorm(4, statistics=statistics)
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()

    with torch.random.fork_rng(devices=[]):
        model, reference = make(), make()
    x, y = images()
    step = step_of(model, ALL, BOTH, NormPolicy(joint=Switch()))
    log = step(x, y, generator=stream(0, "attack"))
    x_adv = ATTACK(reference.eval(), x, y, generator=stream(0, "attack"))
    reference.train()
    if statistics is not None:
        assert model[1].branch == "single"
        reference[1].branch = "joint"
    clean, adversarial = reference(torch.cat([x, x_adv])).chunk(2)
    (0.5 * functional.cross_entropy(clean, y) + 0.5 * functional.cross_entropy(adversarial, y)).backward()
    torch.optim.SGD(reference.parameters(), lr=0.01).step()
    for (key, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-9), key
    assert log.forward_passes == 12 == step.passes_per_batch()[0] and set(log.correct) == {"clean", "adversarial"}
    assert step.statistics_updates() == {"1": 1} and int(model[1].num_batches_tracked) == 1


def test_a_joint_batch_differentiates_each_group_by_its_own_objective():
    with torch.random.fork_rng(devices=[]):
        model, reference = dual(), dual()
    x, y = images()
    groups = {"norm": "norm", "others": "rest"}
    signals = {"norm": "natural", "others": "adversarial"}
    found = step_of(model, groups, signals, NormPolicy(joint=Switch())).gradients(x, y, generator=stream(0, "attack"))
    x_adv = ATTACK(reference.eval(), x, y, generator=stream(0, "attack"))
    clean, adversarial = reference.train()(torch.cat([x, x_adv])).chunk(2)
    named = dict(reference.named_parameters())
    losses = (functional.cross_entropy(clean, y), functional.cross_entropy(adversarial, y))
    natural, robust = (
        torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses
    )
    for name, one, two in zip(named, natural, robust, strict=True):
        wanted = one if name.startswith(("1.", "4.")) else two
        assert (wanted is None) == (name not in found.by_name)
        assert wanted is None or torch.allclose(found.by_name[name], wanted, rtol=0, atol=1e-9), name


def test_a_step_on_one_kind_of_images_has_no_joint_batch(net, batch):
    for signal in ("natural", "adversarial"):
        step = step_of(net("mlp"), ALL, {"all": signal}, NormPolicy(joint=Switch()))
        assert step(*batch()).forward_passes == step.passes_per_batch()[0] == (1 if signal == "natural" else 11)
    with pytest.raises(UserError, match="a joint batch is one pass of both"):
        NormPolicy(joint=Switch(), statistics="clean")
