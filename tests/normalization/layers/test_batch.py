import pytest
import torch
from torch import nn

from robustlayers.models.norms import make_norm


@pytest.mark.parametrize(
    ("norm", "reference"),
    [
        ("batch", lambda: nn.BatchNorm2d(3)),
        ("batch-no-affine", lambda: nn.BatchNorm2d(3, affine=False)),
        ("batch-at-test", lambda: nn.BatchNorm2d(3, track_running_stats=False)),
        ("instance", lambda: nn.InstanceNorm2d(3, affine=True)),
        ("layer", lambda: nn.GroupNorm(1, 3)),
        ("group(groups=3)", lambda: nn.GroupNorm(1, 3)),
    ],
)
def test_kinds_that_torch_has_are_torchs(norm, reference, same_as_torch):
    ours, theirs = make_norm(norm, 3), reference()
    assert type(ours) is type(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    same_as_torch(ours, theirs, 4, 3, 2, 2, buffers={name: name for name, _ in theirs.named_buffers()})


def test_batch_at_test_normalizes_by_the_batch_in_evaluation(values):
    layer = make_norm("batch-at-test", 3).double().eval()
    y = layer(values(8, 3, 4, 4))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert not list(layer.buffers())


def test_layer_norm_is_torchs_over_channels_and_pixels(values):
    x = values(4, 3, 2, 2)
    torch.testing.assert_close(make_norm("layer", 3).double()(x), nn.LayerNorm([3, 2, 2]).double()(x))
