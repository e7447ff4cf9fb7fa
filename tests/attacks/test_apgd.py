import pytest
import torch

from robustlayers.attacks import APGD, L2, LOSSES, PGD, Linf, is_correct
from robustlayers.attacks.apgd import checkpoints


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_checkpoints_of_the_paper():
    # p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(10) == (3, 5, 6, 7, 8, 9)
    assert checkpoints(1) == ()
    for steps in range(1, 200):
        found = checkpoints(steps)
        assert list(found) == sorted(set(found)) and all(0 < k < steps for k in found)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_reaches_the_optimum_of_a_linear_model(linear, dtype, loss):
    model = linear((2, 4, 4), dtype=dtype)
    model[1].weight.data *= 0.1
    x, y = torch.rand(20, 2, 4, 4, generator=generator(), dtype=dtype), torch.arange(20) % 2
    weight = model[1].weight.detach()
    toward = (weight[1 - y] - weight[y]).view(x.shape)
    for eps in (8 / 255, 0.4):
        expected = torch.where(toward > 0, (x + eps).clamp(0, 1), (x - eps).clamp(0, 1))
        assert torch.equal(APGD(Linf(eps), 10, loss)(model, x, y, generator=generator()), expected)


def test_l2_reaches_the_optimum_of_a_linear_model(linear):
    model = linear((2, 4, 4))
    x, y = torch.rand(20, 2, 4, 4, generator=generator()) * 0.2 + 0.4, torch.arange(20) % 2
    weight = model[1].weight.detach()
    best = 0.3 * (weight[1 - y] - weight[y]).norm(dim=1)
    x_adv = APGD(L2(0.3), 20, "margin")(model, x, y, generator=generator())
    gain = LOSSES["margin"](model(x_adv), y) - LOSSES["margin"](model(x), y)
    assert torch.all(gain >= 0.99 * best) and torch.all(gain <= best * (1 + 1e-4))


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.6)], ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_at_least_as_strong_as_pgd_with_the_same_gradients(trained, threat, loss):
    model, x, y = trained
    apgd, pgd = APGD(threat, 20, loss), PGD(threat, 20, loss=loss)
    assert apgd.backward_passes == pgd.backward_passes

    def right(attack):
        return [int(is_correct(model(attack(model, x, y, generator=generator(s))), y).sum()) for s in range(3)]

    ours, theirs = right(apgd), right(pgd)
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)) and sum(ours) < sum(theirs) < 3 * 0.7 * len(y)


def bowl(centre):
    """A forward of two classes whose margin is -|x - centre|^2: its peak is inside the ball, long steps overshoot."""

    def forward(x):
        distance = (x - centre).square().sum((1, 2, 3))
        return torch.stack([distance, torch.zeros_like(distance)], 1)

    return forward


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.5)], ids=str)
def test_it_halves_its_steps_to_meet_a_peak_that_long_steps_overshoot(threat):
    x = torch.full((6, 1, 3, 3), 0.5)
    centre = threat.random_start(x, generator(5))
    y = torch.zeros(6, dtype=torch.long)
    x_adv = APGD(threat, 100, "margin")(bowl(centre), x, y, generator=generator())
    fixed = PGD(threat, 100, 2 * threat.eps, loss="margin", random_start=False)(bowl(centre), x, y)
    reached, overshot = ((a - centre).flatten(1).norm(dim=1) for a in (x_adv, fixed))
    assert torch.all(reached < 0.03 * threat.eps)
    assert reached.mean() < 0.1 * overshot.mean()


def test_each_image_has_its_own_step_size():
    """An image that needs short steps and one that does not give the same result alone and together."""
    x = torch.full((2, 1, 3, 3), 0.5)
    centre = torch.stack([torch.full((1, 3, 3), 0.53), torch.full((1, 3, 3), 5.0)])
    y = torch.zeros(2, dtype=torch.long)
    attack = APGD(Linf(0.2), 50, "margin", random_start=False)
    together = attack(bowl(centre), x, y)
    alone = [attack(bowl(centre[i : i + 1]), x[i : i + 1], y[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together[1], torch.full((1, 3, 3), 0.7))


def test_the_last_iterate_counts(linear):
    """With one step, what is returned is the better of the start and the only iterate."""
    model = linear((1, 2, 2))
    x, y = torch.rand(8, 1, 2, 2, generator=generator()), torch.arange(8) % 2
    x_adv = APGD(Linf(0.1), 1, "margin", random_start=False)(model, x, y)
    assert torch.all(LOSSES["margin"](model(x_adv), y) > LOSSES["margin"](model(x), y))
