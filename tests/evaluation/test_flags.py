import copy

import pytest
import torch
from torch import nn

from robustlayers.attacks import L2, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import flags
from robustlayers.evaluation.flags import (
    beyond_final,
    black_box,
    huge_eps,
    larger_eps,
    more_steps,
    saturated_logits,
    single_step,
)

THREAT = Linf(0.15)


def names(texts):
    return [text.partition(":")[0] for text in texts]


class Wrapped(nn.Module):
    """The trained net with something dishonest after its logits or before its input."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


@pytest.mark.parametrize("threat", [THREAT, L2(0.6), Linf(0), Linf(1)], ids=str)
def test_an_honest_model_raises_none(trained, threat):
    model, x, y = trained
    assert flags(model, x, y, threat) == []
    assert flags(copy.deepcopy(model).train(), x / 255, y, threat) == []
    assert flags(lambda images: model(images), x, y, threat) == []


def test_norm_layers_without_running_statistics(trained):
    model, x, y = copy.deepcopy(trained[0]), *trained[1:]
    norm = model.body[1]
    model.body[1] = nn.BatchNorm2d(6, track_running_stats=False)
    model.body[1].load_state_dict({"weight": norm.weight, "bias": norm.bias})
    found = flags(model, x, y, THREAT)
    assert names(found)[:2] == ["batch statistics", "batch dependence"]
    assert "(body.1)" in found[0]


def test_running_statistics_that_exist_are_used_whatever_the_switch_says(trained):
    model, x, y = copy.deepcopy(trained[0]), *trained[1:]
    model.body[1].track_running_stats = False
    assert flags(model, x, y, THREAT) == []


def test_a_layer_of_ones_own_that_looks_at_the_batch(trained):
    model, x, y = trained
    found = flags(Wrapped(model, before=lambda x: (x - x.mean(0) + x.mean(0).mean()).clamp(0, 1)), x, y, THREAT)
    assert "batch dependence" in names(found) and "batch statistics" not in names(found)


def test_random_outputs(trained):
    model, x, y = trained
    found = flags(Wrapped(model, before=lambda x: x + 1e-3 * torch.randn_like(x)), x, y, THREAT)
    assert names(found)[0] == "random output" and "batch dependence" not in names(found)
    found = flags(Wrapped(model, after=lambda z: nn.functional.dropout(z, 0.1, training=True)), x, y, THREAT)
    assert "random output" in names(found)


def test_random_outputs_leave_the_global_state_alone(trained):
    model, x, y = trained
    before = torch.get_rng_state()
    flags(Wrapped(model, before=lambda x: x + 1e-3 * torch.randn_like(x)), x, y, THREAT)
    assert torch.equal(torch.get_rng_state(), before)


def test_vanishing_gradients(trained):
    model, x, y = trained
    found = flags(Wrapped(model, after=lambda z: z * 1e4), x, y, THREAT)  # softmax saturates, its gradient is exactly 0
    assert names(found)[:2] == ["saturated logits", "zero gradient"]
    found = flags(Wrapped(model, before=lambda x: (x * 8).round() / 8), x, y, THREAT)
    assert "zero gradient" in names(found)
    assert f"{115} of 120" in found[0]


def test_no_gradient_at_all(trained):
    model, x, y = trained
    found = flags(Wrapped(model, after=lambda z: z.detach()), x, y, THREAT)
    assert names(found) == ["no gradient"]


class Reversed(torch.autograd.Function):
    """The identity, with a gradient that points the wrong way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *slopes):
        return -slopes[0]


def test_gradients_that_mislead(trained):
    model, x, y = trained
    found = flags(Wrapped(model, before=Reversed.apply), x, y, Linf(0.3))
    assert names(found) == ["weaker than noise"]


class WrongOnBytes(Wrapped):
    """Wrong on images whose pixels are multiples of 1/255, right a little beside them."""

    def forward(self, x):
        logits = self.net(x)
        bytes_ = ((x * 255 - (x * 255).round()).abs().amax((1, 2, 3)) < 1e-3)[:, None]
        return torch.where(bytes_, -logits, logits)


def test_a_model_that_is_better_under_attack_than_without(trained):
    model, x, y = trained
    found = flags(WrongOnBytes(model), x, y, Linf("1/255"))
    assert names(found) == ["robust above clean"]


def test_the_model_is_left_alone_and_the_cost_is_as_documented(trained):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
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

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags(Wrapped(model, before=Count.apply), x, y, THREAT)
    assert passes == {"forward": 31 * len(x) + 2, "backward": 12 * len(x)}
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_saturated_logits(trained):
    model, x, y = trained
    for after, words in (
        (lambda z: z.softmax(1), "the outputs are probabilities, not logits"),
        (lambda z: 7 * torch.tanh(9 * z), "of the outputs are at a bound (-7 or 7)"),
        (lambda z: z.clamp(-1, 1.5), "of the outputs are at a bound (-1 or 1.5)"),
        (lambda z: z * 100, "the label leads by more than 40 nats on"),
        (lambda z: z / 0, "of 120 images have infinite ones"),
    ):
        found = saturated_logits(Wrapped(model, after=after), x, y)
        assert len([text for text in found if words in text]) == 1, found
    for honest in (lambda z: z, lambda z: 2 * torch.tanh(z / 4), lambda z: z * 5, lambda z: z * 0 + torch.arange(4.0)):
        assert saturated_logits(Wrapped(model, after=honest), x, y) == []


def verdicts(n, *wrong):
    right = torch.ones(n, dtype=torch.bool)
    right[list(wrong)] = False
    return right


def test_a_black_box_that_breaks_what_gradients_do_not():
    white = {"pgd": verdicts(200, 0, 1), "fgsm": verdicts(200, 2)}
    assert black_box(white, {"square": verdicts(200, 0, 1, 2, 3, 4)}) == []  # 3 and 4 are 1 %
    found = black_box(white, {"square": verdicts(200, 3, 4, 5), "noise": verdicts(200)})
    assert found == ["black box: square breaks 3 of 200 images that no gradient attack breaks"]
    assert black_box({"pgd": verdicts(10)}, {"square": verdicts(10, 1)}) == []  # one image may be an accident
    assert names(black_box({"pgd": verdicts(10)}, {"square": verdicts(10, 1, 2)})) == ["black box"]
    for bad in ({}, {"pgd": verdicts(3).float()}, {"pgd": verdicts(3), "fgsm": verdicts(4)}):
        with pytest.raises(UserError, match="bool tensors"):
            black_box(bad, {})


def test_steps_and_eps_that_do_not_lower_accuracy():
    assert more_steps([1, 2, 4], [90, 60, 59], 100) == []
    assert more_steps([1, 2, 4], [90, 50, 52], 100) == []
    assert more_steps([1, 2], [0, 0], 100) == []
    assert more_steps([1, 2, 4], [90, 50, 53], 100) == ["more steps: 50 of 100 images right after 2 steps, 53 after 4"]
    assert more_steps([1, 4], [90, 90], 100) == ["more steps: 90 of 100 images right after 1 step, 90 after 4"]
    assert larger_eps([0, 0.1, 0.2], [90, 80, 0], 100) == []
    assert larger_eps([0, 8 / 255], [90, 90], 100) == ["larger eps: 90 of 100 images right at eps 0, 90 at 8/255"]
    assert names(larger_eps([0, 0.1, 0.2], [90, 20, 23], 100)) == ["larger eps"]
    assert huge_eps(0.5, 2, 100) == [] and names(huge_eps(0.5, 3, 100)) == ["huge eps"]
    for places, counts in (([1, 2], [1]), ([2, 1], [1, 1]), ([], []), ([1], [101]), ([1], [-1])):
        with pytest.raises(UserError, match="a count from 0 to 100"):
            more_steps(places, counts, 100)


def test_attacks_that_break_more_than_the_final_one():
    results = {"autoattack": verdicts(1000, 0, 1), "pgd": verdicts(1000, *range(5, 10)), "apgd": verdicts(1000, 0, 1)}
    assert beyond_final(results, "autoattack") == []  # five are 0.5 %
    results["pgd"][10] = False
    assert beyond_final(results, "autoattack") == [
        "beyond the final attack: pgd breaks 6 of 1000 images that autoattack leaves (0.6 %)"
    ]
    with pytest.raises(UserError, match="no verdicts of 'square'"):
        beyond_final(results, "square")


def test_catastrophic_overfitting():
    assert names(single_step(90, 85, 0, 100)) == ["single step"]
    assert names(single_step(90, 54, 26, 100)) == ["single step"]
    for honest in ((90, 40, 0), (90, 60, 55), (90, 85, 43), (5, 4, 0), (0, 0, 0)):
        assert single_step(*honest, 100) == []


def test_mistakes_are_named(trained):
    model, x, y = trained
    with pytest.raises(UserError, match="inside the model"):
        flags(model, x.float(), y, THREAT)
    with pytest.raises(UserError, match="one integer label"):
        flags(model, x, y[:3], THREAT)
