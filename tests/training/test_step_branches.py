"""Steps on norm layers with branches, conditions or draws of their own, and on both kinds of images as one batch."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch, crafting_forward
from robustlayers.normalization.layers import DualBatchNorm, FilmNorm, JointBatchNorm, RandomNorm
from robustlayers.training import Turn

_spec = importlib.util.spec_from_file_location("step_cases", Path(__file__).with_name("step_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

ALL, ATTACK, BOTH, images, step_of = cases.ALL, cases.ATTACK, cases.BOTH, cases.images, cases.step_of

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
