import copy
import itertools

import pytest
import torch
from torch import nn

import robustlayers as rl
from robustlayers.attacks import FGSM, PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import accuracy, calibration, expected_calibration_error
from robustlayers.evaluation.calibration import reliability

THREAT = Linf(0.15)


def by_hand(confidences, right, bins=15):
    """The definition, image by image."""
    error = 0.0
    for k in range(bins):
        inside = [
            (c, r)
            for c, r in zip(confidences, right, strict=True)
            if k / bins < c <= (k + 1) / bins or (k == 0 and c == 0)
        ]
        if inside:
            gap = sum(r for _, r in inside) / len(inside) - sum(c for c, _ in inside) / len(inside)
            error += len(inside) / len(right) * abs(gap)
    return error


@pytest.mark.parametrize("bins", [1, 2, 15, 40])
def test_the_error_is_its_definition(bins):
    generator = torch.Generator().manual_seed(bins)
    confidences = torch.rand(200, generator=generator, dtype=torch.float64)
    confidences[:4] = torch.tensor([0.0, 1.0, 0.5, 1 / 15], dtype=torch.float64)
    right = torch.rand(200, generator=generator) < 0.6
    found = expected_calibration_error(confidences, right, bins)
    assert found == pytest.approx(by_hand(confidences.tolist(), right.tolist(), bins), abs=1e-12)


def test_known_values():
    ones = torch.ones(10, dtype=torch.bool)
    assert expected_calibration_error(torch.ones(10), ones) == 0
    assert expected_calibration_error(torch.ones(10), ~ones) == 1
    assert expected_calibration_error(torch.full((4,), 0.75), torch.tensor([True, True, True, False])) == 0
    # Two bins that err in opposite directions do not cancel; in one bin they do.
    confidences, right = torch.tensor([0.6, 0.6, 0.9, 0.9]).double(), torch.tensor([True, True, True, False])
    assert expected_calibration_error(confidences, right) == pytest.approx(0.4)
    assert expected_calibration_error(confidences, right, 1) == pytest.approx(0.0)


def test_a_calibrated_model_has_a_small_error_and_an_over_confident_one_its_excess():
    generator = torch.Generator().manual_seed(0)
    confidences = 0.5 + 0.5 * torch.rand(200_000, generator=generator, dtype=torch.float64)
    right = torch.rand(200_000, generator=generator, dtype=torch.float64) < confidences
    for adaptive in (False, True):
        assert expected_calibration_error(confidences, right, adaptive=adaptive) < 0.01
        over = expected_calibration_error((confidences + 0.1).clamp_max(1), right, adaptive=adaptive)
        assert over == pytest.approx(float(((confidences + 0.1).clamp_max(1) - confidences).mean()), abs=0.01)


def test_adaptive_bins_have_equal_counts():
    confidences = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 0.1
    right = torch.arange(100) % 3 > 0
    bins = reliability(confidences, right, 7, adaptive=True)
    assert sorted(one.count for one in bins) == [14] * 5 + [15] * 2
    assert [one.low for one in bins] == sorted(one.low for one in bins)
    assert all(one.high <= two.low for one, two in itertools.pairwise(bins))
    gap = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / 100
    assert expected_calibration_error(confidences, right, 7, adaptive=True) == pytest.approx(gap)
    assert len(reliability(confidences[:3], right[:3], 7, adaptive=True)) == 3
    assert expected_calibration_error(confidences, right, 1, adaptive=True) == pytest.approx(
        expected_calibration_error(confidences, right, 1)
    )


def test_a_models_calibration_is_that_of_its_softmax(trained, bits):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
    before = bits(model)
    found = calibration(model, x, y, batch_size=50)
    assert model.training and bits(model) == before
    with torch.no_grad():
        logits = trained[0](x / 255).double()
    confidences, predictions = logits.softmax(1).max(1)
    assert found.ece == pytest.approx(by_hand(confidences.tolist(), (predictions == y).tolist()), abs=1e-6)
    assert found.accuracy == accuracy(model, x, y) and found.confidence == pytest.approx(float(confidences.mean()))
    assert found.nll == pytest.approx(float(nn.functional.cross_entropy(logits, y)), abs=1e-6)
    brier = (logits.softmax(1) - nn.functional.one_hot(y, 4)).square().sum(1).mean()
    assert found.brier == pytest.approx(float(brier), abs=1e-6)
    assert found.attack == "" and sum(row["count"] for row in found.rows()) == found.total == 120
    assert {row["accuracy"] for row in found.rows() if not row["count"]} <= {None}
    # Sharper logits: the same predictions, more confidence, a larger error.
    assert calibration(lambda z: 20 * model.eval()(z), x, y).confidence > 0.99


def test_under_an_attack(trained):
    model, x, y = trained
    attack = PGD(THREAT, steps=5)
    told = []
    clean, attacked = (
        calibration(model, x, y),
        calibration(model, x, y, attack, 50, seed=1, progress=lambda *w: told.append(w)),
    )
    assert attacked.accuracy < clean.accuracy and attacked.ece > clean.ece and attacked.nll > clean.nll
    assert attacked.attack == attack.describe()
    assert told == [("calibration", done, 120) for done in (40, 80, 120)]  # batches of nearly equal size
    assert attacked == calibration(model, x, y, attack, 50, seed=1) != calibration(model, x, y, attack, 50, seed=2)
    assert calibration(model, x, y, FGSM(THREAT)).accuracy == accuracy(model, x, y, FGSM(THREAT))


def test_the_picture_shows_the_bins(trained):
    model, x, y = trained
    found = calibration(model, x, y)
    axes = found.plot()
    line = axes.get_lines()[1]
    assert list(line.get_xdata()) == [one.confidence for one in found.bins if one.count]
    assert list(line.get_ydata()) == [one.accuracy for one in found.bins if one.count]
    axes.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: calibration(m, x, y, bins=0), "bins: 0"),
        (lambda m, x, y: calibration(m, x, y, batch_size=0), "batch_size"),
        (lambda m, x, y: calibration(lambda z: m(z) / 0, x, y), "not finite"),
        (lambda m, x, y: calibration(m, x, y[:3]), "one integer label"),
        (lambda m, x, y: expected_calibration_error(torch.tensor([1.1]), torch.tensor([True])), "probabilities"),
        (lambda m, x, y: expected_calibration_error(torch.tensor([torch.nan]), torch.tensor([True])), "probabilities"),
        (lambda m, x, y: expected_calibration_error(torch.rand(3), torch.ones(3)), "bool verdicts"),
        (lambda m, x, y: expected_calibration_error(torch.rand(0), torch.ones(0) > 0), "n 1 or more"),
    ],
)
def test_mistakes_are_named(trained, call, words):
    with pytest.raises(UserError, match=words):
        call(*trained)


def test_an_attack_that_leaves_its_threat_is_refused(trained):
    model, x, y = trained
    with pytest.raises(UserError, match="left the ball"):
        calibration(model, x, y, rl.NFGSM(THREAT, project=False))
