import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.normalization import inference, normalizing
from robustlayers.normalization.layers import RobustNorm


def formula(x, mean, spread, power=0.2, eps=1e-5):
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) / (spread.view(shape) ** power + eps)


def batch_of(x):
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.max(1).values - rows.min(1).values


def test_training_normalizes_by_mean_and_range_of_the_batch(values):
    x = values(4, 3, 2, 2)
    for tracked in ("none", "mean", "both"):
        torch.testing.assert_close(RobustNorm(3, tracked=tracked).double()(x), formula(x, *batch_of(x)))


def test_statistics_follow_the_rule_of_torchs_batch_norm(values):
    for momentum in (0.1, 0.3, None):
        layer = RobustNorm(3, tracked="both", momentum=momentum).double()
        reference = nn.BatchNorm2d(3, momentum=momentum).double()
        ranges = torch.ones(3, dtype=torch.float64)
        for step in range(3):
            x = values(4, 3, 2, 2, seed=step)
            layer(x)
            reference(x)
            share = 1 / (step + 1) if momentum is None else momentum
            ranges = (1 - share) * ranges + share * batch_of(x)[1]
        torch.testing.assert_close(layer.get_buffer("running_mean"), reference.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.get_buffer("running_range"), ranges, rtol=1e-10, atol=1e-10)
        assert int(layer.get_buffer("num_batches_tracked")) == 3
        layer.reset_running_stats()
        assert [float(layer.get_buffer(name).sum()) for name in ("running_mean", "running_range")] == [0, 3]


def test_at_test_each_variant_takes_what_its_name_says(values):
    x, other = values(4, 3, 2, 2), values(4, 3, 2, 2, seed=1)
    made = {}
    for tracked in ("none", "mean", "both"):
        layer = RobustNorm(3, tracked=tracked, momentum=None).double()
        layer(other)
        made[tracked] = layer.eval()(x)
    (mean, spread), (old_mean, old_spread) = batch_of(x), batch_of(other)
    torch.testing.assert_close(made["none"], formula(x, mean, spread))
    torch.testing.assert_close(made["mean"], formula(x, old_mean, spread))
    torch.testing.assert_close(made["both"], formula(x, old_mean, old_spread))


@pytest.mark.parametrize("tracked", ["none", "mean", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(tracked, training, values):
    layer = RobustNorm(2, tracked=tracked, power=0.7).double()
    layer(values(3, 2, 2, 2))
    layer.train(training)
    assert layer.weight is not None and layer.bias is not None

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    x = values(3, 2, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_a_constant_channel_gives_its_shift_and_no_infinite_gradient():
    layer = RobustNorm(2)
    x = torch.stack([torch.full((4, 2, 2), 0.1), torch.rand(4, 2, 2)], 1).requires_grad_()
    y = layer(x)
    assert y[:, 0].abs().max() < 1e-6
    (slope,) = torch.autograd.grad((y * torch.rand(y.shape)).sum(), x)
    assert slope.abs().max() < 100


def test_contexts_decide_what_moves(values):
    layer = RobustNorm(3, tracked="both").double()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = values(4, 3, 2, 2)
    with normalizing(layer, {layer: ("batch", False)}, training=True):
        by_batch = layer(x)
    with inference(layer):
        by_running = layer(x)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(by_batch, formula(x, *batch_of(x)))
    torch.testing.assert_close(by_running, formula(x, torch.zeros(3), torch.ones(3)))
    with normalizing(layer, {layer: ("batch", True)}, training=True):
        layer(x)
    assert int(layer.get_buffer("num_batches_tracked")) == 1


def test_state_dict_half_precision_and_no_affine(values):
    source, target = RobustNorm(3, tracked="both"), RobustNorm(3, tracked="both")
    source(values(4, 3, 2, 2).float())
    target.load_state_dict(source.state_dict())
    x = values(4, 3, 2, 2).float()
    assert torch.equal(source.eval()(x), target.eval()(x))
    half = source(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), source(x), rtol=0.05, atol=0.05)
    assert not list(RobustNorm(3, affine=False).parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tracked": "both of them"}, "unknown tracked statistics 'both of them'"),
        ({"power": 0}, "power and eps must be positive"),
        ({"eps": "x"}, "eps: 'x' is not a number"),
    ],
)
def test_settings_that_are_wrong_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RobustNorm(3, **settings)


def test_inputs_that_are_wrong_are_refused():
    with pytest.raises(UserError, match=r"it takes \[n, 3, ...\]"):
        RobustNorm(3)(torch.zeros(2, 4))
    with pytest.raises(UserError, match="one value per channel"):
        RobustNorm(3)(torch.zeros(1, 3, 1, 1))
    assert RobustNorm(3, tracked="both").eval()(torch.zeros(1, 3)).shape == (1, 3)
