"""The matrix: selectors x optimizers x signals x starts x models, and all else that a phase can do, in covering rows.

In the rows every two levels of different axes meet. For each row: what is frozen is bit-equal, parameters and buffers, in
the whole phase and while a group has no turn; what is trained moves; the passes are those foretold; and a resume from
every step k of 12 goes on with the same bits. Not among the starts are those that need a study: `from`, `load`, `rewind`.
"""

import functools
import importlib.util
import itertools
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.selection import is_norm
from robustlayers.training import PhaseTrainer, Turn, Update

_spec = importlib.util.spec_from_file_location("matrix", Path(__file__).with_name("matrix.py"))
assert _spec is not None and _spec.loader is not None
matrix = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)

STEPS = matrix.STEPS
ROWS = matrix.covering(matrix.AXES)
MORE_ROWS = matrix.covering(matrix.MORE_AXES)


def cross_product():
    """Every selector with every signal and every optimizer; the other axes take turns."""
    axes = matrix.AXES
    cells = itertools.product(axes["selector"], axes["optimizer"], axes["signals"])
    others = {axis: levels for axis, levels in axes.items() if axis not in ("selector", "optimizer", "signals")}
    for place, cell in enumerate(cells):
        row = dict(zip(("selector", "optimizer", "signals"), cell, strict=True))
        for index, (axis, levels) in enumerate(others.items()):
            possible = [level for level in levels if all(matrix.fits((axis, level), other) for other in row.items())]
            row[axis] = possible[(place + place // (index + 5)) % len(possible)]
        yield row


def named(row):
    return "-".join(row.values())


# -- what is compared ------------------------------------------------------------------------------------------------


def raw(tensor):
    """The bits of a tensor."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def outcome(trainer):
    """Everything that two equal runs share: weights, buffers, momenta, tallies in bits; rates; the ledger."""
    rates = [group["lr"] for group in trainer.optimizer.param_groups] if trainer.optimizer else []
    return {name: raw(tensor) for name, tensor in trainer.state().items()}, rates, trainer.ledger(), trainer.place


def watched(row):
    """A trainer of the row, and a journal of the images, labels and rates of each of its steps."""
    trainer = matrix.trainer_of(row)
    journal = []
    step, update = trainer.step.__class__.__call__, trainer.update.step

    class Watched(trainer.step.__class__):
        def __call__(self, x, y, *, generator, turn):
            journal.append((raw(x), raw(y), raw(generator.get_state()), str(turn)))
            return step(self, x, y, generator=generator, turn=turn)

    def updating():
        journal.append([group["lr"] for group in trainer.update.param_groups])
        update()

    trainer.step.__class__ = Watched
    trainer.update.step = updating
    return trainer, journal


def entries(tensor):
    """The bits of every entry."""
    kinds = {4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def moved(selection, before, after):
    """Tensors of a selection of which an entry changed between two states of a trainer."""
    found = []
    for name, mask in selection.parts.items():
        differs = entries(before[f"model/{name}"]) != entries(after[f"model/{name}"])
        if bool((differs if mask is None else differs[mask]).any()):
            found.append(name)
    return found


def check_frozen(trainer, states):
    """What is frozen never moves, nor does a group without a turn; parameters wait for the step that is theirs."""
    partition, signals = trainer.partition, trainer.step.signals
    drifts = {group for group, own in trainer.update.settings.groups.items() if own.drift}
    for group, selection in partition.groups.items():
        if not signals[group]:
            assert moved(selection, states[0], states[-1]) == [], group
            continue
        for index in range(STEPS):
            turn = trainer.program.turn(index)
            some = moved(selection, states[index], states[index + 1])
            if turn.learning is not None and group not in turn.learning:
                assert some == [], (group, index)
            elif turn.due is None or group in turn.due:
                assert some, (group, index)
            else:
                parameters = [name for name in some if not partition.inventory[name].buffer]
                assert bool(parameters) == (group in drifts and selection.parameters > 0), (group, index)


def silenced(trainer, selection, name):
    """Whether a parameter may stay though a gradient reaches it: norm layers take away what a bias before them adds, and
    shares of it that round to 0; a single entry may read a feature that is off in every image."""
    entry, mask = trainer.partition.inventory[name], selection.parts[name]
    before_norm = entry.attribute == "bias" and not any(map(is_norm, entry.owners))
    single = mask is not None and int(mask.sum()) == 1
    return (before_norm or single) and name in trainer.step.reached


def foretold(trainer):
    """How often the phase updates the statistics of each norm layer, in forwards that reach it once."""
    turns = [trainer.step.statistics_updates(trainer.program.turn(index)) for index in range(STEPS)]
    return {name: sum(turn[name] for turn in turns) for name in turns[0]}


def check_moved(trainer, states):
    """Every tensor that is trained moved, but the input's normalization, and statistics that the policy never updates."""
    still_by_policy = {
        f"{name}.{key}"
        for name, count in foretold(trainer).items()
        for key in trainer.model.get_submodule(name)._buffers
        if not count
    }
    for group, selection in trainer.partition.groups.items():
        if trainer.step.signals[group]:
            some = moved(selection, states[0], states[-1])
            still = set(selection) - set(some) - still_by_policy
            assert some
            assert {
                n for n in still if not n.startswith("normalize.") and not silenced(trainer, selection, n)
            } == set(), group


def check_counters(trainer, row, states):
    """Statistics are updated as often as foretold: by default once by each pass of an objective that they learn from."""
    runs = {"layer1.1": 2} if row["model"] == "tied" else {}
    for name, updates in foretold(trainer).items():
        counter = f"{name}.num_batches_tracked"
        count = int(states[-1][f"model/{counter}"] - states[0][f"model/{counter}"])
        assert count == updates * runs.get(name, 1), name
        (group,) = trainer.partition.group_of(counter)
        if row["policy"] == "default" and row["turns"] == "steady" and not trainer.update.slow:
            assert count == STEPS * len(trainer.step.signals[group]) * runs.get(name, 1), name


# -- the test --------------------------------------------------------------------------------------------------------


def check(row, finished=range(1, STEPS)):
    """Train the row's phase and resume it from every step: those of `finished` to the end, the others for one step more.

    Where each step leads from its state to the next one, bit by bit, all of them together lead to the end.
    """
    whole, journal = watched(row)
    states, moments, logs = [whole.state()], [outcome(whole)], []
    lines = [0]  # of the journal, before each step
    for _ in range(STEPS):
        log = whole.run(steps=1)
        logs += [] if log is None else [told(log)]
        states.append(whole.state())
        moments.append(outcome(whole))
        lines.append(len(journal))
    assert whole.done == matrix.EPOCHS == len(logs)
    whole.verify()
    check_frozen(whole, states)
    check_moved(whole, states)
    check_counters(whole, row, states)
    assert (sum(log[2] for log in logs), sum(log[3] for log in logs)) == whole.passes()

    end, epoch = moments[-1][0], whole.batches
    # Statistics have no velocity to drift by.
    groups = whole.partition.groups
    drifts = any(own.drift and groups[name].parameters for name, own in whole.update.settings.groups.items())
    for k in range(1, STEPS):
        resumed, again = watched(row)
        resumed.load_state(states[k])
        assert outcome(resumed)[0] == moments[k][0]
        ahead = drifts or any(whole.program.learned(index) for index in range(k, STEPS))
        assert any(bits != end[name] for name, bits in moments[k][0].items() if name.startswith("model/")) == ahead
        last = STEPS if k in finished else k + 1
        later = []
        while resumed.place < last:
            later.append(resumed.run(steps=last - resumed.place))
        assert outcome(resumed) == moments[last], k
        assert again == journal[lines[k] : lines[last]], k
        assert [told(log) for log in later if log is not None] == logs[k // epoch : last // epoch]


def told(log):
    """What the log of an epoch says, but for the time it took."""
    return log.epoch, log.loss, log.forward_passes, log.backward_passes


@pytest.mark.parametrize(("place", "row"), list(enumerate(ROWS)), ids=[named(row) for row in ROWS])
def test_a_phase_keeps_its_promises_and_goes_on_from_every_step(place, row):
    check(row, range(1 + place % 3, STEPS, 3))


@pytest.mark.slow
@pytest.mark.parametrize("row", MORE_ROWS, ids=named)
def test_so_it_does_with_more_levels(row):
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", list(cross_product()), ids=named)
def test_so_it_does_with_every_selector_signal_and_optimizer(row):
    check(row)


# -- what a phase costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS[::6], ids=named)
def test_the_passes_that_are_foretold_are_those_that_the_model_and_autograd_make(row, monkeypatch):
    trainer = matrix.trainer_of(row)
    made = {"forward": 0, "backward": 0}

    def forward(*_):
        made["forward"] += 1

    def backward(*args, **named):
        made["backward"] += 1
        return honest(*args, **named)

    honest = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", backward)
    trainer.model.register_forward_hook(forward)
    for _ in range(matrix.EPOCHS):
        trainer.train_epoch()
    assert tuple(count * matrix.BATCH for count in made.values()) == trainer.passes()


# -- planted faults: the matrix would notice -------------------------------------------------------------------------

PLAIN = {
    "selector": "norm",
    "optimizer": "sgd",
    "signals": "adversarial, natural",
    "start": "keep",
    "model": "mlp",
    "schedule": "constant",
    "ascent": "none",
    "average": "none",
    "policy": "default",
    "turns": "steady",
    "crafting": "fp32",
}


@functools.cache
def passes(**levels):
    """Without a fault the row passes; told once."""
    check(PLAIN | levels)


def without(prefix):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize(
    ("lost", "levels"),
    [
        (without("update/optimizer/"), {}),
        (without("update/optimizer/linear.weight"), {"optimizer": "every", "selector": "~CONV"}),
        (without("update/multirate/"), {"optimizer": "drift"}),
        (without("update/measured/"), {}),
        (without("average/average/"), {"average": "ema"}),
        (without("learned/"), {}),
        (without("crafting"), {"crafting": "auto"}),
        (without("reached/linear.weight"), {}),
        (changed("tally", torch.zeros_like), {}),
        (changed("place", lambda place: place + torch.tensor([0, 1])), {}),
        (changed("model/stem.bn1.running_mean", lambda mean: mean + 1e-6), {}),
        (changed("model/stem.bn1.num_batches_tracked", lambda count: count + 1), {}),
    ],
)
def test_a_state_that_lacks_anything_is_noticed(lost, levels, monkeypatch):
    passes(**levels)
    honest = PhaseTrainer.load_state
    monkeypatch.setattr(PhaseTrainer, "load_state", lambda self, state: honest(self, lost(state)))
    with pytest.raises((AssertionError, UserError)):
        check(PLAIN | levels)


def out_of_turn(monkeypatch):
    honest = Update.begin
    monkeypatch.setattr(Update, "begin", lambda self, step, learning=None: honest(self, step))


def never_due(monkeypatch):
    monkeypatch.setattr(Update, "due", lambda self, step: frozenset() if self.optimizer is None else self.groups)


def rates_of_the_first_step(monkeypatch):
    def measuring(self, epoch):
        turn = self.program.turn(epoch * self.batches)
        return Turn(turn.learning, None, turn.eps, turn.ascend)

    monkeypatch.setattr(PhaseTrainer, "_measuring", measuring)


def epochs_from_their_beginning(monkeypatch):
    honest = PhaseTrainer._batches
    monkeypatch.setattr(
        PhaseTrainer,
        "_batches",
        lambda self, epoch, start, stop, **named: honest(self, epoch, 0, stop - start, **named),
    )


def frozen_statistics_that_follow(monkeypatch):
    @contextmanager
    def train_mode(model, *_, training, **__):
        yield model.train(training)

    monkeypatch.setattr("robustlayers.training.step.normalizing", train_mode)


def draws_that_hang_on_the_process(monkeypatch):
    draws = itertools.count()
    honest = matrix.PGD.__call__

    def crafted(self, forward, x, y, *, generator):
        generator.manual_seed(next(draws))
        return honest(self, forward, x, y, generator=generator)

    monkeypatch.setattr(matrix.PGD, "__call__", crafted)


@pytest.mark.parametrize(
    ("plant", "levels"),
    [
        (out_of_turn, {"optimizer": "drift", "turns": "handover"}),
        (never_due, {"optimizer": "every", "selector": "norm.statistics", "signals": "adversarial, frozen"}),
        (rates_of_the_first_step, {"optimizer": "rgn", "turns": "handover"}),
        (epochs_from_their_beginning, {}),
        (frozen_statistics_that_follow, {"signals": "frozen, adversarial"}),
        (draws_that_hang_on_the_process, {}),
    ],
)
def test_a_planted_fault_is_noticed(plant, levels, monkeypatch):
    passes(**levels)
    plant(monkeypatch)
    with pytest.raises((AssertionError, UserError)):
        check(PLAIN | levels)


def test_every_two_levels_meet_in_a_row():
    seen = set().union(*map(matrix.met, ROWS))
    assert seen == set(matrix.pairs(matrix.AXES)) and len(ROWS) < 70
    assert not matrix.fits(("selector", "all"), ("turns", "handover"))
