import copy
import json
from typing import Any

import pytest
import torch

from robustlayers.analysis import rift, robust_criticality
from robustlayers.analysis._ground import Quality
from robustlayers.analysis.rift import choose, judged
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.data import Images
from robustlayers.evaluation import accuracy
from robustlayers.training import OptimizerSettings, PhaseTrainer, Schedule

ATTACK = PGD(Linf(0.1), steps=3)
FAST = OptimizerSettings(lr=0.05)


@pytest.fixture
def worse(learned):
    """The trained net with its last layer moved, so that there is something to win on clean images."""
    model, _, x, y = learned
    y = y.clone()
    y[:6] = torch.arange(6) % 4
    with torch.no_grad():
        model[7].weight += 0.5 * torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    return model, Images(x[:80], y[:80]), x[80:], y[80:]


def test_only_the_group_moves_and_statistics_stay(worse):
    model, train, x, y = worse
    found = rift(model, "'4' | '7'", train, x, y, ATTACK, epochs=2, optimizer=FAST, tolerance=1, train_batch_size=20)
    assert found.alpha > 0
    before = model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], found.state[name])]
    assert moved == ["4.weight", "4.bias", "7.weight", "7.bias"]


def test_the_line_leads_to_the_net_that_a_trainer_makes(worse):
    model, train, x, y = worse
    found = rift(
        model, "linear", train, x, y, ATTACK, epochs=3, optimizer=FAST, alphas=[0.5, 1], tolerance=1, seed=4,
        train_batch_size=20,
    )  # fmt: skip
    tuned = copy.deepcopy(model)
    trainer = PhaseTrainer(
        tuned, {"head": "linear", "others": "rest"}, {"head": "natural", "others": "frozen"}, train, epochs=3,
        batch_size=20, optimizer=FAST, schedule=Schedule("piecewise", milestones=(0.5,)), seed=4,
    )  # fmt: skip
    for _ in range(3):
        trainer.train_epoch()
    half = copy.deepcopy(model)
    with torch.no_grad():
        for one, two in zip(half.parameters(), tuned.parameters(), strict=True):
            one.lerp_(two, 0.5)
    nets = (model, half, tuned)
    assert [point.alpha for point in found.points] == [0, 0.5, 1]
    assert [point.clean_accuracy for point in found.points] == [accuracy(net, x, y) for net in nets]
    assert [point.robust_accuracy for point in found.points] == [accuracy(net, x, y, ATTACK, seed=4) for net in nets]
    assert found.points[2].clean_accuracy > found.points[0].clean_accuracy
    chosen = nets[[point.alpha for point in found.points].index(found.alpha)].state_dict()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in chosen.items())


@pytest.mark.parametrize(
    ("tolerance", "alpha"),
    [(0, 0.4), (0.01, 0.6), (0.02, 0.6), (0.03, 0.8), (1, 0.8)],
)
def test_alpha_is_the_best_clean_accuracy_within_the_tolerance(tolerance, alpha):
    accuracies = {0: (80, 50), 0.2: (81, 49), 0.4: (81, 50), 0.6: (82, 49), 0.8: (84, 47), 1: (84, 46)}  # percent
    points = judged({t: Quality(c / 100, 1.0, r / 100, 1.0) for t, (c, r) in accuracies.items()}, tolerance)
    assert [p.allowed for p in points] == [r >= 50 - 100 * tolerance for _, r in accuracies.values()]
    assert choose(points).alpha == alpha


def test_of_equal_accuracies_the_least_change_is_chosen():
    points = judged({t: Quality(0.8, 1.0, 0.5, 1.0) for t in (0, 0.5, 1)}, 0.001)
    assert choose(points).alpha == 0


def test_the_least_critical_group_can_be_handed_over(worse):
    model, train, x, y = worse
    least = robust_criticality(model, "conv | norm | linear", x, y, ATTACK, steps=2).least
    found = rift(model, least.selector, train, x, y, ATTACK, epochs=1, optimizer=FAST, alphas=[1], tolerance=1)
    before = model.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], found.state[name])}
    assert moved <= {least.group}


def test_nothing_is_left_behind(worse, no_trace):
    model, train, x, y = worse
    with no_trace(model):
        rift(model, "norm", train, x, y, ATTACK, epochs=1, optimizer=FAST, alphas=[1])

    for place in ("fine-tuning", "alpha 1"):

        def stop(what, done, total, place=place):
            if what == place:
                raise KeyboardInterrupt

        with no_trace(model), pytest.raises(KeyboardInterrupt):
            rift(model, "norm", train, x, y, ATTACK, epochs=1, optimizer=FAST, alphas=[1], progress=stop)


def test_progress_ends_at_its_total(worse):
    model, train, x, y = worse
    seen = []
    rift(
        model, "linear", train, x, y, ATTACK, epochs=2, optimizer=FAST, alphas=[1], train_batch_size=20,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][1:] == (2 * 80 + 2 * 2 * 40, 2 * 80 + 2 * 2 * 40)
    assert {total for *_, total in seen} == {2 * 80 + 2 * 2 * 40}


def test_user_errors(worse):
    model, train, x, y = worse
    for options, text in (
        ({"alphas": [1.5]}, "alphas"),
        ({"tolerance": 2}, "tolerance: 2"),
        ({"epochs": 0}, "epochs: 0"),
    ):
        with pytest.raises(UserError, match=text):
            rift(model, "linear", train, x, y, ATTACK, **options)
    with pytest.raises(UserError, match="picks no parameters, only buffers"):
        rift(model, "norm.statistics", train, x, y, ATTACK)
    with pytest.raises(UserError, match="nearest: linear"):
        rift(model, "lineer", train, x, y, ATTACK)


def test_rows_are_plain_and_the_plot_marks_the_choice(worse):
    model, train, x, y = worse
    found = rift(model, "linear", train, x, y, ATTACK, epochs=1, optimizer=FAST, alphas=[0.5, 1])
    rows = json.loads(json.dumps(found.rows(), allow_nan=False))
    assert [row["alpha"] for row in rows if row["chosen"]] == [found.alpha] and "state" not in rows[0]
    axes = found.plot()
    names = [line.get_label() for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert names == ["clean", "robust"] and axes.get_xlabel().endswith(f"chosen: {found.alpha:g}")
    assert axes.lines[1].get_ydata()[0] == 0  # type: ignore[index]


def test_the_line_is_measured_on_other_images_that_choose_nothing(worse):
    model, train, x, y = worse
    options: dict[str, Any] = {
        "epochs": 2,
        "optimizer": FAST,
        "alphas": [0.5, 1],
        "tolerance": 1,
        "train_batch_size": 20,
    }
    seen = []
    found = rift(
        model, "linear", train, x[:20], y[:20], ATTACK, **options, measure_on=(x[20:], y[20:]),
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    alone = rift(model, "linear", train, x[:20], y[:20], ATTACK, **options)
    assert (found.alpha, found.points, alone.measured) == (alone.alpha, alone.points, ())
    assert all(torch.equal(found.state[name], alone.state[name]) for name in alone.state)
    assert [(p.alpha, p.allowed) for p in found.measured] == [(p.alpha, p.allowed) for p in found.points]
    chosen = copy.deepcopy(model)
    chosen.load_state_dict(found.state)
    for net, point in ((model, found.before), (chosen, found.after)):
        assert (point.clean_accuracy, point.robust_accuracy) == (
            accuracy(net, x[20:], y[20:]),
            accuracy(net, x[20:], y[20:], ATTACK),
        )
    assert {(row["on"], row["alpha"]) for row in found.rows()} == {
        (kind, alpha) for kind in ("selection", "measurement") for alpha in (0, 0.5, 1)
    }
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and len({total for *_, total in seen}) == 1 and done[-1] == seen[-1][2]
    assert len([line for line in found.plot().lines if not str(line.get_label()).startswith("_")]) == 4
