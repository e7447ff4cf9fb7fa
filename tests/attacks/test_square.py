import itertools
import math

import pytest
import torch

from robustlayers.attacks import L2, LOSSES, PGD, Linf, Square, is_correct
from robustlayers.attacks._squares import Windows, corner, pattern, tiles
from robustlayers.attacks.square import share
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_schedule_of_the_squares():
    assert [share(q, 0.8) * 1024 for q in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)] == pytest.approx(
        [0.8 * 1024 / 2**k for k in (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    )


@pytest.mark.parametrize("threat", [Linf(0.12), L2(0.5)], ids=str)
def test_more_queries_never_help_the_defender(trained, threat):
    model, x, y = trained
    standing, counts = torch.ones(len(y), dtype=torch.bool), []
    for queries in (0, 20, 100, 300):
        now = is_correct(model(Square(threat, queries)(model, x, y, generator=generator())), y)
        assert torch.all(standing | ~now)  # what fewer queries have broken stays broken, image by image
        standing = now
        counts.append(int(now.sum()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] > counts[3]
    assert (
        counts[3] >= 0.9 * is_correct(model(PGD(threat, 50, restarts=3)(model, x, y)), y).sum()
    )  # no better than gradients


@pytest.mark.parametrize("threat", [Linf(0.12), L2(0.5)], ids=str)
def test_it_needs_no_gradient(trained, threat):
    model, x, y = trained
    quantized = lambda inputs: (model(inputs.detach()) * 64).round() / 64  # noqa: E731
    with pytest.raises(UserError, match="no gradient"):
        PGD(threat)(quantized, x, y)
    x_adv = Square(threat, 150)(quantized, x, y, generator=generator())
    assert is_correct(quantized(x_adv), y).sum() < 0.95 * len(y)

    def silent(inputs):
        assert not torch.is_grad_enabled() and not inputs.requires_grad
        return model(inputs)

    Square(threat, 5)(silent, x, y)


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3)], ids=str)
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_loss_only_rises_and_the_perturbation_has_full_length(trained, threat, loss):
    model, x, y = trained
    x = x.clamp(0.35, 0.65)  # away from the box
    few, many = (Square(threat, q, loss=loss)(model, x, y, generator=generator()) for q in (10, 60))
    held = is_correct(model(many), y)
    gain = LOSSES[loss](model(many), y) - LOSSES[loss](model(few), y)
    assert torch.all(gain[held] >= -1e-5) and gain[held].mean() > 0
    torch.testing.assert_close(threat.size(many - x), torch.full((len(x),), threat.eps), atol=1e-5, rtol=0)


def test_linf_images_are_made_of_corners_and_squares_of_the_announced_size():
    eps = 0.05
    x, y = torch.full((3, 2, 10, 10), 0.5), torch.tensor([0, 1, 2])
    seen = []

    def forward(inputs):
        seen.append(inputs.clone())
        # The loss rises with each query: every change is taken, no image is ever broken.
        return torch.nn.functional.one_hot(y, 3).float() * (1000 - len(seen))

    Square(Linf(eps), 30)(forward, x, y, generator=generator())
    stripes = (seen[0] - x)[:, :, :1].expand(-1, -1, 10, -1)
    torch.testing.assert_close(seen[0] - x, stripes)
    for query, (before, after) in enumerate(itertools.pairwise(seen)):
        torch.testing.assert_close((after - x).abs(), torch.full_like(x, eps))
        side = round(math.sqrt(share(query, 0.8) * 100))
        for image in (after != before).any(1):
            rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
            if len(rows):
                assert rows.max() - rows.min() < side and columns.max() - columns.min() < side
    assert len(seen) == 31
    places = torch.stack([(b != a).any(1).flatten(1).float() for a, b in itertools.pairwise(seen)])
    assert not torch.equal(places[:, 0], places[:, 1])  # each image has its own squares


def test_the_l2_pattern():
    for side in (1, 2, 3, 7, 8):
        tile = pattern(side)
        assert tile.shape == (side, side) and tile.norm() == pytest.approx(1)
    tile = pattern(7)
    upper, lower = tile[:3], tile[3:]
    assert upper.min() > 0 > lower.max()
    assert upper.argmax() == 1 * 7 + 3 and lower.argmin() == 2 * 7 + 3  # the pyramids' middles
    # One pyramid alone: 3 x 7 pixels, values by distance d: sum of 1 / k^2 for k from d + 1 to 4.
    values = [sum(1 / k**2 for k in range(d + 1, 5)) for d in range(4)]
    torch.testing.assert_close(upper[1, 3:] / upper[1, 3], torch.tensor(values, dtype=torch.float64) / values[0])


def test_windows_read_and_write_where_they_are():
    images = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6).float()
    windows = Windows(torch.tensor([0, 2]), torch.tensor([4, 1]), 2, 3)
    assert torch.equal(windows.read(images), torch.stack([images[0, :, 0:2, 4:6], images[1, :, 2:4, 1:3]]))
    windows.write(images, torch.full((2, 3, 2, 2), -1.0))
    assert (images < 0).sum() == 2 * 3 * 4 and images[1, 0, 3, 2] == -1
    windows.write(images, 0.5)
    assert images[0, 2, 1, 5] == 0.5


def test_corners_reach_every_place_and_tiles_cover_the_image():
    u = torch.rand(2000, generator=generator())
    assert corner(u, 4).unique().tolist() == [0, 1, 2, 3, 4] and corner(u, 0).unique().tolist() == [0]
    for height, width in ((32, 32), (28, 28), (5, 5), (3, 4), (9, 16)):
        side, corners = tiles(height, width)
        seen = torch.zeros(height, width)
        for top, left in corners:
            seen[top : top + side, left : left + side] += 1
        assert seen.max() == 1 and seen.sum() == len(corners) * side**2 and seen.mean() > 0.75


@pytest.mark.parametrize("threat", [Linf(0.3), L2(1.0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 5), (3, 7, 4)])
def test_images_of_any_size(threat, shape):
    x, y = torch.rand(6, *shape, generator=generator()), torch.arange(6) % 3
    weight = torch.randn(math.prod(shape), 3, generator=generator(1))
    x_adv = Square(threat, 30)(lambda inputs: inputs.flatten(1) @ weight, x, y, generator=generator())
    threat.check(x_adv, x)
    with pytest.raises(UserError, match=r"images \[n, c, h, w\]"):
        Square(threat, 3)(lambda inputs: inputs @ weight, x.flatten(1), y)
