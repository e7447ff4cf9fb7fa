"""MLPs: the forward written again, counts in closed form, norm layers on units, and images of another size."""

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_network_computes_what_it_says(norm, reference):
    r = reference
    model = r.randomized(models.build("mlp", seed=0, hidden=3, width=16, size=8, norm=norm))
    state, x = model.state_dict(), r.images(size=8)
    y = ((x - 0.5) / 0.5).flatten(1)
    for path in ("stem", "layer1.0", "layer1.1"):
        if norm == "batch":
            y = r.norm(state, f"{path}.bn1", y @ state[f"{path}.fc1.weight"].T).relu()
        else:
            y = r.linear(state, f"{path}.fc1", y).relu()
    torch.testing.assert_close(model(x), r.linear(state, "linear", y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hidden", "width", "channels", "size"), [(2, 16, 1, 28), (5, 32, 3, 8)])
def test_parameter_counts_have_a_closed_form(hidden, width, channels, size):
    inputs = channels * size * size
    total = {}
    for norm in ("batch", "none"):
        model = models.build("mlp", seed=0, hidden=hidden, width=width, channels=channels, size=size, norm=norm)
        total[norm] = sum(parameter.numel() for parameter in model.parameters())
        assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (hidden * (norm == "batch"))
    weights = inputs * width + (hidden - 1) * width**2 + width * 10 + 10
    assert total == {"batch": weights + 2 * hidden * width, "none": weights + hidden * width}


def test_batch_norm_of_units_is_that_of_one_dimension():
    model = models.build("mlp", seed=0, hidden=2, width=16, size=8)
    stem, plain = model.get_submodule("stem"), nn.BatchNorm1d(16)
    x = torch.rand(8, 192, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stem(x), plain(stem.get_submodule("fc1")(x)).relu())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(stem.get_submodule("bn1").state_dict()[name], value)


def test_hidden_layers_start_as_kaiming_says_and_signals_survive_depth():
    model = models.build("mlp", seed=0, hidden=40, width=128, size=8, norm="none", std=12**-0.5).eval()
    weights = [model.get_parameter(f"layer1.{index}.fc1.weight") for index in range(39)]
    assert all(weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05) for weight in weights)
    seen = []
    model.get_submodule("layer1").register_forward_hook(
        lambda module, args, output: seen.append(output.square().mean())
    )
    model(torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0.05 < seen[0] < 20  # the default of torch leaves less than 1e-20


@pytest.mark.parametrize(("size", "text"), [(28, "28x28 pixels; this mlp takes 32x32 (option `size`)")])
def test_images_of_another_size_are_refused(size, text):
    with pytest.raises(UserError) as error:
        models.build("mlp", seed=0, width=4)(torch.zeros(2, 3, size, size))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"norm": "instance"},
            "norm: instance averages over the pixels of a channel; the units of an mlp have none",
        ),
        ({"norm": "random"}, "norm: random averages over the pixels of a channel"),
        ({"norm": "bach"}, "norm: unknown norm 'bach'; nearest: batch"),
        ({"hidden": 1}, "hidden: 1 is not allowed; nearest: 2; allowed: at least 2"),
        ({"stem_stride": 2}, "stem_stride: unknown option of model mlp 'stem_stride'"),
    ],
)
def test_mistakes_say_what_is_allowed(options, problem):
    (fault,) = models.check("mlp", options)
    assert str(fault).startswith(problem)


def test_a_random_norm_without_instance_norm_is_fine():
    assert models.check("mlp", {"norm": {"name": "random", "kinds": "batch+layer"}}) == []
