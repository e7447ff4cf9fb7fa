import copy
import re

import pytest
import torch
from torch import nn

import robustlayers as rl
from robustlayers.attacks import L1, L2, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import MEANINGS, interval, meaning, sanity
from robustlayers.evaluation.sanity import Curve

THREAT = Linf(0.15)


def names(report):
    return [text.partition(":")[0] for text in report.flags]


class Wrapped(nn.Module):
    """The trained net with something dishonest after its logits or before its input."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Shattered(torch.autograd.Function):
    """The identity, with a gradient that changes its sign a thousand times on the way from 0 to 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, *slopes):
        (x,) = ctx.saved_tensors
        return torch.sin(1e4 * x) * slopes[0].abs().mean()


class AwayFromBytes(torch.autograd.Function):
    """The identity, with a gradient that misleads at pixels that are bytes: what single-step training may end in."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, *slopes):
        (x,) = ctx.saved_tensors
        bytes_ = ((x * 255 - (x * 255).round()).abs().amax((1, 2, 3), keepdim=True) < 1e-3).float()
        return slopes[0] * (1 - 2 * bytes_)


def by_the_batch(model):
    model = copy.deepcopy(model)
    norm = model.body[1]
    model.body[1] = nn.BatchNorm2d(6, track_running_stats=False)
    model.body[1].load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return model


# Uniform noise of this size breaks nothing, so that no attack can be weaker than it; see test_flags.
MASKED = ["black box", "more steps", "huge eps"]

# Each model, and exactly the flags that its deceit has to raise: what it does, and what follows for attacks.
DECEIVERS = {
    # no gradient at all: nothing moves, whatever the steps; noise and Square go on
    "quantized input": (
        lambda net: Wrapped(net, before=lambda x: (x * 8).round() / 8),
        ["zero gradient", *MASKED],
    ),
    # no gradient of the cross-entropy; the margin's is whole, so no search without gradients does better
    "saturated logits": (
        lambda net: Wrapped(net, after=lambda z: z * 1e4),
        ["saturated logits", "zero gradient", "more steps", "huge eps"],
    ),
    "random output": (
        lambda net: Wrapped(net, before=lambda x: x + 0.02 * torch.randn_like(x)),
        ["random output"],
    ),
    "batch norm by the batch": (by_the_batch, ["batch statistics", "batch dependence"]),
    # a gradient that leads nowhere: nothing zero, nothing saturated
    "shattered gradient": (lambda net: Wrapped(net, before=Shattered.apply), MASKED),
}


@pytest.mark.parametrize("name", DECEIVERS)
def test_models_made_to_deceive_raise_exactly_the_flags_that_they_should(trained, name):
    make, expected = DECEIVERS[name]
    model, x, y = trained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report = sanity(make(model), x, y, THREAT, queries=300)
    assert sorted(names(report)) == sorted(expected), str(report)


@pytest.mark.parametrize("threat", [THREAT, L2(0.6), L1(3), Linf(0.02), Linf(0.4)], ids=str)
def test_an_honest_net_raises_none(trained, threat):
    model, x, y = trained
    report = sanity(model, x, y, threat, queries=200)
    assert report.flags == (), str(report)
    assert report.by_eps is not None and report.by_eps.counts[-1] == 0
    assert bool(report.skipped) == (threat.norm == "l1")


@pytest.fixture(scope="module")
def hardened():
    """The quickstart's net in small, hardened for a few steps."""
    data = rl.data.load("fashion-mnist-mini")
    model = rl.models.build("resnet", seed=0, depth=8, width=8, classes=10, channels=1, stem_stride=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attack = rl.PGD(rl.Linf("8/255"), steps=2, keep="last")
    partition = rl.Partition(model, {"all": "all"})
    step = rl.PartialStep(model, partition, signals={"all": "adversarial"}, attack=attack, optimizer=optimizer)
    for epoch in range(2):
        for x, y in rl.data.batches(data.train.first(1000), 50, seed=0, epoch=epoch):
            step(x, y)
    return model, data.test.first(50)


def test_the_quickstarts_net_trained_a_little_adversarially_raises_none(hardened):
    model, test = hardened
    report = sanity(model, test.images, test.labels, rl.Linf("8/255"), queries=200)
    assert report.counts["clean"] > 25
    assert report.flags == (), str(report)


def test_catastrophic_overfitting_to_a_single_step(trained):
    model, x, y = trained
    report = sanity(Wrapped(model, before=AwayFromBytes.apply), x, y, Linf(0.25), queries=50)
    assert report.counts["fgsm"] > 2 * report.counts["pgd-20"] > 0
    assert names(report) == ["single step"] and "catastrophic overfitting" in report.meanings[report.flags[0]]
    assert sanity(model, x, y, Linf(0.25), queries=50).flags == ()


def test_a_model_without_a_gradient_is_attacked_without(trained):
    model, x, y = trained
    report = sanity(Wrapped(model, after=lambda z: z.detach()), x, y, THREAT, queries=200)
    assert names(report) == ["no gradient", "black box"]
    assert report.by_eps is None and "no gradient" in report.skipped[0]
    with pytest.raises(UserError, match="no curves"):
        report.plot()


def test_a_gradient_of_ones_own_is_not_traced_away(trained):
    # A folded equivalent of a traced model has the gradient of what was traced, not of a custom backward.
    model, x, y = trained
    assert "black box" in names(sanity(Wrapped(model, before=Shattered.apply), x, y, THREAT, queries=300))


def test_numbers_are_those_of_the_attacks_and_the_seed_decides_them(trained):
    model, x, y = trained
    one, two = (sanity(model, x, y, THREAT, queries=50) for _ in range(2))
    assert one == two
    expected = rl.worst_case(lambda z: model(z), x, y, {"pgd-20": rl.PGD(THREAT, steps=20), "fgsm": rl.FGSM(THREAT)})
    assert one.counts["clean"] == int(expected["clean"].sum()) == 115
    assert one.counts["pgd-20"] == int(expected["pgd-20"].sum()) and one.counts["fgsm"] == int(expected["fgsm"].sum())
    assert one.by_eps.values == pytest.approx((0, 0.0375, 0.075, 0.15, 0.3, 0.5))  # 0.6 is beyond the huge one
    assert one.by_eps.counts[3] == one.counts["pgd-20"] and one.by_eps.counts[0] == 115
    row = one.rows()[0]
    assert (row["attack"], row["count"], (row["low"], row["high"])) == ("clean", 115, interval(115, 120))
    assert len(one.rows()) == len(one.counts) + 6 + 6


def test_the_cost_is_what_is_said(trained):
    model, x, y = trained
    passes = {"forward": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            passes["forward"] += len(inputs)
            return inputs.clone()

        @staticmethod
        def backward(ctx, *slopes):
            passes["backward"] += len(slopes[0])
            return slopes[0]

    with torch.no_grad():
        right = (model(x / 255).argmax(1) == y).nonzero().flatten()
    x, y = x[right][:24], y[right][:24]  # every image is attacked then
    report = sanity(Wrapped(model, before=Count.apply), x, y, L1(3))
    assert passes["backward"] == report.backward_passes * len(x)
    assert passes["forward"] == report.forward_passes * len(x) + 2  # two images alone in `batch_dependence`
    said = re.search(r"at most (\d+) forwards, (\d+) backwards", " ".join(sanity.__doc__.split()))
    assert said is not None
    full = sanity(model, x[:4], y[:4], Linf(0.1))
    assert (full.forward_passes - 1000, full.backward_passes) == (int(said[1]), int(said[2]))


def test_the_model_is_left_alone(trained, bits):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
    before, state = bits(model), torch.get_rng_state()
    sanity(model, x[:40], y[:40], THREAT, queries=20)
    assert model.training and bits(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_show_the_numbers(trained):
    model, x, y = trained
    report = sanity(model, x[:40], y[:40], THREAT, queries=20)
    left, right = report.plot()
    assert left.figure is right.figure
    for axes, curve in ((left, report.by_eps), (right, report.by_steps)):
        line = axes.get_lines()[0]
        assert list(line.get_xdata()) == list(curve.values)
        assert list(line.get_ydata()) == pytest.approx([100 * count / 40 for count in curve.counts])
        assert axes.get_xlabel() == curve.setting and curve.attack in axes.get_title()
    again = report.plot((left, right))
    assert again[0] is left
    left.figure.draw_without_rendering()


def test_texts_can_stand_in_a_row_and_every_flag_has_a_meaning(trained):
    model, x, y = trained
    report = sanity(Wrapped(model, before=lambda x: (x * 8).round() / 8), x, y, THREAT, queries=100)
    for text, what in report.meanings.items():
        assert ";" not in text and what == MEANINGS[text.partition(":")[0]] and what.endswith(".")
        assert text in str(report)
    with pytest.raises(UserError, match="no flag"):
        meaning("nothing: at all")


def test_a_curve_of_one_setting():
    curve = Curve("steps", (1.0, 2.0), (5, 3), 10, "pgd")
    assert [row["accuracy"] for row in curve.rows()] == [0.5, 0.3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threat": Linf(0)}, "eps is 0"),
        ({"steps": 9}, "steps: 9"),
        ({"steps": 10.0}, "steps"),
        ({"queries": -1}, "quer"),
    ],
)
def test_mistakes_are_named(trained, options, words):
    model, x, y = trained
    with pytest.raises(UserError, match=words):
        sanity(model, x[:4], y[:4], **{"threat": THREAT, **options})
