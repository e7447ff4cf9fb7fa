import copy
import random
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustlayers.attacks import APGD, FGSM, PGD, Linf, Noise, Square, Threat, is_correct
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation import accuracy, autoattack, correct, worst_case

THREAT = Linf(0.15)


@dataclass(frozen=True)
class Foreign:
    """An attack from elsewhere, which does `deed` to the model and returns `result` of the images."""

    threat: Threat
    deed: object = None
    result: object = None

    def __call__(self, forward, x, y, *, generator=None):
        if self.deed is not None:
            self.deed(forward, x)
        return self.result(x) if self.result is not None else x


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_clean_verdicts_are_the_predictions(trained, batch_size):
    model, x, y = trained
    expected = is_correct(model(x / 255), y)
    assert 0 < int(expected.sum()) < len(y)
    for images in (x, x / 255, (x / 255).double()):
        forward = model if images.dtype != torch.float64 else copy.deepcopy(model).double()
        assert torch.equal(correct(forward, images, y, batch_size=batch_size), expected)
    assert accuracy(model, x, y, batch_size=batch_size) == pytest.approx(float(expected.float().mean()))


def test_robust_verdicts_are_those_of_the_attack_on_the_images_that_are_right(trained):
    model, x, y = trained
    clean = is_correct(model(x / 255), y)
    right = clean.nonzero().squeeze(1)
    attack = PGD(THREAT, steps=5)
    expected = torch.zeros_like(clean)
    for first in range(0, len(right), 50):
        part = right[first : first + 50]
        draws = stream(4, "evaluate", "pgd-5", first)
        expected[part] = is_correct(model(attack(model, x[part] / 255, y[part], generator=draws)), y[part])
    found = correct(model, x, y, attack, batch_size=50, seed=4)
    assert torch.equal(found, expected)
    assert found.dtype == torch.bool and 0 < int(found.sum()) < int(clean.sum())
    assert accuracy(model, x, y, attack, 50, seed=4) == int(expected.sum()) / len(y)


def test_the_same_seed_gives_the_same_verdicts_and_another_one_other_draws(trained):
    model, x, y = trained
    seen = []

    @dataclass(frozen=True)
    class Record(Noise):
        def __call__(self, forward, x, y, *, generator=None):
            seen.append(super().__call__(forward, x, y, generator=generator))
            return seen[-1]

    for seed in (1, 1, 2):
        torch.rand(3)
        correct(model, x, y, Record(THREAT), seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_more_restarts_never_raise_it(trained):
    model, x, y = trained
    for make in (PGD, APGD):
        few, many = (correct(model, x, y, make(THREAT, steps=2, restarts=r), batch_size=40) for r in (1, 4))
        assert torch.all(few | ~many) and int(many.sum()) < int(few.sum())


def test_the_worst_case_is_right_under_all_and_each_row_is_the_attacks_own(trained):
    model, x, y = trained
    attacks = {
        "weak": Noise(THREAT),
        "fgsm": FGSM(THREAT),
        "pgd": PGD(THREAT, steps=10),
        "apgd": APGD(THREAT, 10, "dlr"),
    }
    rows = worst_case(model, x, y, attacks)
    assert list(rows) == ["clean", "weak", "fgsm", "pgd", "apgd", "robust"]
    assert torch.equal(rows["robust"], rows["clean"] & rows["weak"] & rows["fgsm"] & rows["pgd"] & rows["apgd"])
    for name, attack in attacks.items():
        assert torch.equal(rows[name], correct(model, x, y, attack))
        assert torch.all(rows["clean"] | ~rows[name])
    assert torch.equal(worst_case(model, x, y, {})["robust"], rows["clean"])
    assert int(rows["robust"].sum()) < int(rows["fgsm"].sum()) < int(rows["weak"].sum())


def test_only_images_that_are_right_clean_are_attacked_and_by_every_attack(trained):
    model, x, y = trained
    clean = correct(model, x, y)
    sizes = []
    attack = Foreign(THREAT, deed=lambda _, images: sizes.append(len(images)))
    rows = worst_case(model, x, y, {"all broken": FGSM(Linf(1)), "counted": attack}, batch_size=50)
    assert sum(sizes) == int(clean.sum()) and max(sizes) == 50
    assert torch.equal(rows["counted"], clean)


def test_progress_is_told_batch_by_batch(trained):
    model, x, y = trained
    told = []
    worst_case(model, x, y, {"fgsm": FGSM(THREAT)}, 50, progress=lambda *what: told.append(what))
    n = int(correct(model, x, y).sum())
    assert told == [("clean", d, 120) for d in (0, 50, 100, 120)] + [("fgsm", d, n) for d in (0, 50, 100, n)]


def test_a_long_batch_tells_how_far_it_is_and_is_attacked_alike(trained, monkeypatch):
    model, x, y = trained
    told, now = [], [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(sys.modules["robustlayers.evaluation.accuracy"], "time", clock)

    def forward(images):
        now[0] += 0.2
        return model(images)

    attacks = {"pgd": PGD(THREAT, steps=10), "square": Square(THREAT, 40)}
    found = worst_case(forward, x, y, attacks, 60, progress=lambda *what: told.append(what))
    silent = worst_case(forward, x, y, attacks, 60)
    assert all(torch.equal(found[name], silent[name]) for name in found)
    for name in attacks:
        counts = [done for what, done, _ in told if what == name]
        assert counts == sorted(counts) and len(counts) > 8 and 0 < min(counts[1:]) < 30
        assert {60, int(found["clean"].sum())} <= set(counts)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_the_batches_find_what_one_finds(trained, together, count):
    model, x, y = trained
    attacks = {"pgd": PGD(THREAT, steps=3), "square": Square(THREAT, 10), "noise": Noise(THREAT)}
    alone = worst_case(model, x, y, attacks, 13, seed=2)
    sizes = [[] for _ in range(count)]

    def work(ranks):
        counted = Foreign(THREAT, deed=lambda _, images: sizes[ranks.index].append(len(images)))
        own = copy.deepcopy(model)
        return worst_case(own, x, y, attacks | {"counted": counted}, 13, seed=2, ranks=ranks)

    for found in together(count, work):
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert sum(map(sum, sizes)) == int(alone["clean"].sum())
    assert max(map(len, sizes)) - min(map(len, sizes)) <= 1


def test_a_model_in_training_mode_is_evaluated_by_its_running_statistics_and_stays_as_it_was(trained):
    model, x, y = trained
    expected = correct(model, x, y, PGD(THREAT, steps=2))
    other = copy.deepcopy(model).train()
    other.body[4].eval()
    other.head.bias.requires_grad_(False)
    other.head.weight.grad = torch.ones_like(other.head.weight)
    gradient = other.head.weight.grad
    modes = [module.training for module in other.modules()]
    tensors = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    state = torch.get_rng_state(), random.getstate()
    assert torch.equal(correct(other, x, y, PGD(THREAT, steps=2)), expected)
    assert [module.training for module in other.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())
    assert other.head.weight.grad is gradient and torch.all(gradient == 1)
    assert [p.requires_grad for p in other.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


def flip_to_training(model, x):
    model.train()
    model(x)


def double_statistics(model, x):
    model.body[1].running_var.mul_(100)


def hook(model, x):
    model.register_forward_hook(lambda *_: torch.zeros(len(x), 4))


@pytest.mark.parametrize("deed", [flip_to_training, double_statistics, hook], ids=lambda deed: deed.__name__)
def test_what_a_foreign_attack_does_to_the_model_does_not_reach_a_verdict(trained, deed):
    model, x, y = trained
    clean = correct(model, x, y)
    assert torch.equal(correct(model, x, y, Foreign(THREAT, deed), batch_size=30), clean)
    assert torch.equal(correct(model, x, y), clean)


def test_an_attack_that_raises_leaves_the_model_alone(trained):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]

    def fail(model, x):
        flip_to_training(model, x)
        raise ZeroDivisionError

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        correct(model, x, y, Foreign(THREAT, fail))
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: (x + 0.16).clamp(0, 1), "foreign: the attack left the ball"),
        (lambda x: x - 0.1, "foreign: the attack left the box"),
        (lambda x: (x * 255).to(torch.uint8), "foreign: the attack returned torch.uint8"),
        (lambda x: x[:1], "foreign: the attack returned shape"),
        (lambda x: x * torch.nan, "foreign: the attack left the ball"),
    ],
)
def test_an_attack_that_leaves_its_threat_is_refused(trained, result, words):
    model, x, y = trained
    with pytest.raises(UserError, match=words):
        accuracy(model, x, y, Foreign(THREAT, result=result))


def test_a_module_is_evaluated_without_autocast_and_a_function_as_it_is(trained):
    model, x, y = trained
    dtypes = []
    model = copy.deepcopy(model)
    model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        correct(model, x, y, FGSM(THREAT))
        assert set(dtypes) == {torch.float32}
        correct(lambda images: model(images), x, y)
        assert dtypes[-1] == torch.bfloat16
    mode = copy.deepcopy(trained[0]).train()
    correct(lambda images: mode(images), x, y)
    assert mode.body[1].num_batches_tracked > trained[0].body[1].num_batches_tracked


def test_a_model_without_tensors_and_logits_that_are_not_numbers():
    x, y = torch.rand(6, 3), torch.zeros(6, dtype=torch.long)
    assert accuracy(nn.Identity(), torch.eye(3), torch.arange(3)) == 1.0
    assert accuracy(lambda images: images * torch.nan, x, y) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: correct(m, x, y[:-1]), "one integer label"),
        (lambda m, x, y: correct(m, x, y.float()), "one integer label"),
        (lambda m, x, y: correct(m, x[:0], y[:0]), "no image"),
        (lambda m, x, y: correct(m, x, y + 100), "is no class of the forward, which returns"),
        (lambda m, x, y: correct(m, x, y - 1), "label -1 is no class"),
        (lambda m, x, y: correct(lambda images: (m(images), 0), x, y), "must return logits .* it returned tuple"),
        (lambda m, x, y: autoattack(m, x, y + 100, threat=THREAT), "is no class of the forward"),
        (lambda m, x, y: correct(m, x.float(), y), "inside the model"),
        (lambda m, x, y: correct(m, x.half(), y), "uint8, or as float32"),
        (lambda m, x, y: correct(m, x, y, batch_size=0), "batch_size"),
        (lambda m, x, y: worst_case(m, x, y, {"robust": FGSM(THREAT)}), "must not be called 'robust'"),
    ],
)
def test_mistakes_are_named(trained, call, words):
    with pytest.raises(UserError, match=words):
        call(*trained)
