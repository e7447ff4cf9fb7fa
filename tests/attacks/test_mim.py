import torch

from robustlayers.attacks import L2, MIM, PGD, Linf
from robustlayers.attacks._climb import normalized


def iterates(attack, model, x, y):
    seen = []

    def forward(inputs):
        seen.append(inputs.detach().clone())
        return model(inputs)

    attack(forward, x, y)
    return seen


def test_the_iterates_are_those_of_the_paper(trained):
    model, x, y = trained[0], trained[1][:6], trained[2][:6]
    for decay in (1.0, 0.5):
        x_adv, velocity, expected = x.clone(), torch.zeros_like(x), [x]
        for _ in range(5):
            leaf = x_adv.clone().requires_grad_()
            (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
            velocity = decay * velocity + slope / slope.abs().sum((1, 2, 3), keepdim=True)
            x_adv = (x_adv + 0.1 / 5 * velocity.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
            expected.append(x_adv)
        seen = iterates(MIM(Linf(0.1), steps=5, decay=decay), model, x, y)
        torch.testing.assert_close(torch.cat(seen), torch.cat(expected), atol=1e-6, rtol=0)


def test_it_is_pgd_with_momentum_from_the_image(trained):
    model, x, y = trained
    for threat in (Linf(0.1), L2(0.5)):
        same = PGD(threat, steps=6, step_size=threat.eps / 6, random_start=False, momentum=1.0)
        assert torch.equal(MIM(threat, steps=6)(model, x, y), same(model, x, y))
        assert not torch.equal(MIM(threat, steps=6, decay=0.3)(model, x, y), same(model, x, y))


def test_a_gradient_counts_by_its_direction_alone():
    slope = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    for scale in (1e-38, 1e-20, 1.0, 1e30):
        torch.testing.assert_close(normalized(slope * scale), normalized(slope), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(normalized(slope).abs().mean((1, 2, 3)), torch.ones(2))
    assert torch.equal(normalized(torch.full_like(slope, torch.nan)), torch.zeros_like(slope))
