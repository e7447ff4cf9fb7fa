import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustlayers.attacks import FGSM, PGD, Linf, Noise, Threat
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation import accuracy, correct, interval, transfer

THREAT = Linf(0.2)


def other_net(model):
    """The net with a head and filters that are a little elsewhere."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


class Masked(nn.Module):
    """The net behind an input of few gray levels, through which no gradient goes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 32).round() / 32)


def test_the_matrix_is_crafted_on_the_row_and_measured_on_the_column(trained):
    model, x, y = trained
    models = {"one": model, "two": other_net(model)}
    attack = PGD(THREAT, steps=5)
    told = []
    table = transfer(models, x, y, attack, 60, seed=2, progress=lambda *what: told.append(what))
    for crafted, source in models.items():
        images = []
        for first in (0, 60):
            generator = stream(2, "cross", "pgd-5", first)
            part = x[first : first + 60] / 255, y[first : first + 60]
            images.append(attack(source.eval(), *part, generator=generator))
        for measured, target in models.items():
            right = (target(x / 255).argmax(1) == y) & (target(torch.cat(images)).argmax(1) == y)
            assert table.counts[crafted][measured] == int(right.sum())
            assert table.accuracy(crafted, measured) == int(right.sum()) / 120
    assert table.clean == {name: int(correct(one, x, y).sum()) for name, one in models.items()}
    assert table.matrix.shape == (2, 2) and float(table.matrix[0, 1]) == table.accuracy("one", "two")
    assert table.worst == {"one": "one", "two": "two"}  # images crafted on a net itself are the worst for it
    assert told == [(name, done, 120) for done in (60, 120) for name in models]
    assert table.attack == attack.describe()


def test_the_diagonal_of_an_attack_without_draws_is_the_robust_accuracy(trained):
    model, x, y = trained
    for size in (7, 500):
        assert transfer({"one": model}, x, y, FGSM(THREAT), size).accuracy("one", "one") == accuracy(
            model, x, y, FGSM(THREAT)
        )


def test_masked_gradients_show_in_their_column(trained):
    model, x, y = trained
    table = transfer({"honest": model, "masked": Masked(model)}, x, y, PGD(THREAT, steps=10))
    assert table.worst == {"honest": "honest", "masked": "honest"}
    assert table.accuracy("honest", "masked") < table.accuracy("masked", "masked") - 0.2


def test_models_are_left_alone_and_the_seed_decides(trained, bits):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
    models = {"one": model, "two": lambda images: trained[0](images)}
    before, state = bits(model), torch.get_rng_state()
    attack = Noise(Linf(0.35), draws=10)
    one, two, three = (transfer(models, x, y, attack, 50, seed=seed) for seed in (0, 0, 1))
    assert one == two and one != three
    assert one.counts["one"] == one.counts["two"]  # the same net with the same draws
    assert model.training and bits(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_attack_that_changes_the_model_does_not_reach_a_verdict(trained):
    model, x, y = trained

    @dataclass(frozen=True)
    class Foreign:
        threat: Threat
        name: str = "foreign"

        def __call__(self, forward, x, y, *, generator=None):
            forward.train()
            forward.body[1].running_var.mul_(100)
            return x

    table = transfer({"one": model}, x, y, Foreign(THREAT))
    assert table.counts["one"]["one"] == table.clean["one"] and table.attack == "foreign"


def test_rows_and_picture(trained):
    model, x, y = trained
    table = transfer({"one": model, "two": other_net(model)}, x[:30], y[:30], Noise(THREAT))
    rows = table.rows()
    assert [(row["crafted_on"], row["measured_on"]) for row in rows] == [
        ("", "one"),
        ("", "two"),
        ("one", "one"),
        ("one", "two"),
        ("two", "one"),
        ("two", "two"),
    ]
    for row in rows:
        assert (row["low"], row["high"]) == interval(row["count"], row["total"]) and row["total"] == 30
    axes = table.plot()
    assert [text.get_text() for text in axes.texts] == [f"{100 * row['accuracy']:.1f}" for row in rows]
    axes.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: transfer({}, x, y, FGSM(THREAT)), "there is none"),
        (lambda m, x, y: transfer({"one": m}, x, y, FGSM(THREAT), 0), "batch_size"),
        (lambda m, x, y: transfer({"one": m}, x.float(), y, FGSM(THREAT)), "inside the model"),
        (lambda m, x, y: transfer({"one": m}, x, y[:2], FGSM(THREAT)), "one integer label"),
    ],
)
def test_mistakes_are_named(trained, call, words):
    with pytest.raises(UserError, match=words):
        call(*trained)
