import copy

import pytest
import torch
from torch import nn

from robustlayers.attacks import FGSM, PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import accuracy, branches, calibration, corruption_accuracy, policies, sanity
from robustlayers.normalization.layers import RandomNorm
from robustlayers.normalization.layers.dual import DualBatchNorm

THREAT = Linf(0.2)


@pytest.fixture
def dual(trained):
    """The trained net with a dual norm whose auxiliary branch sees other filters, in training mode."""
    model, x, y = copy.deepcopy(trained[0]), *trained[1:]
    layer = DualBatchNorm(model.body[1])
    with torch.no_grad():
        layer.auxiliary.weight[:3] *= 0.3
        layer.auxiliary.bias += 0.1
    model.body[1] = layer
    return model.train(), x, y


def only(model, branch):
    """The net of one branch as a plain net."""
    model = copy.deepcopy(model)
    model.body[1] = getattr(model.body[1], branch)
    return model.eval()


def test_every_branch_is_attacked_and_measured(dual):
    model, x, y = dual
    table = branches(model, x, y, FGSM(THREAT), 50)
    assert table.names == ("main", "auxiliary")
    for crafted in table.names:
        source = only(model, crafted)
        x_adv = FGSM(THREAT)(source, x / 255, y)
        for measured in table.names:
            target = only(model, measured)
            right = (target(x / 255).argmax(1) == y) & (target(x_adv).argmax(1) == y)
            assert table.counts[crafted][measured] == int(right.sum())
        assert table.accuracy(crafted, crafted) == accuracy(source, x, y, FGSM(THREAT))
    assert len({table.counts[a][b] for a in table.names for b in table.names}) > 2  # a mix-up would show


def test_the_model_is_left_as_it_was(dual, bits):
    model, x, y = dual
    model.body[1].branch = "auxiliary"
    before = bits(model)
    branches(model, x[:20], y[:20], PGD(THREAT, steps=2))
    branches(model, x[:20], y[:20], PGD(THREAT, steps=2), by="batch")
    policies(model, x[:20], y[:20], PGD(THREAT, steps=2))
    with pytest.raises(ZeroDivisionError):
        branches(model, x, y, lambda *_, **__: 1 / 0)
    assert model.body[1].branch == "auxiliary" and model.training and bits(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_some_branches_and_mistakes(dual, trained):
    model, x, y = dual
    assert branches(model, x, y, FGSM(THREAT), only=["auxiliary"]).names == ("auxiliary",)
    for call, words in (
        (lambda: branches(model, x, y, FGSM(THREAT), only=["auxilary"]), "nearest: auxiliary"),
        (lambda: branches(model, x, y, FGSM(THREAT), only=[]), "there is no branch"),
        (lambda: branches(trained[0], x, y, FGSM(THREAT)), "no layer of Net has branches"),
        (lambda: branches(model, x, y, FGSM(THREAT), by="frozen"), "statistics to normalize by"),
        (lambda: policies(model, x, y, FGSM(THREAT), by=["runing"]), "nearest: running"),
        (lambda: policies(model, x, y, FGSM(THREAT), by=[]), "there is no policy"),
        (lambda: policies(model, x, y, FGSM(THREAT), 0), "batch_size"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_running_and_batch_statistics(trained, bits):
    model, x, y = copy.deepcopy(trained[0]), *trained[1:]
    model.body[1].running_mean += 0.3  # statistics that do not fit
    before = bits(model)
    table = policies(model, x, y, FGSM(THREAT), 60)
    assert bits(model) == before
    by_batch = copy.deepcopy(model)
    by_batch.body[1] = nn.BatchNorm2d(6, track_running_stats=False)
    by_batch.body[1].load_state_dict({"weight": model.body[1].weight, "bias": model.body[1].bias})
    assert table.accuracy("running", "running") == accuracy(model, x, y, FGSM(THREAT))
    right = []
    for first in (0, 60):
        part, labels = x[first : first + 60] / 255, y[first : first + 60]
        x_adv = FGSM(THREAT)(by_batch, part, labels)
        right.append((by_batch(part).argmax(1) == labels) & (by_batch(x_adv).argmax(1) == labels))
    assert table.counts["batch"]["batch"] == int(torch.cat(right).sum())
    assert table.clean["batch"] > table.clean["running"]
    assert policies(model, x, y, FGSM(THREAT), by=["batch"]).names == ("batch",)


def test_batches_of_nearly_equal_size(trained):
    model, x, y = trained
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    policies(model, x[:101], y[:101], FGSM(THREAT), 50, by=["batch"])
    handle.remove()
    assert set(sizes) == {33, 34}


def test_branches_by_the_batch_differ_by_their_affine_part_alone(dual):
    model, x, y = dual
    with torch.no_grad():
        model.body[1].auxiliary.load_state_dict(model.body[1].main.state_dict())
        model.body[1].auxiliary.running_mean += 1
    running, batch = (branches(model, x, y, FGSM(THREAT), by=by) for by in ("running", "batch"))
    assert running.clean["main"] != running.clean["auxiliary"]
    assert batch.clean["main"] == batch.clean["auxiliary"]


def test_norms_that_draw_are_repeatable_by_the_seed(trained):
    model, x, y = copy.deepcopy(trained[0]), *trained[1:]
    model.body[1] = RandomNorm(model.body[1], kinds=("batch", "group-2"))
    names = ("random", "batch", "group-2")
    one, two = (branches(model, x, y, PGD(THREAT, steps=2), 24) for _ in range(2))
    assert one.names == names and one == two and model.body[1].branch == "random"
    assert len({one.clean[name] for name in names}) == 3
    for measure in (
        lambda: calibration(model, x, y, PGD(THREAT, steps=2), 11),
        lambda: corruption_accuracy(model, x, y, ["contrast"], (1, 5), 11),
        lambda: sanity(model, x[:12], y[:12], THREAT, queries=20),
    ):
        found = measure()
        assert found == measure()
    assert found.flags[0].startswith("random output")
