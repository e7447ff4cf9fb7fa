import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.analysis._sheets import signed
from robustlayers.analysis.pictures import Filters, Perturbations, first_filters, input_gradients, perturbations
from robustlayers.attacks import FGSM, PGD, Linf, Threat
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
    bright, dark = np.moveaxis(np.asarray(axes.images[1].get_array()), 1, 0)
    assert (bright > dark)[:, 0].all() and (bright < dark)[:, 2].all()  # orange and blue; gray would be equal


def test_signed_values_keep_their_sign_in_every_channel():
    values = np.array([0.0, 1.0, -2.0, 9.0])
    one = signed(values.reshape(1, 1, 4), 2.0)[0]
    assert len({tuple(color) for color in one}) == 4 and np.ptp(one[0]) == 0  # zero is gray
    assert one[3].tolist() == signed(np.full((1, 1, 1), 2.0), 2.0)[0, 0].tolist()  # clipped to full color
    color = signed(np.stack([values, -values, 0 * values])[:, None], 2.0)[0]
    assert color.tolist() == [[0.5, 0.5, 0.5], [0.75, 0.25, 0.5], [0, 1, 0.5], [1, 0, 0.5]]
    assert np.ptp(signed(np.zeros((2, 3, 3)), 0.0)) == 0


def test_a_perturbation_of_one_step_is_the_sign_of_the_gradient(net, batch, bits):
    model, (x, y) = net("small-cnn").train(), batch(5)
    x = 0.2 + 0.6 * x
    before = bits(model)
    found = perturbations(model, x, y, FGSM(Linf(0.1)))
    gradients = input_gradients(model, x, y)
    assert bits(model) == before and all(module.training for module in model.modules())
    moved = np.abs(gradients.gradients) > 1e-9
    change = found.adversarial - found.images
    assert np.array_equal(np.sign(change)[moved], np.sign(gradients.gradients)[moved])
    assert found.reach == pytest.approx(0.1, abs=1e-6) and np.array_equal(found.images, x.numpy())
    assert np.allclose(found.losses, gradients.losses, atol=1e-6) and np.array_equal(found.right, gradients.right)
    model.eval()
    attacked = torch.from_numpy(found.adversarial)
    assert np.array_equal(found.right_attacked, (model(attacked).argmax(1) == y).numpy())
    rows = json.loads(json.dumps(found.rows(), allow_nan=False))
    assert [row["change_linf"] for row in rows] == pytest.approx([0.1] * 5, abs=1e-6)
    assert len(found.plot(most=3).images) == 9


def test_draws_of_perturbations_are_the_seed_s(net, batch):
    model, (x, y) = net("small-cnn"), batch(4)
    one, same, other = (perturbations(model, x, y, PGD(Linf(0.1), steps=1), seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.adversarial, same.adversarial) and not np.array_equal(one.adversarial, other.adversarial)


def test_an_attack_that_leaves_its_threat_is_told(net, batch):
    class Far:
        threat = Threat("linf", 0.01)

        def __call__(self, forward, x, y, *, generator):
            return (x + 0.1).clamp(0, 1)

    x, y = batch(2)
    with pytest.raises(UserError):
        perturbations(net("small-cnn"), x, y, Far())


def test_full_color_is_the_largest_change():
    images = np.full((2, 1, 1, 2), 0.5, dtype=np.float32)
    moved = images.copy()
    moved[0, 0, 0, 0] += 0.125
    moved[1, 0, 0, 1] -= 0.25
    flags, losses = np.array([True, False]), np.zeros(2)
    found = Perturbations(images, moved, flags, flags, losses, losses)
    one, two = found.maps()
    assert found.reach == 0.25
    assert np.allclose(two[0, 1], signed(np.full((1, 1, 1), -1.0), 1.0)) and not np.allclose(one[0, 0], two[0, 0])
    assert np.allclose(found.maps(0.125)[0][0, 0], signed(np.ones((1, 1, 1)), 1.0))
