import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.normalization.layers import JointBatchNorm

STATE = {name: name for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", ["both", "clean", "adversarial"])
def test_a_single_batch_sees_torchs_batch_norm(statistics, momentum, same_as_torch):
    ours = JointBatchNorm(3, momentum=momentum, statistics=statistics)
    same_as_torch(ours, nn.BatchNorm2d(3, momentum=momentum), 4, 3, 2, 2, buffers=STATE)


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
def test_the_other_settings_of_torchs_layer(settings, same_as_torch):
    ours = JointBatchNorm(3, statistics="clean", **settings)
    ours.branch = "joint"
    theirs = nn.BatchNorm2d(3, **settings)

    # Both halves the same: whichever half normalizes, it is batch norm of one half, twice.
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = theirs

        def forward(self, x):
            first = self.norm(x.chunk(2)[0])
            return torch.cat([first, first])

    names = [name for name, _ in theirs.named_buffers()]
    same_as_torch(
        ours, Twice(), 4, 3, 2, 2, buffers={name: f"norm.{name}" for name in names}, feed=lambda x: torch.cat([x, x])
    )


def test_cat_is_batch_norm_of_the_joint_batch(same_as_torch):
    ours = JointBatchNorm(3, statistics="both")
    ours.branch = "joint"
    same_as_torch(ours, nn.BatchNorm2d(3), 4, 3, 2, 2, buffers=STATE)


@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
def test_one_half_normalizes_both(statistics, values):
    clean, adversarial = values(4, 3, 2, 2), values(4, 3, 2, 2, seed=1) * 3 + 1
    layer = JointBatchNorm(3, statistics=statistics).double()
    layer.branch = "joint"
    y = layer(torch.cat([clean, adversarial]))
    source = clean if statistics == "clean" else adversarial
    variance, mean = torch.var_mean(source, (0, 2, 3), correction=0, keepdim=True)
    expected = (torch.cat([clean, adversarial]) - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
def test_what_is_tracked_is_the_variance_of_that_half_and_eps_is_in_the_root(statistics, values):
    # A published layer tracks a standard deviation from 0 and leaves eps out: it disagrees with torch's evaluation.
    layer = JointBatchNorm(3, statistics=statistics).double()
    reference = nn.BatchNorm2d(3).double()
    assert layer.get_buffer("running_var").tolist() == [1, 1, 1]
    layer.branch = "joint"
    for step in range(3):
        named = values(4, 3, 2, 2, seed=step) * 4
        layer(torch.cat([named, named * 10] if statistics == "clean" else [named * 10, named]))
        reference(named)
    for name in STATE:
        torch.testing.assert_close(layer.get_buffer(name), reference.get_buffer(name), rtol=1e-10, atol=1e-10)
    x = values(4, 3, 2, 2, seed=9)
    for branch in layer.branches:
        layer.branch = branch
        torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-10, atol=1e-10)
    constant = torch.full((4, 3, 2, 2), 5.0, dtype=torch.float64)
    assert layer.train()(constant).isfinite().all()


@pytest.mark.parametrize("statistics", ["both", "clean", "adversarial"])
def test_gradcheck_through_the_statistics_of_the_other_half(statistics, values):
    layer = JointBatchNorm(2, statistics=statistics, track_running_stats=False).double()
    layer.branch = "joint"

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    x = values(4, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_mistakes_are_told():
    layer = JointBatchNorm(2, statistics="clean")
    layer.branch = "joint"
    with pytest.raises(UserError, match="as many adversarial as clean images; this has 3"):
        layer(torch.rand(3, 2))
    layer.branch = "joined"
    with pytest.raises(UserError, match="unknown branch of JointBatchNorm 'joined'; nearest: joint"):
        layer(torch.rand(4, 2))
    with pytest.raises(UserError, match="unknown statistics of a joint batch 'cleen'; nearest: clean"):
        JointBatchNorm(2, statistics="cleen")
    with pytest.raises(UserError, match=r"it takes \[n, 2, ...\]"):
        JointBatchNorm(2)(torch.rand(3, 3))


def test_bfloat16(values):
    layer = JointBatchNorm(3, statistics="adversarial")
    layer.branch = "joint"
    x = values(8, 3, 2, 2).float()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
