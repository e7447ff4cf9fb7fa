"""On a linear model the worst image is known in closed form: gradient attacks of every norm reach it, or come near."""

import pytest
import torch

from robustlayers.attacks import (
    APGD,
    FGSM,
    L1,
    L2,
    LOSSES,
    MIM,
    NFGSM,
    PGD,
    RFGSM,
    Linf,
    TargetedAPGD,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 17, 64])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_every_gradient_attack_meets_the_optimum_of_a_linear_model(linear, n, last):
    model = linear((3, 6, 5))
    model[1].weight.data *= 0.1  # a cross-entropy that is not saturated
    x, y = torch.rand(n, 3, 6, 5, generator=generator()), torch.arange(n) % 2
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = model[1].weight.detach()
    toward = (weight[1 - y] - weight[y]).view(x.shape)
    eps = 8 / 255
    corner = torch.where(toward > 0, (x + eps).clamp(0, 1), (x - eps).clamp(0, 1))
    model[1].bias.data[:] = 0
    stubborn = lambda inputs: model(inputs) + 5 * torch.nn.functional.one_hot(y, 2)  # noqa: E731  # no image is broken
    for attack in (
        FGSM(Linf(eps)),
        RFGSM(Linf(eps), step_size=2.1 * eps),
        NFGSM(Linf(eps), step_size=3.1 * eps),
        PGD(Linf(eps), momentum=0.75),
        PGD(Linf(eps), start="gaussian"),
        MIM(Linf(eps), step_size=0.3 * eps),
        APGD(Linf(eps), 10),
    ):
        assert torch.equal(attack(model, x, y, generator=generator()), corner)
    torch.testing.assert_close(MIM(Linf(eps))(model, x, y), corner, atol=1e-6, rtol=0)  # a path of just eps
    for attack in (PGD(Linf(eps), early_exit=True, loss="margin"), APGD(Linf(eps), 10, "margin", early_exit=True)):
        assert torch.equal(attack(only(stubborn, n), x, y, generator=generator()), corner)
    assert torch.equal(TargetedAPGD(Linf(eps), 10, loss="margin")(only(stubborn, n), x, y), corner)


def only(forward, n):
    """Say so where an attack leaves images out that are not broken: the labels would no longer fit."""

    def checked(inputs):
        assert len(inputs) == n
        return forward(inputs)

    return checked


@pytest.mark.parametrize("n", [1, 5, 64])
def test_l2_attacks_come_within_one_percent_of_a_linear_optimum(linear, n):
    model = linear((3, 6, 5))
    x, y = torch.rand(n, 3, 6, 5, generator=generator()) * 0.2 + 0.4, torch.arange(n) % 2
    weight, margin = model[1].weight.detach(), LOSSES["margin"]
    best = 0.3 * (weight[1 - y] - weight[y]).norm(dim=1)
    for attack in (
        RFGSM(L2(0.3), step_size=30),
        PGD(L2(0.3), momentum=0.5, loss="margin"),
        PGD(L2(0.3), start="gaussian", loss="margin"),
        MIM(L2(0.3), loss="margin"),
        APGD(L2(0.3), 20, "margin"),
    ):
        gain = margin(model(attack(model, x, y, generator=generator())), y) - margin(model(x), y)
        assert torch.all(gain >= 0.99 * best) and torch.all(gain <= best * (1 + 1e-4)), attack.describe()


def test_l1_attacks_on_a_linear_model(linear):
    model = linear((3, 6, 5))
    model[1].weight.data *= 0.1
    x, y = torch.rand(20, 3, 6, 5, generator=generator()), torch.arange(20) % 2
    weight, margin = model[1].weight.detach(), LOSSES["margin"]
    toward = weight[1 - y] - weight[y]
    # The knapsack: pixels by falling gradient, each to the end of the box, until eps is spent.
    room = torch.where(toward > 0, 1 - x.flatten(1), x.flatten(1))
    for eps in (1.0, 6.0):
        best = []
        for slope, space in zip(toward.abs().tolist(), room.tolist(), strict=True):
            left, gain = eps, 0.0
            for value, most in sorted(zip(slope, space, strict=True), reverse=True):
                gain, left = gain + value * min(most, left), left - min(most, left)
            best.append(gain)
        best = torch.tensor(best)
        for attack, least in (
            (FGSM(L1(eps)), 1 - 1e-5),
            (MIM(L1(eps)), 1 - 1e-5),
            (PGD(L1(eps), steps=40), 0.97),
            (APGD(L1(eps), 60), 0.95),
        ):
            gain = margin(model(attack(model, x, y, generator=generator())), y) - margin(model(x), y)
            assert torch.all(gain >= least * best) and torch.all(gain <= best * (1 + 1e-4)), attack.describe()
