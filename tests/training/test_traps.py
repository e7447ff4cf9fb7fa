"""Faults of published training code: for each a check that our way passes and the published one, planted here, fails.

What is perturbed and what a name means is in `test_traps_meaning.py`. Traps that have such a test elsewhere:

| trap | test |
|---|---|
| only the first parameter group is scheduled | `test_schedules.py::test_a_schedule_that_reaches_the_first_group_only_...` |
| zero gradients in the place of none move what is frozen | `test_step_frozen.py::test_planted_zero_gradients_...` |
| weights after an ascent are put back by subtraction | `test_ascent.py::test_weights_come_back_bit_for_bit` |
| an average that shares tensors with the live model | `test_averaging.py::test_nothing_is_shared_with_the_live_model` |
| a cut by the order of registration | `../selection/test_ordered.py::test_the_order_of_registration_would_be_caught` |
| clean and adversarial images in one batch, split anywhere | `test_step_statistics.py::test_statistics_of_natural_images_...` |
| running deviation for variance, no eps | `../normalization/layers/test_joint.py::test_what_is_tracked_is_the_variance_...` |
| 8-bit perturbed images | `../analysis/test_signal.py` |
"""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.normalization import NormPolicy, Switch, inference
from robustlayers.selection import Partition, is_norm
from robustlayers.training import (
    PartialStep,
    PhaseTrainer,
    check_promises,
    compare,
    parse_ascent,
    snapshot,
)

ATTACK = PGD(Linf(0.1), steps=10, keep="last")
GROUPS = {"norm": "norm", "others": "rest"}
FREEZE_NORM = {"norm": "frozen", "others": "adversarial"}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def step_of(model, groups, signals, **options):
    options = {"attack": ATTACK, "optimizer": sgd(model)} | options
    return PartialStep(model, Partition(model, groups), signals, **options)


def descend(model, optimizer, x, y):
    """The end of every training loop."""
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def norm_names(model):
    return {f"{name}.{key}" for name, m in model.named_modules() if is_norm(m) for key in m.state_dict()}


def updates(model):
    """How often the statistics of each norm layer were updated since the fixture made the model."""
    return {int(t) - 3 for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}


# -- frozen norm layers whose statistics go on ------------------------------------------------------------------------


def ours_freezes(model, batches):
    step = step_of(model, GROUPS, FREEZE_NORM)
    for x, y in batches:
        model.train()  # as every loop of a user does
        step(x, y)


def requires_grad_is_all_that_is_switched(model, batches):
    """Bakiskan et al. 2022, src/retrain.py: frozen by `requires_grad`, then trained in train mode."""
    for module in filter(is_norm, model.modules()):
        module.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for x, y in batches:
        model.eval()
        x_adv = ATTACK(model, x, y, generator=stream(0, "attack"))
        model.train()
        descend(model, optimizer, x_adv, y)


def evaluation_mode_is_set_once(model, batches):
    """Norm layers are put in evaluation mode before the loop; the first `model.train()` takes it back."""
    for module in filter(is_norm, model.modules()):
        module.requires_grad_(False).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for x, y in batches:
        model.train()
        descend(model, optimizer, x, y)


def momentum_goes_on(model, batches):
    """One optimizer for both phases, gradients set to zero: momentum and weight decay move what is frozen."""
    optimizer = sgd(model)
    model.train()
    functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    yield optimizer.step()  # the first phase ends here
    for module in filter(is_norm, model.modules()):
        module.requires_grad_(False).eval()
    for x, y in batches:
        optimizer.zero_grad(set_to_none=False)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def frozen_norm_layers_moved(way, net, batch, bits):
    """The frozen tensors that are not bit-equal after training; the others must have moved."""
    model = net("resnet")
    run = way(model, [batch(seed=seed) for seed in range(3)])
    if inspect.isgenerator(run):  # in two phases
        next(run)
        before = bits(model)
        assert next(run, None) is None
    else:
        before = bits(net("resnet"))
    moved = {name for name, value in bits(model).items() if value != before[name]}
    assert moved >= {"conv1.weight", "linear.weight"}
    return moved & norm_names(model)


def test_frozen_norm_layers_are_bit_equal_after_any_loop(net, batch, bits):
    assert frozen_norm_layers_moved(ours_freezes, net, batch, bits) == set()


@pytest.mark.parametrize("way", [requires_grad_is_all_that_is_switched, evaluation_mode_is_set_once])
def test_the_published_freeze_lets_statistics_go_on(way, net, batch, bits):
    moved = frozen_norm_layers_moved(way, net, batch, bits)
    assert moved == {n for n in norm_names(net("resnet")) if n.endswith(("_mean", "_var", "_tracked"))}


def test_the_published_freeze_lets_momentum_go_on(net, batch, bits):
    moved = frozen_norm_layers_moved(momentum_goes_on, net, batch, bits)
    assert moved == {n for n in norm_names(net("resnet")) if n.endswith(("weight", "bias"))}


def freeze_check(model, before):
    """Bakiskan et al. 2022: weights and biases of frozen modules, to 1e-4; buffers are not looked at."""
    return all(
        bool(((tensor - before[name]).abs() < 1e-4).all())
        for name, tensor in model.state_dict().items()
        if name in norm_names(model) and name.endswith(("weight", "bias"))
    )


def nothing(model):
    pass


def statistics(model):
    model.bn1(torch.rand(4, model.bn1.num_features, 2, 2))


def counter(model):
    model.bn1.num_batches_tracked += 1


def least_bit(model):
    model.bn1.weight.copy_(torch.nextafter(model.bn1.weight, torch.full_like(model.bn1.weight, 9)))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (nothing, None),
        (statistics, "bn1.running_mean, bn1.running_var, bn1.num_batches_tracked"),
        (counter, "bn1.num_batches_tracked"),
        (least_bit, "bn1.weight"),
    ],
)
def test_the_ledger_sees_what_the_published_check_lets_pass(fault, named, net):
    model = net("small-cnn").train()
    partition, before = Partition(model, GROUPS), snapshot(model)
    with torch.no_grad():
        model.linear.weight += 0.1
        model.conv1.weight += 0.1
        fault(model)
    assert freeze_check(model, before)  # the trap: it is content with each of them
    reached = [name for name, _ in model.named_parameters()]
    ledger = compare(partition, {"norm": {}, "others": {"natural": 1.0}}, before, snapshot(model), reached)
    if named is None:
        check_promises(ledger)
    else:
        with pytest.raises(UserError) as error:
            check_promises(ledger)
        assert str(error.value) == f"group 'norm' was promised frozen, but {named} moved"


# -- forwards that move statistics besides the one that is trained on --------------------------------------------------


def ours(model, x, y, **options):
    step_of(model, {"all": "all"}, {"all": "adversarial"}, **options)(x, y, generator=stream(0, "attack", 5))


def as_rice(model, x, y, *, log=True):
    """Rice et al. 2020, train_cifar.py: train mode throughout, a score of what was crafted, a clean forward for the log."""
    model.train()
    x_adv = ATTACK(model, x, y, generator=stream(0, "attack", 5))
    with torch.no_grad():
        model(x_adv)
    descend(model, sgd(model), x_adv, y)
    if log:
        with torch.no_grad():
            model(x)


def strays(way, net, batch):
    """(updates of the statistics in a step, whether they are those of the adversarial images and of nothing else)."""
    model = net("resnet", torch.float64)
    x, y = batch(dtype=torch.float64)
    reference = copy.deepcopy(model).eval()
    x_adv = ATTACK(reference, x, y, generator=stream(0, "attack", 5))
    reference.train()(x_adv)
    way(model, x, y)
    (count,) = updates(model)
    state = model.state_dict()
    alike = [torch.allclose(state[n], b, rtol=0, atol=1e-12) for n, b in reference.named_buffers() if "running" in n]
    return count, all(alike)


def test_a_step_updates_statistics_once_by_what_it_is_trained_on(net, batch):
    assert strays(ours, net, batch) == (1, True)


def test_the_published_step_updates_them_thirteen_times(net, batch):
    assert strays(as_rice, net, batch) == (13, False)
    assert strays(lambda *args: as_rice(*args, log=False), net, batch) == (12, False)


@pytest.mark.parametrize(
    ("planted", "count"),
    [
        (NormPolicy(craft=Switch("batch", True)), 11),
        (NormPolicy(craft=Switch("running", True)), 11),
        (NormPolicy(log=Switch("batch", True)), 2),
        (NormPolicy(score=Switch("batch", True)), 2),
    ],
)
def test_each_stray_forward_would_be_counted(planted, count, net, batch):
    assert strays(lambda *args: ours(*args, policy=planted), net, batch) == (count, False)


def test_the_published_step_can_be_had_by_its_name(net, batch):
    one, two = net("resnet", torch.float64), net("resnet", torch.float64)
    x, y = batch(dtype=torch.float64)
    ours(one, x, y, policy="rice")
    as_rice(two, x, y)
    for (name, tensor), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(tensor, other, rtol=0, atol=1e-12), name


def test_what_the_log_tells_costs_no_forward(net, batch):
    model = net("small-cnn")
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(model.training))
    x, y = batch()
    log = step_of(model, {"all": "all"}, {"all": "natural"})(x, y)
    assert len(forwards) == 1 and updates(model) == {1}
    reference = net("small-cnn").train()
    logits = reference(x)
    assert int(log.correct["clean"]) == int((logits.argmax(1) == y).sum())
    assert torch.equal(log.losses["natural"], functional.cross_entropy(logits, y).detach())


def in_evaluation(model, x):
    with inference(model):
        model(x)


def in_train_mode(model, x):
    with torch.no_grad():
        model.train()(x)


def outcome_of_logging(log, net, batch, bits):
    model = net("small-cnn")
    x, _ = batch()
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=stream(0, "images"), dtype=torch.uint8)
    trainer = PhaseTrainer(
        model, {"all": "all"}, {"all": "natural"}, Images(pixels, torch.arange(12) % 3), epochs=2, batch_size=4
    )
    for _ in range(2):
        trainer.train_epoch(None if log is None else lambda done, of: log(model, x))
    return bits(model)


def test_logging_by_the_context_for_it_leaves_no_trace_and_in_train_mode_it_would(net, batch, bits):
    quiet = outcome_of_logging(None, net, batch, bits)
    assert outcome_of_logging(in_evaluation, net, batch, bits) == quiet
    loud = outcome_of_logging(in_train_mode, net, batch, bits)
    assert {name for name, value in loud.items() if value != quiet[name]} == {
        name for name in quiet if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


@pytest.mark.parametrize("settings", ["awp", "sam", {"name": "rwp", "steps": 3, "limit": 9}], ids=str)
@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (NormPolicy(), True),
        (NormPolicy(ascent=Switch("batch", False)), True),
        (NormPolicy(ascent=Switch("auto", True)), False),  # AWP and SAM as published: everything in train mode
    ],
)
def test_a_forward_at_perturbed_weights_leaves_statistics_alone(settings, policy, kept, net, batch):
    """Wu et al. 2020, Foret et al. 2021: the running statistics become those of weights that are never used again."""
    model = net("resnet", torch.float64)
    x, y = batch(dtype=torch.float64)
    reference = copy.deepcopy(model).train()
    reference(x)
    step_of(model, {"all": "all"}, {"all": "natural"}, ascent=settings, policy=policy)(x, y)
    state = model.state_dict()
    alike = all(torch.allclose(state[name], b, rtol=0, atol=1e-12) for name, b in reference.named_buffers())
    assert alike == kept
    steps = parse_ascent(settings).resolved().steps or 1
    assert updates(model) == {1 if kept else 1 + steps}


def ours_between_evaluations(model, batches, evaluate):
    step = step_of(model, {"all": "all"}, {"all": "adversarial"})
    for index, (x, y) in enumerate(batches):
        evaluate(model)
        step(x, y, generator=stream(0, "attack", index))


def mode_is_set_after_crafting(model, batches, evaluate):
    """AWP, Nguyen et al. 2024: train mode is set between crafting and descent, so an evaluation changes the next attack."""
    optimizer = sgd(model)
    model.train()
    for index, (x, y) in enumerate(batches):
        evaluate(model)
        x_adv = ATTACK(model, x, y, generator=stream(0, "attack", index))
        model.train()
        descend(model, optimizer, x_adv, y)


def evaluations_matter(way, net, batch, bits):
    found = []
    for evaluate in (nothing, nn.Module.eval):
        model = net("mlp")
        way(model, [batch(seed=seed) for seed in range(2)], evaluate)
        found.append(bits(model))
    return found[0] != found[1]


def test_the_mode_that_an_evaluation_left_behind_changes_nothing(net, batch, bits):
    assert not evaluations_matter(ours_between_evaluations, net, batch, bits)
    assert evaluations_matter(mode_is_set_after_crafting, net, batch, bits)


# -- the table above -------------------------------------------------------------------------------------------------


def test_tests_that_are_named_above_exist():
    here = Path(__file__)
    rows = [line.split("`")[1] for line in (__doc__ or "").splitlines() if line.endswith("` |")]
    assert len(rows) == 8
    for row in rows:
        path, _, name = row.partition("::")
        file = here.parent / path
        assert file.is_file(), row
        assert f"def {name.removesuffix('...')}" in file.read_text(encoding="utf-8") if name else True, row
