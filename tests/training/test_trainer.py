import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.data import Images, batches
from robustlayers.training import Diverged, OptimizerSettings, PhaseTrainer, Schedule

ATTACK = PGD(Linf(0.1), steps=2, keep="last")
GROUPS = {"norm": "norm", "others": "rest"}


@pytest.fixture(scope="module")
def images():
    generator = stream(0, "test-images")
    pixels = torch.randint(0, 256, (21, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(21) % 3)


def plain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def trainer_of(model, images, signal="natural", groups=None, signals=None, **options):
    options = {"epochs": 2, "attack": ATTACK, "batch_size": 5, "optimizer": OptimizerSettings(lr=0.01)} | options
    return PhaseTrainer(model, groups or {"all": "all"}, signals or {"all": signal}, images, **options)


def test_an_epoch_is_a_plain_loop(net, images):
    model = net("small-cnn")
    reference = copy.deepcopy(model).train()
    settings = OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=5e-4)
    trainer = trainer_of(model, images, optimizer=settings, schedule=Schedule("linear"), seed=3)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(2):
        losses = []
        for x, y in batches(images, 5, seed=3, epoch=epoch):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8)
            optimizer.zero_grad()
            loss = functional.cross_entropy(reference(x), y)
            loss.backward()
            optimizer.step()
            losses += [float(loss.detach())] * len(y)
            step += 1
        log = trainer.train_epoch()
        assert log.epoch == epoch + 1 and log.loss == pytest.approx(sum(losses) / 21, rel=1e-5)
        assert (log.forward_passes, log.backward_passes) == (21, 21) and log.seconds > 0
    assert step == 8 and trainer.done == 2
    for (name, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_passes_are_counted_per_image(net, images):
    signals = {"norm": "adversarial", "others": "natural"}
    log = trainer_of(net("mlp"), images, groups=GROUPS, signals=signals).train_epoch()
    assert (log.forward_passes, log.backward_passes) == (21 * (2 + 2), 21 * (2 + 2))


def test_progress_counts_batches_and_a_finished_phase_is_told(net, images):
    trainer = trainer_of(net("mlp"), images, epochs=1)
    seen = []
    trainer.train_epoch(lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]  # 21 images: the one left over joins the last batch
    with pytest.raises(UserError, match=r"^the phase has 1 epoch\(s\), all done$"):
        trainer.train_epoch()


@pytest.mark.parametrize("signal", ["natural", "adversarial"])
def test_a_rate_that_is_far_too_high_stops_the_run_within_a_step(images, signal):
    trainer = trainer_of(plain(), images, signal, optimizer=OptimizerSettings(lr=1e12, momentum=0.9))
    losses = []
    honest = trainer.step

    def step(*args, **named):
        log = honest(*args, **named)
        losses.append(float(log.losses[signal]))
        return log

    trainer.step = step
    with pytest.raises(Diverged) as error:
        trainer.train_epoch()
    bad = [index for index, loss in enumerate(losses) if not torch.isfinite(torch.tensor(loss))]
    assert bad and len(losses) <= bad[0] + 2  # at most one step more than the first that is not finite
    assert str(error.value) == f"the {signal} loss is {losses[bad[0]]} at epoch 1, step {bad[0] + 1}"
    assert trainer.done == 0


@pytest.mark.parametrize(
    ("norm", "others", "named"), [("natural", "adversarial", "natural"), ("frozen", "adversarial", "adversarial")]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_weight_that_is_not_a_number_is_noticed_in_the_next_step(net, images, norm, others, named, at):
    model = net("mlp")
    trainer = trainer_of(model, images, groups=GROUPS, signals={"norm": norm, "others": others})
    trainer.first_epoch = 6
    steps = []

    def plant(done, of):
        steps.append(done)
        if done == at:
            with torch.no_grad():
                model[-1].weight[0, 0] = torch.nan

    with pytest.raises(Diverged) as error:
        trainer.train_epoch(plant)
    assert str(error.value) == f"the {named} loss is nan at epoch 7, step {at + 1}"
    assert steps[-1] <= at + 1


def test_a_tensor_that_is_not_finite_is_noticed_at_the_end_of_the_epoch(net, images):
    model = net("mlp")
    trainer = trainer_of(model, images, groups=GROUPS, signals={"norm": "frozen", "others": "natural"})

    def plant(done, of):
        if done == of:  # after the last step, so that no loss can tell
            model[2].running_var[0] = torch.inf

    with pytest.raises(Diverged, match=r"^2\.running_var is not finite after epoch 1$"):
        trainer.train_epoch(plant)


def test_divergence_is_no_mistake_of_the_user_and_crosses_processes():
    error = pickle.loads(pickle.dumps(Diverged("the natural loss is nan")))
    assert type(error) is Diverged and str(error) == "the natural loss is nan" and not isinstance(error, UserError)


def finished(net, images, **options):
    model = net("mlp")
    options = {
        "groups": GROUPS,
        "signals": {"norm": "frozen", "others": "natural"},
    } | options
    trainer = trainer_of(model, images, epochs=1, **options)
    trainer.train_epoch()
    return model, trainer


def test_kept_promises_verify(net, images):
    _, trainer = finished(net, images)
    ledger = trainer.verify()
    assert [change.group for change in ledger] == ["norm", "others"] and all(change.kept for change in ledger)
    assert ledger[0].moved_parameters == ledger[0].moved_buffers == 0 < ledger[1].moved_parameters


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        ("2.bias", lambda m: m[2].bias.copy_(torch.nextafter(m[2].bias, torch.tensor(torch.inf)))),
        ("5.num_batches_tracked", lambda m: m[5].num_batches_tracked.add_(1)),
        ("5.running_mean", lambda m: m[5].running_mean.mul_(-1)),
    ],
)
def test_a_frozen_tensor_that_moved_fails_with_its_name(net, images, tensor, fault):
    model, trainer = finished(net, images)
    with torch.no_grad():
        fault(model)
    with pytest.raises(UserError) as error:
        trainer.verify()
    assert str(error.value) == f"group 'norm' was promised frozen, but {tensor} moved"


def test_a_trained_tensor_that_the_model_does_not_use_fails_with_its_name(net, images):
    model = net("mlp")
    model[3].add_module("unused", nn.Linear(3, 3))
    for groups, signals in (
        ({"all": "all"}, {"all": "natural"}),
        ({"unused": "3.unused", "others": "rest"}, {"unused": "adversarial", "others": "frozen"}),
    ):
        trainer = trainer_of(copy.deepcopy(model), images, groups=groups, signals=signals, epochs=1)
        assert trainer.verify()  # before the phase has begun there is nothing to keep
        trainer.train_epoch()
        with pytest.raises(UserError) as error:
            trainer.verify()
        group = next(iter(groups))
        assert str(error.value) == (
            f"group '{group}' was promised trained, but 3.unused.weight, 3.unused.bias did not move"
        )


def test_a_bias_right_before_batch_norm_may_stay_where_it_is(images):
    # Batch norm takes the mean away, so the bias gets a gradient of rounding noise: too small to change it, often.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].bias += 1e4
    fresh = copy.deepcopy(model)
    trainer = trainer_of(
        model,
        images,
        groups={"all": "all"},
        signals={"all": "natural"},
        epochs=1,
        optimizer=OptimizerSettings(momentum=0.0, weight_decay=0.0),
    )
    before = model[1].bias.detach().clone()
    trainer.train_epoch()
    assert torch.equal(model[1].bias, before)  # else this shows nothing
    assert all(change.kept for change in trainer.verify())
    # A process that was killed after the last epoch trains no step more: it must know from the state.
    again = trainer_of(copy.deepcopy(fresh), images, groups={"all": "all"}, signals={"all": "natural"}, epochs=1)
    again.load_state(trainer.state())
    assert all(change.kept for change in again.verify())


def test_all_broken_promises_are_told_at_once(net, images):
    model, trainer = finished(net, images)
    with torch.no_grad():
        for name, tensor in trainer.start.items():
            if name.startswith("6."):
                model.state_dict()[name].copy_(tensor)
                trainer.step.reached.discard(name)  # as if no gradient had come so far
        for parameter in (*model[2].parameters(), *model[5].parameters()):
            parameter += 1
        model[2].running_mean += 1
    with pytest.raises(UserError) as error:
        trainer.verify()
    assert [str(fault) for fault in error.value.faults] == [
        "group 'norm' was promised frozen, but 2.weight, 2.bias, 2.running_mean, 5.weight moved",
        "group 'others' was promised trained, but 6.weight, 6.bias did not move",
    ]


def test_statistics_alone_learn_without_an_optimizer(net, images, bits):
    groups, signals = {"statistics": "norm.statistics", "others": "rest"}, {"statistics": "natural", "others": "frozen"}
    before = bits(net("mlp"))
    model, trainer = finished(net, images, groups=groups, signals=signals)
    assert trainer.optimizer is None and not any(name.startswith("optimizer/") for name in trainer.state())
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed == {name for name in before if "running" in name or "tracked" in name}
    assert int(model[2].num_batches_tracked) == 3 + 4
    trainer.verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"norm": "nrm", "others": "rest"}}, "norm: unknown selector 'nrm'"),
        ({"signals": {"norm": "natural"}}, "group 'others' has no signal"),
        ({"attack": None, "signals": {"norm": "adversarial", "others": "frozen"}}, "an attack is needed"),
        ({"batch_size": 1}, "batch_size: 1; allowed: a whole number, at least 2"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(net, images, options, message):
    with pytest.raises(UserError, match=message):
        finished(net, images, **options)
