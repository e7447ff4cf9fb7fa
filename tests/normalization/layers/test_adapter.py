import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.normalization import inference
from robustlayers.normalization.layers import AdapterNorm, ScaleShift
from robustlayers.selection import select


def test_at_the_beginning_it_is_the_norm_layer_and_its_base_stays_it_bit_for_bit(values):
    norm = nn.BatchNorm2d(3).double()
    norm(values(4, 3, 2, 2))
    norm.eval()
    x = values(4, 3, 2, 2, seed=1)
    expected = norm(x)
    layer = AdapterNorm(norm)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        layer.adapter.weight.uniform_(0.5, 2)
        layer.adapter.bias.normal_()
    assert not torch.equal(layer(x), expected)
    layer.branch = "base"
    assert torch.equal(layer(x), expected)


def test_the_scale_and_shift_are_torchs(same_as_torch):
    # Over a norm without affine part, the adapter is batch norm's scale and shift.
    layer = AdapterNorm(nn.BatchNorm2d(3, affine=False))
    buffers = {f"norm.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")}
    same_as_torch(layer, nn.BatchNorm2d(3), 4, 3, 2, 2, buffers=buffers)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)])
def test_one_layer_of_both_is_the_same_function(norm, values):
    layer = AdapterNorm(norm).double()
    layer(values(4, 4, 2, 2))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
    layer.eval()
    x = values(4, 4, 2, 2, seed=1)
    one = layer.plain()
    assert type(one) is type(norm)
    torch.testing.assert_close(one(x), layer(x), rtol=1e-10, atol=1e-10)


def test_only_the_adapter_can_be_trained(bits, values):
    layer = AdapterNorm(nn.BatchNorm2d(3))
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))
    assert select(model, "type(ScaleShift)") == ["0.adapter.weight", "0.adapter.bias"]
    before = bits(layer.norm)
    optimizer = torch.optim.SGD(layer.adapter.parameters(), lr=0.1)
    with inference(model):
        model(values(4, 3, 2, 2).float()).pow(2).sum().backward()
    optimizer.step()
    assert bits(layer.norm) == before
    assert not torch.equal(layer.adapter.weight, torch.ones(3))


def test_scale_and_shift_in_half_precision_and_wrong_shapes(values):
    layer = ScaleShift(3)
    assert layer(values(2, 3).bfloat16()).dtype == torch.bfloat16
    assert layer.double()(values(2, 3, 4)).dtype == torch.float64
    with pytest.raises(UserError, match=r"ScaleShift: input of shape \[2, 4\]"):
        layer(torch.zeros(2, 4))
    adapter = AdapterNorm(nn.BatchNorm2d(3))
    adapter.branch = "bas"
    with pytest.raises(UserError, match="unknown branch of AdapterNorm 'bas'; nearest: base"):
        adapter(torch.zeros(2, 3, 2, 2))
