import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.normalization import crafting_forward
from robustlayers.normalization.layers import WeightStandardizedConv2d, plain_convolutions, standardize_convolutions


def test_the_filters_are_what_batch_norm_makes_of_them(values):
    # Batch norm of [1, c_out, weights]: each filter is a channel. An oracle that is torch's own code.
    layer = WeightStandardizedConv2d(3, 4, 3, eps=1e-5).double()
    rows = layer.weight.flatten(1).unsqueeze(0)
    expected = functional.batch_norm(rows, None, None, training=True, eps=1e-5).view_as(layer.weight)
    torch.testing.assert_close(layer.standardized(), expected, rtol=1e-10, atol=1e-10)
    x = values(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), functional.conv2d(x, expected, layer.bias), rtol=1e-10, atol=1e-10)


def test_on_standardized_filters_it_is_a_convolution_with_every_setting_kept():
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular").double()
    model = standardize_convolutions(plain, eps=1e-30)
    assert isinstance(model, WeightStandardizedConv2d)
    with torch.no_grad():
        plain.weight.copy_(model.standardized())
    x = torch.rand(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)
    assert model.weight is plain.weight
    assert model.bias is plain.bias


def test_gradcheck_and_its_gradient_is_orthogonal_to_the_mean():
    layer = WeightStandardizedConv2d(2, 3, 2, bias=False).double()
    x = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight))
    (slope,) = torch.autograd.grad((layer(x) ** 3).sum(), layer.weight)
    assert slope.sum((1, 2, 3)).abs().max() < 1e-10
    assert slope.abs().max() > 1e-3


def test_a_constant_filter_stays_finite():
    layer = WeightStandardizedConv2d(1, 1, 3)
    nn.init.ones_(layer.weight)
    layer(torch.ones(1, 1, 3, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_a_model_is_built_with_them_and_crafts_by_them():
    model = models.build("resnet", seed=0, depth=8, width=4, norm="group-ws(groups=2)").eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(type(module) is WeightStandardizedConv2d for module in convolutions)
    assert {type(m) for m in model.modules() if "Norm" in type(m).__name__ and m is not model.normalize} == {
        nn.GroupNorm
    }
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(crafting_forward(model)(x), model(x), rtol=1e-5, atol=1e-5)
    twin = models.build("resnet", seed=0, depth=8, width=4, norm="group(groups=2)").eval()
    for name, tensor in twin.state_dict().items():  # the same start, so that the two are a paired comparison
        assert torch.equal(tensor, model.state_dict()[name])
    back = plain_convolutions(model)
    assert torch.equal(back(x), twin(x))


def test_a_convolution_used_twice_is_swapped_once_and_draws_move_nothing():
    shared = nn.Conv2d(2, 2, 1)
    before = torch.random.get_rng_state()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert standardize_convolutions(model) is model
    assert type(model[0]) is WeightStandardizedConv2d
    assert model[0] is model[2]
    assert torch.equal(before, torch.random.get_rng_state())
    assert isinstance(standardize_convolutions(nn.Conv2d(1, 1, 1)), WeightStandardizedConv2d)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="eps: 0 is not allowed; it must be positive"):
        standardize_convolutions(nn.Conv2d(1, 1, 1), eps=0)
