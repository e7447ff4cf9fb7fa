import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.analysis.surface import loss_surface
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_point_is_the_loss_of_the_moved_and_clipped_image(net, batch):
    model, (x, y) = net("small-cnn", torch.float64), batch(1, dtype=torch.float64)
    u, v = torch.rand(2, 1, 1, 8, 8, generator=generator(), dtype=torch.float64)
    found = loss_surface(model, x, y, reach=0.6, points=5, directions=(u, v), batch_size=7)
    assert np.allclose(found.offsets, [-0.6, -0.3, 0, 0.3, 0.6]) and found.offsets[2] == 0
    model.eval()
    for i, b in enumerate(found.offsets):
        for j, a in enumerate(found.offsets):
            logits = model((x + a * u + b * v).clamp(0, 1)).detach()
            assert found.losses[i, j] == pytest.approx(float(functional.cross_entropy(logits, y)), abs=1e-5)
            assert found.right[i, j] == (int(logits.argmax()) == int(y))


def test_the_first_direction_is_the_sign_of_the_gradient_and_the_second_random_signs():
    """On a linear model the loss along the gradient's sign rises as fast as an l-infinity step can make it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    x, y = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([1])
    found = loss_surface(net, x, y, reach=0.1, points=3, generator=generator())
    weight = (net[1].weight[0] - net[1].weight[1]).detach()
    with torch.no_grad():
        logits = net(x)[0]
    margin = float(logits[0] - logits[1])
    expected = np.logaddexp(0, margin + found.offsets * float(weight.abs().sum()))
    assert np.allclose(found.losses[1], expected, atol=1e-5)
    assert found.names == ("along the sign of the gradient", "along random signs")
    assert (np.diff(found.losses[:, 1]) != 0).any()
    again = loss_surface(net, x, y, reach=0.1, points=3, generator=generator())
    other = loss_surface(net, x, y, reach=0.1, points=3, generator=generator(1))
    assert np.array_equal(again.losses, found.losses) and not np.array_equal(other.losses, found.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a generator, or both directions"),
        ({"points": 4}, "points: 4 is not allowed; allowed: an odd whole number"),
        ({"reach": 0}, "reach: 0 is not allowed"),
        ({"directions": (torch.ones(1, 1, 8, 8), torch.ones(8, 8))}, r"got \[8, 8\]"),
    ],
)
def test_mistakes_are_said(net, batch, options, message):
    x, y = batch(1)
    with pytest.raises(UserError, match=message):
        loss_surface(net("mlp"), x, y, **options)


def test_only_one_image_and_nothing_left_behind(net, batch, bits):
    model, (x, y) = net("small-cnn").train(), batch(2)
    with pytest.raises(UserError, match="one image"):
        loss_surface(model, x, y, generator=generator())
    values, seen = bits(model), []
    found = loss_surface(
        model, x[:1], y[:1], points=3, generator=generator(), batch_size=5, progress=lambda *s: seen.append(s)
    )
    assert seen == [("surface", 5, 9), ("surface", 9, 9)]
    assert bits(model) == values and all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    rows = found.rows()
    assert len(rows) == 9 and rows[4]["first"] == rows[4]["second"] == 0
    json.dumps(rows, allow_nan=False)


def test_the_plot_is_in_pixel_units(net, batch):
    x, y = batch(1)
    found = loss_surface(net("small-cnn"), x, y, reach="16/255", points=5, generator=generator())
    axes = found.plot()
    assert np.array_equal(axes.images[0].get_array(), found.losses)
    assert axes.images[0].get_extent() == pytest.approx([-20, 20, -20, 20])  # half a step beyond the last point
    assert "1/255" in axes.get_xlabel() and "nats" in axes.figure.axes[1].get_ylabel()


def test_surfaces_can_share_a_scale_and_show_what_is_allowed(net, batch):
    x, y = batch(1)
    found = loss_surface(net("small-cnn"), x, y, reach="16/255", points=5, generator=generator())
    axes = found.plot(highest=7.5, eps=8 / 255)
    assert axes.images[0].get_clim() == (0, 7.5)
    (ball,) = (points for points in (np.asarray(line.get_xydata()) for line in axes.lines) if len(points) == 5)
    assert np.allclose(np.abs(ball).sum(1), 8)
