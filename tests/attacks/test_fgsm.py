import torch

from robustlayers.attacks import L2, NFGSM, PGD, RFGSM, Linf, Threat, is_correct
from robustlayers.core.random import stream


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slope_of(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]


def test_r_fgsm_is_one_step_from_a_point_of_the_ball(trained):
    model, x, y = trained
    start = Linf(0.1).random_start(x, generator())
    stepped = start + 0.125 * slope_of(model, start, y).sign()
    expected = torch.minimum(torch.maximum(stepped, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(RFGSM(Linf(0.1))(model, x, y, generator=generator()), expected, atol=1e-7, rtol=0)
    assert RFGSM(Linf("8/255")).step == 10 / 255  # the paper's


def test_n_fgsm_starts_outside_the_ball_and_is_projected_only_where_told(trained):
    model, x, y = trained
    start = Threat("linf", 0.2).random_start(x, generator())
    free = (start + 0.1 * slope_of(model, start, y).sign()).clamp(0, 1)
    loose = NFGSM(Linf(0.1), project=False)(model, x, y, generator=generator())
    torch.testing.assert_close(loose, free, atol=1e-7, rtol=0)
    assert (loose - x).abs().max() > 0.2 and loose.min() >= 0 and loose.max() <= 1
    held = NFGSM(Linf(0.1))(model, x, y, generator=generator())
    torch.testing.assert_close(held, torch.minimum(torch.maximum(free, x - 0.1), x + 0.1), atol=1e-7, rtol=0)


def test_without_noise_it_is_fgsm_and_the_default_generator_is_always_the_same(trained):
    model, x, y = trained
    middle = x.clamp(0.2, 0.8)
    still = NFGSM(L2(0.5), noise=0)(model, middle, y)
    expected = PGD(L2(0.5), steps=1, step_size=0.5, random_start=False, keep="last")(model, middle, y)
    torch.testing.assert_close(still, expected, atol=1e-6, rtol=0)
    assert torch.equal(RFGSM(L2(0.5))(model, x, y), RFGSM(L2(0.5))(model, x, y, generator=stream(0, "attack")))


def test_single_steps_are_weaker_than_many(trained):
    model, x, y = trained
    right = [
        int(is_correct(model(attack(model, x, y, generator=generator())), y).sum())
        for attack in (PGD(Linf(0.15), steps=20), RFGSM(Linf(0.15)), NFGSM(Linf(0.15)))
    ]
    assert right[0] < right[1] < right[2] < 0.95 * len(y)
