import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.analysis.pictures import Filters, first_filters, input_gradients
from robustlayers.core.errors import UserError


def test_gradients_are_finite_differences_of_the_loss(net, batch):
    model, (x, y) = net("small-cnn", torch.float64), batch(5, dtype=torch.float64)
    x = 0.1 + 0.8 * x
    found = input_gradients(model, x, y, batch_size=2)
    model.eval()
    assert np.allclose(found.images, x)
    assert np.allclose(found.losses, functional.cross_entropy(model(x), y, reduction="none").detach(), atol=1e-5)
    assert np.array_equal(found.right, (model(x).argmax(1) == y).numpy())
    step = 1e-6 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(at):
        return functional.cross_entropy(model(at), y, reduction="none").detach().numpy()

    expected = (loss(x + step) - loss(x - step)) / 2
    assert np.allclose((found.gradients * step.numpy()).sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-11)


def test_gradients_leave_nothing_behind_and_count_images(net, batch, bits):
    model, (x, y) = net("resnet").train(), batch(4)
    values, seen = bits(model), []
    with torch.no_grad():
        found = input_gradients(model, (255 * x).byte(), y, batch_size=2, progress=lambda *s: seen.append(s))
    assert seen == [("gradients", 2, 4), ("gradients", 4, 4)] and found.gradients.any()
    assert bits(model) == values and all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not x.requires_grad
    rows = found.rows()
    flat = found.gradients.reshape(4, -1)
    assert rows[1]["gradient_l1"] == pytest.approx(np.abs(flat[1]).sum())
    assert rows[2]["gradient_linf"] == pytest.approx(np.abs(flat[2]).max())
    json.dumps(rows, allow_nan=False)
    axes = found.plot(most=3)
    assert len(axes.images) == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == ["image", "gradient"]


def test_first_filters_are_those_of_the_convolution_that_runs_first(net):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Conv2d(4, 2, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.late(self.early(x))

    model = Backwards()
    found = first_filters(model)
    assert found.layer == "early" and np.array_equal(found.weights, model.early.weight.detach())
    assert first_filters(model, "late").layer == "late"
    assert first_filters(net("resnet"), "conv & stage(2)").layer == "layer2.0.conv1"
    with pytest.raises(UserError, match="picks no convolution over images"):
        first_filters(net("resnet"), "linear")


def test_rows_of_filters_tell_means_from_differences():
    mean, edge = np.ones((1, 2, 2)), np.array([[[1.0, -1.0], [1.0, -1.0]]])
    filters = Filters("conv", np.stack([mean, edge, 0 * mean]))
    rows = filters.rows()
    assert [row["l2"] for row in rows] == [2.0, 2.0, 0.0]
    assert [row["mean_share"] for row in rows] == [1.0, 0.0, None]
    axes = filters.plot()
    assert len(axes.images) == 3
    assert np.allclose(axes.images[1].get_array()[:, :, 0], [[1, 0], [1, 0]])  # gray would be 0.5
