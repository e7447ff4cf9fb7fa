import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.analysis.amplification import amplification
from robustlayers.analysis.signal import signal_ratio
from robustlayers.core.errors import UserError
from robustlayers.normalization.layers.dual import DualBatchNorm


def test_the_factor_is_the_slope_of_the_layer(net):
    model = net("resnet")
    with torch.no_grad():
        model.bn1.weight.neg_()
    found = amplification(model)
    assert found.layers[:3] == ("bn1", "layer1.0.bn1", "layer1.0.bn2")
    assert found.layers.index("layer2.0.bn2") < found.layers.index("layer2.0.shortcut.1")
    model.eval()
    for name, values in zip(found.layers, found.values, strict=True):
        layer, at = model.get_submodule(name), torch.randn(1, len(values), 1, 1)
        slope = (layer(at + 1) - layer(at)).detach().flatten().abs()
        assert np.allclose(values, slope, atol=1e-5)
    assert not found.left_out


def test_it_is_the_step_in_the_perturbation_of_one_channel():
    """PSR of channels without a mean: the norm layer changes the perturbation by exactly this factor."""
    layer = nn.BatchNorm2d(2, eps=0).double()
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.rand(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(2, 2, 1), layer).double()
    channels = signal_ratio(net, x, {"d": x * 0.9}).channels["d"]
    assert channels[1].shape == (3, 2)
    assert amplification(net).values[0].tolist() == [0.5, 2.0]


def test_a_selector_picks_layers_and_rows_have_quantiles(net):
    model = net("resnet")
    found = amplification(model, "norm.weight & stage(2)")
    assert all(name.startswith("layer2") for name in found.layers) and len(found.layers) == 3
    row = found.rows()[0]
    assert row["channels"] == len(found.values[0]) and row["q50"] == pytest.approx(np.median(found.values[0]))
    assert row["max"] == found.values[0].max()
    axes = found.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found.layers)


def test_layers_without_running_statistics_are_left_out_by_name(net):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False))
    found = amplification(model)
    assert (found.layers, found.left_out) == (("1", "3"), ("2",))
    with pytest.raises(UserError, match="picks no norm layer with running statistics"):
        amplification(model, "linear")


def test_of_a_layer_with_branches_the_one_in_use_counts():
    dual = DualBatchNorm(nn.BatchNorm2d(2))
    model = nn.Sequential(nn.Conv2d(1, 2, 1), dual)
    one, other = dual.branches
    with torch.no_grad():
        for branch, scale in ((one, 2.0), (other, 3.0)):
            dual.branch = branch
            dual.plain().weight.fill_(scale)
    for branch, scale in ((one, 2.0), (other, 3.0)):
        dual.branch = branch
        found = amplification(model)
        assert found.layers == ("1",) and np.allclose(found.values[0], scale, rtol=1e-4)
