import pytest
import torch

from robustlayers.attacks import APGD, L1, PGD, is_correct
from robustlayers.attacks._sparse import phases, sparse_step


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_phases_take_all_steps():
    for steps in range(1, 130):
        taken = phases(steps)
        assert sum(count for _, count in taken) == steps and all(count > 0 for _, count in taken)
        assert taken[-1][0] == 1.0
    assert phases(100) == ((3.0, 30), (2.0, 30), (1.0, 40))


def test_a_step_is_even_over_the_pixels_of_the_largest_gradient():
    slope = torch.randn(5, 2, 3, 3, generator=generator())
    pixels, eta = torch.tensor([1.0, 3.9, 18.0, 40.0, 0.2]), torch.linspace(0.5, 1, 5).view(5, 1, 1, 1)
    move = sparse_step(slope, pixels, eta)
    assert (move != 0).flatten(1).sum(1).tolist() == [1, 3, 18, 18, 1]
    torch.testing.assert_close(move.abs().sum((1, 2, 3)), eta.flatten())
    for image, gradient in zip(move, slope, strict=True):
        moved = image != 0
        assert torch.equal(image.sign()[moved], gradient.sign()[moved])
        assert moved.all() or gradient.abs()[moved].min() >= gradient.abs()[~moved].max()
    assert torch.equal(sparse_step(torch.full_like(slope, torch.nan), pixels, eta), torch.zeros_like(slope))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_is_stronger_than_pgd_with_the_same_gradients(trained, loss):
    model, x, y = trained
    apgd, pgd = APGD(L1(1.5), 40, loss), PGD(L1(1.5), 40, loss=loss)
    assert apgd.backward_passes == pgd.backward_passes

    def right(attack):
        return sum(int(is_correct(model(attack(model, x, y, generator=generator(s))), y).sum()) for s in range(2))

    assert right(apgd) <= right(pgd) < 2 * 0.6 * len(y)


def test_only_iterates_inside_the_threat_count(trained):
    """The first balls are three and two times as wide; what they break is no result."""
    model, x, y = trained
    seen = []

    def forward(inputs):
        seen.append(float(L1(1).size(inputs.detach() - x).max()))
        return model(inputs)

    attack = APGD(L1(1.0), 20)
    attack.threat.check(attack(forward, x, y), x)
    assert len(seen) == attack.forward_passes == 23
    assert max(seen[:7]) > 2.5 and max(seen[7:14]) <= 2 + 1e-5 and max(seen[14:]) <= 1 + 1e-5
