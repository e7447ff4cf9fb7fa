"""Faults of published training code, continued: what is perturbed and by how much, and what a name in code means.

As in `test_traps.py`, for each a check that our way passes and the published one, planted here, fails.
"""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.models.parts import Normalize
from robustlayers.selection import Inventory, Partition, is_norm, select
from robustlayers.training import Ascent, OptimizerSettings, PartialStep, ascent, build_optimizer, snapshot


def step_of(model, signal, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return PartialStep(model, Partition(model, {"all": "all"}), {"all": signal}, optimizer=optimizer, **options)


def norm_names(model):
    return {f"{name}.{key}" for name, m in model.named_modules() if is_norm(m) for key in m.state_dict()}


# -- what is perturbed, and by how much ------------------------------------------------------------------------------


def weights_alone(settings, inventory):
    """Wu et al. 2020, utils_awp.py: `if len(old_w.size()) <= 1: continue`, and only names with 'weight' in them."""
    names = [e.name for e in inventory if not e.buffer and e.tensor.dim() > 1 and "weight" in e.name]
    return dict.fromkeys(set(select(inventory.model, settings.select)) & set(names))


@pytest.mark.parametrize("selector", ["norm", "norm | head", "all"])
def test_an_ascent_perturbs_all_that_it_is_asked_to(selector, net, batch, monkeypatch):
    asked = Ascent("awp", select=selector, vectors=True)

    def perturbed():
        """The parameters of which the value in the forward that is trained on is another."""
        model = net("resnet")
        seen = []
        model.register_forward_hook(lambda *_: seen.append(snapshot(model)))
        step_of(model, "natural", ascent=asked)(*batch())
        first, last = seen[0], seen[-1]
        return {name for name, _ in model.named_parameters() if not torch.equal(first[name], last[name])}

    model = net("resnet")
    expected = set(select(model, selector)) & {name for name, _ in model.named_parameters()}
    assert perturbed() == expected
    monkeypatch.setattr("robustlayers.training.step.bind", weights_alone)
    assert perturbed() < expected


def test_an_ascent_that_leaves_vectors_out_says_so(net):
    assert "no vectors" in Ascent("awp").describe() and "no vectors" not in Ascent("awp", vectors=True).describe()
    inventory = Inventory(net("resnet"))
    assert weights_alone(Ascent("awp", select="norm"), inventory) == {}  # the trap: nothing, and not a word
    with pytest.raises(UserError, match="awp leaves out tensors with fewer than two dimensions"):
        ascent.bind(Ascent("awp", select="norm"), inventory)


EPS, MEAN, STD = 0.1, 0.3, 0.25


def ours_in_pixels(model, x, y):
    """What the training forward of a step gets."""
    net = nn.Sequential(Normalize([MEAN], [STD]), model)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    step_of(net, "adversarial", attack=PGD(Linf(EPS), steps=5, keep="last"))(x, y)
    return seen[-1]


def in_normalized_space(model, x, y):
    """Images normalized by the loader, eps added to them there; as in code of Galloway et al. 2019 and AdvProp."""
    z = ((x - MEAN) / STD).requires_grad_(True)
    (slope,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
    return (z.detach() + EPS * slope.sign()) * STD + MEAN


def distance(way, net, batch):
    x, y = batch(12)
    x_adv = way(net("small-cnn"), x, y)
    assert x_adv.shape == x.shape
    inside = bool((x_adv >= 0).all() and (x_adv <= 1).all())
    return round(float((x_adv - x).abs().max()), 5), inside


def test_eps_is_in_pixels(net, batch):
    assert distance(ours_in_pixels, net, batch) == (EPS, True)
    assert distance(in_normalized_space, net, batch) == (EPS * STD, False)


def nearest_pixel(text):
    """A report that shows whole pixels."""
    return f"{round(255 * number(text))}/255"


def as_it_is_written(text):
    """How our own attacks show a step size."""
    return PGD(Linf("8/255"), steps=10, step_size=text).describe().split("step ")[1].split(",")[0]


def confused(show):
    """Pairs of constants that published code confuses, (wrong, meant), and that look alike when shown."""
    pairs = [("2/225", "2/255"), ("0.8/255", "1/255"), ("0.031", "8/255"), ("0.003137", "1/255")]
    return [pair for pair in pairs if show(pair[0]) == show(pair[1])]


def test_a_wrong_constant_can_be_seen():
    """RiFT: alpha = 2/225. Bakiskan et al.: 0.003137, labeled 1/255. TRADES: 0.031 for 8/255."""
    assert confused(as_it_is_written) == []
    assert len(confused(nearest_pixel)) == 4
    for text in ("2/255", "8/255", "0.8/255"):
        top, bottom = text.split("/")
        assert number(text) == float(Fraction(top) / Fraction(bottom)) and as_it_is_written(text) == text


# -- what a name means -----------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks layer1 to layer12."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(1, 13):
            self.add_module(f"layer{index}", nn.Sequential(nn.Linear(2, 2)))
        self.fc = nn.Linear(2, 2)


def by_substring(model, name):
    """`if 'layer1' in name`, of SAM-ON, RiFT and AWP."""
    return [key for key in model.state_dict() if name in key]


def norm_by_substring(model, keyword):
    """`if 'bn' in name`, of Rice et al. 2020 and of surgical fine-tuning: norm layers of shortcuts have another name."""
    return [key for key in model.state_dict() if "bn" in key]


def resnet():
    return models.build("resnet", seed=0, depth=8, width=2, channels=1, classes=3, shortcut="B")


@pytest.mark.parametrize(
    ("make", "asked", "expected", "published", "wrong"),
    [
        (Deep, "layer1", {"layer1.0.weight", "layer1.0.bias"}, by_substring, 8),
        (resnet, "norm", norm_names(resnet()), norm_by_substring, 5 * 7),
    ],
)
def test_nothing_is_meant_by_a_part_of_its_name(make, asked, expected, published, wrong):
    model = make()
    assert set(select(model, asked)) == expected
    assert set(published(model, asked)) != expected and len(published(model, asked)) == wrong
    partition = Partition(model, {"some": asked, "others": "rest"})  # and so it is in training
    optimizer = build_optimizer(partition, {"some": {"natural": 1.0}, "others": {}}, OptimizerSettings())
    assert optimizer is not None
    held = {name for group in optimizer.param_groups for name in group["names"]}
    assert held == expected & {name for name, _ in model.named_parameters()}


def ours_without_decay(model):
    partition = Partition(model, {"all": "all"})
    optimizer = build_optimizer(partition, {"all": {"natural": 1.0}}, OptimizerSettings(decay="weights"))
    assert optimizer is not None
    return {name for group in optimizer.param_groups for name in group["names"] if not group["weight_decay"]}


def published_without_decay(model):
    """Rice et al. 2020, `--l2`: no decay where the name has 'bn' or 'bias' in it."""
    return {name for name, _ in model.named_parameters() if "bn" in name or "bias" in name}


def decay_on_all(model):
    """What an optimizer does that is told nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    return {n for g in optimizer.param_groups for n, _ in model.named_parameters() if not g["weight_decay"]}


def test_weight_decay_spares_every_norm_layer_and_bias_if_told_to_and_says_which():
    model = resnet()
    expected = {
        f"{name}.{key}" for name, m in model.named_modules() if is_norm(m) for key, _ in m.named_parameters()
    } | {"linear.bias"}
    assert ours_without_decay(model) == expected
    for way in (published_without_decay, decay_on_all):
        assert way(model) != expected
    assert "none on norm layers and biases" in str(OptimizerSettings(decay="weights"))
    assert "none on norm layers and biases" not in str(OptimizerSettings())
