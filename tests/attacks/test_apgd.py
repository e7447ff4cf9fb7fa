import copy
import math

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
        return sum(int(is_correct(model(attack(model, x, y, generator=generator(s))), y).sum()) for s in range(3))

    # Three starts together: so it came out for 40 of 40 pairs of a net and a setting that were tried.
    assert right(apgd) <= right(pgd) < 3 * 0.7 * len(y)


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


def reference(forward, x, y, start, threat, steps, loss):
    """Algorithm 1 of the paper for one image, in plain Python, without batching; where it looks and halves."""
    eps, alpha, rho = threat.eps, 0.75, 0.75

    def project(point):
        delta = point - x
        if threat.norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif delta.norm() > eps:
            delta = delta * eps / delta.norm()
        return (x + delta).clamp(0, 1)

    def look(point):
        point = point.clone().requires_grad_()
        value = LOSSES[loss](forward(point), y)
        (slope,) = torch.autograd.grad(value.sum(), point)
        return float(value.detach()), slope.sign() if threat.norm == "linf" else slope / slope.norm()

    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    checks = [math.ceil(p * steps - 1e-9) for p in fractions]
    points, eta = [start], 2 * eps
    value, slope = look(start)
    values, best = [value], (value, start, slope)
    eta_at_check, best_at_check, last_check, halvings = eta, value, 0, ()
    now, before = start, start
    for k in range(1, steps + 1):
        z = project(now + eta * slope)
        following = z if k == 1 else project(now + alpha * (z - now) + (1 - alpha) * (now - before))
        before, now = now, following
        points.append(now)
        value, slope = look(now)
        values.append(value)
        if value > best[0]:
            best = (value, now, slope)
        if k in checks and k < steps:
            rose = sum(values[i + 1] > values[i] for i in range(last_check, k))
            stuck = eta == eta_at_check and best[0] == best_at_check
            eta_at_check, best_at_check = eta, best[0]
            if rose < rho * (k - last_check) or stuck:
                eta, halvings = eta / 2, (*halvings, k)
                values[-1], now, slope = best
            last_check = k
    return points, halvings


@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.8)], ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_every_image_of_a_batch_takes_the_way_of_the_algorithm(trained, threat, loss):
    model, x, y = copy.deepcopy(trained[0]).double(), trained[1][:10].double(), trained[2][:10]
    looked = []

    def forward(inputs):
        looked.append(inputs.detach().clone())
        return model(inputs)

    APGD(threat, 30, loss)(forward, x, y, generator=generator(2))
    halvings = set()
    for i in range(10):
        one = slice(i, i + 1)
        points, halved = reference(model, x[one], y[one], looked[0][one], threat, 30, loss)
        halvings.add(halved)
        torch.testing.assert_close(torch.cat(points), torch.cat([batch[one] for batch in looked]), atol=1e-9, rtol=0)
    assert len(halvings) > 1  # the images halve their steps at different times, or nothing would show that they may


def test_the_last_iterate_counts(linear):
    """With one step, what is returned is the better of the start and the only iterate."""
    model = linear((1, 2, 2))
    x, y = torch.rand(8, 1, 2, 2, generator=generator()), torch.arange(8) % 2
    x_adv = APGD(Linf(0.1), 1, "margin", random_start=False)(model, x, y)
    assert torch.all(LOSSES["margin"](model(x_adv), y) > LOSSES["margin"](model(x), y))
