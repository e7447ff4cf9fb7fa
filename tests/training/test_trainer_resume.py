"""A phase that was stopped after any epoch and goes on ends with the same bits; nothing random hangs on logging."""

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

from robustlayers.attacks import PGD, Linf
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.core.random import stream
from robustlayers.data import Augment, Images, batches
from robustlayers.normalization import NormPolicy, Switch, inference
from robustlayers.training import OptimizerSettings, PhaseTrainer, Schedule

EPOCHS = 3
GROUPS = {"norm": "norm", "head": "head", "others": "rest"}


@pytest.fixture(scope="module")
def images():
    generator = stream(0, "test-images")
    pixels = torch.randint(0, 256, (21, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(21) % 3)


@pytest.fixture
def trainer(net, images):
    """Make a trainer for a phase in the middle of a run, always from the same start."""

    def make(kind="small-cnn", signals=("adversarial", "natural", "natural"), optimizer="sgd", **options):
        model = net(kind) if isinstance(kind, str) else kind
        groups = options.pop("groups", GROUPS)
        return PhaseTrainer(
            model,
            groups,
            dict(zip(groups, signals, strict=True)),
            images,
            epochs=options.pop("epochs", EPOCHS),
            attack=PGD(Linf(0.1), steps=1, keep="last"),
            batch_size=8,
            optimizer=OptimizerSettings(optimizer, lr=0.05 if optimizer == "sgd" else 0.01, weight_decay=0.01),
            schedule=Schedule("one-cycle"),
            augment=Augment(crop=1, flip=True),
            seed=4,
            first_epoch=2,
            **options,
        )

    return make


def outcome(trainer):
    """Everything that two equal runs must share, in bits."""
    state = {name: t.cpu().contiguous().numpy().tobytes() for name, t in trainer.state().items()}
    rates = [group["lr"] for group in trainer.optimizer.param_groups] if trainer.optimizer else []
    return state, rates, trainer.done


SIGNALS = [
    ("adversarial", "natural", "frozen"),
    ("natural", "adversarial", "adversarial"),
    ("frozen", {"natural": 0.5, "adversarial": 0.5}, "natural"),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("signals", SIGNALS, ids=str)
def test_a_resume_after_every_epoch_is_bit_identical(trainer, tmp_path, signals, optimizer):
    whole = trainer(signals=signals, optimizer=optimizer)
    states, logs = [], []
    for epoch in range(EPOCHS):
        states.append(write_tensors(tmp_path / str(epoch), whole.state()))
        logs.append(whole.train_epoch())
    end = outcome(whole)
    ledger = whole.verify()
    for k, path in enumerate(states):
        resumed = trainer(signals=signals, optimizer=optimizer)
        resumed.load_state(read_tensors(path))
        assert outcome(resumed)[0] != end[0]  # there was something left to do
        again = [resumed.train_epoch() for _ in range(k, EPOCHS)]
        assert outcome(resumed) == end
        assert [(log.epoch, log.loss) for log in again] == [(log.epoch, log.loss) for log in logs[k:]]
        assert resumed.verify() == ledger


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("resnet", {"policy": NormPolicy(craft=Switch("batch", True))}),
        ("mlp", {"signals": ("natural", "frozen"), "groups": {"statistics": "norm.statistics", "others": "rest"}}),
        ("mlp", {"signals": ("natural", "frozen"), "groups": {"some": "random(like=norm)", "others": "rest"}}),
    ],
)
def test_so_it_is_with_train_mode_crafting_statistics_alone_and_single_entries(trainer, kind, options):
    whole = trainer(kind, **options)
    whole.train_epoch()
    state = whole.state()
    whole.train_epoch()
    whole.train_epoch()
    resumed = trainer(kind, **options)
    resumed.load_state(state)
    resumed.train_epoch()
    resumed.train_epoch()
    assert outcome(resumed) == outcome(whole)
    whole.verify()


def test_the_check_would_notice_a_momentum_that_was_lost(trainer):
    whole = trainer()
    whole.train_epoch()
    state = whole.state()
    whole.train_epoch()
    resumed = trainer()
    resumed.load_state({name: t for name, t in state.items() if not name.startswith("update/optimizer/")})
    resumed.train_epoch()
    assert outcome(resumed) != outcome(whole)


def with_dropout():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)
        )


def noisy(model, done, of):
    """A progress callback that does what loggers do: draws, evaluates, changes modes inside a context."""
    torch.rand(7)
    random.random()
    with inference(model):
        model(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("make", ["small-cnn", with_dropout], ids=["small-cnn", "dropout"])
def test_logging_changes_nothing(trainer, make):
    results = []
    for callback, before in ((None, 0), (noisy, 0), (None, 3)):
        torch.rand(before)
        made = trainer(make() if callable(make) else make)
        for _ in range(EPOCHS):
            made.train_epoch(None if callback is None else partial(callback, made.model))
        results.append(outcome(made))
    assert results[0] == results[1] == results[2]


def test_dropout_resumes_too_and_the_global_random_state_is_left_alone(trainer):
    whole = trainer(with_dropout())
    whole.train_epoch()
    state = whole.state()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    whole.train_epoch()
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    torch.rand(11)
    resumed = trainer(with_dropout())
    resumed.load_state(state)
    resumed.train_epoch()
    assert outcome(resumed) == outcome(whole)


def seen_by(trainer):
    """The batches of one epoch and the first draw of each attack."""
    seen = []
    honest = trainer.step

    class Spy:
        optimizer = None

        def __call__(self, x, y, *, generator, turn):
            seen.append((x, y, torch.rand(3, generator=copy_of(generator))))
            return honest(x, y, generator=generator, turn=turn)

    trainer.step = Spy()
    trainer.train_epoch()
    trainer.step = honest
    return seen


def copy_of(generator):
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def test_order_augmentation_and_noise_are_functions_of_seed_and_epoch_over_all_phases(trainer, images):
    made = trainer(signals=("adversarial", "natural", "frozen"))
    for epoch in (2, 3):
        seen = seen_by(made)
        expected = list(batches(images, 8, seed=4, epoch=epoch, augment=Augment(crop=1, flip=True)))
        assert len(seen) == len(expected) == made.batches == 3
        for index, ((x, y, draw), (wanted_x, wanted_y)) in enumerate(zip(seen, expected, strict=True)):
            assert torch.equal(x, wanted_x) and torch.equal(y, wanted_y)
            assert torch.equal(draw, torch.rand(3, generator=stream(4, "attack", epoch, index)))
    # another model, other signals: the same images in the same order with the same draws
    other = seen_by(trainer("mlp", signals=("natural", "frozen", "adversarial")))
    again = seen_by(trainer(signals=("adversarial", "natural", "frozen")))
    for one, two in zip(other, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_state_holds_copies(trainer):
    made = trainer()
    made.train_epoch()
    state = made.state()
    kept = copy.deepcopy(state)
    made.train_epoch()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert set(state) >= {"model/conv1.weight", "update/optimizer/conv1.weight/momentum_buffer"}
