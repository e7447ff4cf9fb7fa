"""Normalizer-free ResNets: the standardized weights, the variance they promise, and the forward written again."""

import math

import pytest
import torch
from torch.nn import functional

from robustlayers import models
from robustlayers.models.nf import GAMMA_RELU, NFBlock, ScaledStdConv2d


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(weight, gain, gamma):
    """The formula of Brock et al. 2021, one output channel after another."""
    rows = []
    for row, factor in zip(weight, gain.flatten(), strict=True):
        values = row.flatten()
        mean = values.sum() / len(values)
        var = ((values - mean) ** 2).sum() / len(values)
        rows.append(factor * gamma * (row - mean) / math.sqrt(len(values)) / (var + 1e-6) ** 0.5)
    return torch.stack(rows)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (7, 2)])
def test_a_convolution_uses_the_weights_of_the_formula(kernel, stride):
    layer = ScaledStdConv2d(5, 4, kernel, stride=stride, gamma=1.5).double()
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator(), dtype=torch.float64))
    expected = by_hand(layer.weight, layer.gain, 1.5)
    torch.testing.assert_close(layer.standardized(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 5, 9, 9, generator=generator(1), dtype=torch.float64)
    direct = functional.conv2d(x, expected, layer.bias, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(layer(x), direct, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    layer = ScaledStdConv2d(2, 3, 3, gamma=GAMMA_RELU).double()
    inputs = [torch.randn(2, 2, 4, 4, generator=generator(), dtype=torch.float64)]
    inputs += [torch.randn(tensor.shape, generator=generator(), dtype=torch.float64) for tensor in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert sorted(names) == ["bias", "gain", "weight"]
    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in inputs])


def test_scale_and_mean_of_the_weights_do_not_matter():
    layer = ScaledStdConv2d(8, 4, 3).double()
    before = layer.standardized().detach()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.5)
    torch.testing.assert_close(layer.standardized(), before, rtol=1e-3, atol=0)  # eps is all that is left


def test_gamma_is_one_over_the_deviation_of_a_rectified_normal():
    z = torch.randn(1_000_000, generator=generator()).relu()
    assert pytest.approx(1 / z.std().item(), rel=2e-3) == GAMMA_RELU


@pytest.mark.parametrize(("depth", "width"), [(18, 64), (34, 32), (50, 32)])
def test_at_the_start_the_residual_stream_has_the_variance_that_is_expected(depth, width):
    model = models.build("nf-resnet", seed=0, depth=depth, width=width, last_gain=1, alpha=0.5, std=12**-0.5).eval()
    expected = model.get_submodule("layer1.0").expected_variance
    assert expected == 1.25
    found = {}

    def watch(name, block):
        def hook(module, args, output):
            # The rim sees zeros of the padding; what lies inside is what the derivation is about.
            found[name] = (output[:, :, 1:-1, 1:-1].var((0, 2, 3)).mean().item(), block.expected_variance)

        block.register_forward_hook(hook)

    for name, block in model.named_modules():
        if isinstance(block, NFBlock):
            watch(name, block)
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64, generator=generator(depth)))
    assert len(found) == {18: 8, 34: 16, 50: 16}[depth]
    for name, (variance, promised) in found.items():
        assert variance == pytest.approx(promised, rel=0.2), name


def test_expected_variances_grow_by_alpha_squared_and_start_again_where_the_shape_changes():
    model = models.build("nf-resnet", seed=0, depth=34, width=4, alpha="1/2")
    variances = {name: block.expected_variance for name, block in model.named_modules() if isinstance(block, NFBlock)}
    assert variances == model.expected_variances()  # pyright: ignore[reportCallIssue]
    for stage, count in enumerate((3, 4, 6, 3), start=1):
        assert [variances[f"layer{stage}.{i}"] for i in range(count)] == [1.25 + 0.25 * i for i in range(count)]
    betas = [model.get_submodule(f"layer{stage}.0").beta for stage in (1, 2, 3, 4)]
    assert betas == pytest.approx([1, 1.75**-0.5, 2**-0.5, 2.5**-0.5])


def test_there_is_no_norm_layer_and_gain_and_bias_are_as_many_as_scale_and_shift():
    with torch.device("meta"):
        free, normal = models.build("nf-resnet"), models.build("resnet18")
    assert not any(
        "norm" in type(module).__name__.lower() for name, module in free.named_modules() if name != "normalize"
    )
    ends = {name.rpartition(".")[2] for name in free.state_dict() if not name.startswith("normalize.")}
    assert ends == {"weight", "bias", "gain"}
    assert sum(p.numel() for p in free.parameters()) == sum(p.numel() for p in normal.parameters()) == 11_173_962
    assert "norm" not in models.options_of("nf-resnet")


def test_each_image_is_for_itself_and_training_is_evaluation():
    model = models.build("nf-resnet", seed=0, width=4, last_gain=1)
    x = torch.rand(3, 3, 32, 32, generator=generator())
    together = model.train()(x)
    torch.testing.assert_close(torch.cat([model.eval()(image[None]) for image in x]), together)


def test_a_last_gain_of_zero_makes_every_block_its_shortcut():
    model = models.build("nf-resnet", seed=0, width=4, last_gain=0)
    x = torch.rand(1, 4, 8, 8, generator=generator())
    assert torch.equal(model.get_submodule("layer1.0")(x), x)
    assert not model.get_parameter("layer1.0.conv2.gain").any()
    assert (model.get_parameter("layer1.0.conv1.gain") == 1).all()
    assert (models.build("nf-resnet", seed=0, width=4).get_parameter("layer1.0.conv2.gain") == 1).all()


@pytest.mark.parametrize(("depth", "kernels"), [(18, (3, 3)), (26, (1, 3, 1))])
def test_the_network_computes_what_the_paper_says(depth, kernels, reference):
    model = reference.randomized(
        models.build("nf-resnet", seed=0, depth=depth, width=4, stem="imagenet", last_gain=1, alpha=0.3)
    )
    state, x = model.state_dict(), reference.images(size=32)

    def conv(path, y, stride=1, gamma=GAMMA_RELU):
        weight = by_hand(state[f"{path}.weight"], state[f"{path}.gain"], gamma)
        padding = weight.shape[-1] // 2
        return functional.conv2d(y, weight, state[f"{path}.bias"], stride=stride, padding=padding)

    y = functional.max_pool2d(conv("conv1", (x - 0.5) / 0.5, 2, 1.0), 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            path, beta = f"layer{stage}.{block}", 1 / 1.09**0.5
            if block == 0:  # 1 behind the stem, and 1 + 2 * 0.09 where a stage of two blocks ends
                beta = 1.0 if stage == 1 else 1 / 1.18**0.5
            active = (beta * y).relu()
            stride, z = (2 if stage > 1 and block == 0 else 1), active
            for index, kernel in enumerate(kernels, start=1):
                moves = kernel == 3 and 3 not in kernels[: index - 1]
                z = conv(f"{path}.conv{index}", z if index == 1 else z.relu(), stride if moves else 1)
            y = 0.3 * z + (conv(f"{path}.shortcut", active, stride) if f"{path}.shortcut.gain" in state else y)
    expected = reference.linear(state, "linear", y.relu().mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alpha": 0}, "alpha: 0 is not allowed; it must be positive"),
        ({"alpha": "big"}, "alpha: value: 'big' is not a number; write 0.03 or 8/255"),
        ({"last_gain": 2}, "last_gain: 2 is not allowed; nearest: 1; allowed: 0, 1"),
        ({"depth": 20}, "depth: 20 is not allowed; nearest: 18; allowed: 18, 26, 34, 50"),
        ({"norm": "batch"}, "norm: unknown option of model nf-resnet 'norm'"),
    ],
)
def test_mistakes_say_what_is_allowed(options, problem):
    (fault,) = models.check("nf-resnet", options)
    assert str(fault).startswith(problem)


@pytest.mark.parametrize("last_gain", [0, 1])
def test_it_learns(last_gain):
    model = models.build("nf-resnet", seed=0, width=8, channels=1, classes=2, stem_stride=2, last_gain=last_gain)
    x, y = torch.rand(32, 1, 16, 16, generator=generator()), torch.arange(32) % 2
    x[y == 1, :, 4:8] += 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 < 0.6 < losses[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
