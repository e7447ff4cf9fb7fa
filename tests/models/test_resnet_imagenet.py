"""ResNet-18, 34 and 50: published counts, torchvision's names, both stems, and the paper's forward written again."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models


def counted(name, **options):
    with torch.device("meta"):
        model = models.build(name, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return sum(p.numel() for m in norms for p in m.parameters()), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "norm", "small", "imagenet"),
    [
        ("resnet18", 9_600, 11_173_962, 11_689_512),
        ("resnet34", 17_024, 21_282_122, 21_797_672),
        ("resnet50", 53_120, 23_520_842, 25_557_032),
    ],
)
def test_parameter_counts_are_the_published_ones(name, norm, small, imagenet):
    assert counted(name) == (norm, small)
    assert counted(name, stem="imagenet", classes=1000) == (norm, imagenet)


def torchvision_names(blocks, convolutions, projecting):
    """The names of a torchvision state dict, from its scheme."""
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{key}" for key in statistics)]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            path = f"layer{stage}.{block}"
            for index in range(1, convolutions + 1):
                names += [f"{path}.conv{index}.weight", *(f"{path}.bn{index}.{key}" for key in statistics)]
            if block == 0 and stage in projecting:
                names += [f"{path}.downsample.0.weight", *(f"{path}.downsample.1.{key}" for key in statistics)]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions", "projecting", "total"),
    [
        ("resnet18", (2, 2, 2, 2), 2, (2, 3, 4), 122),
        ("resnet34", (3, 4, 6, 3), 2, (2, 3, 4), 218),
        ("resnet50", (3, 4, 6, 3), 3, (1, 2, 3, 4), 320),
    ],
)
def test_a_state_dict_of_torchvision_fits_name_by_name(name, blocks, convolutions, projecting, total):
    expected = torchvision_names(blocks, convolutions, projecting)
    assert len(expected) == total
    with torch.device("meta"):
        model = models.build(name, stem="imagenet", classes=1000)
    assert [tensor for tensor in model.state_dict() if not tensor.startswith("normalize.")] == expected
    assert tuple(model.get_parameter("conv1.weight").shape) == (64, 3, 7, 7)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [28, 14, 7, 4]),
        ({"stem_stride": 2}, [14, 7, 4, 2]),
        ({"stem": "imagenet"}, [7, 4, 2, 1]),
        ({"stem": "imagenet", "stem_stride": 2}, [4, 2, 1, 1]),
    ],
)
def test_the_stem_decides_how_many_pixels_the_stages_see(options, sizes):
    model = models.build("resnet18", seed=0, width=4, channels=1, **options).eval()
    seen = []
    for stage in range(1, 5):
        layer = model.get_submodule(f"layer{stage}")
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    model(torch.rand(1, 1, 28, 28))
    assert seen == sizes


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("resnet18", {"stem": "cifar10"}, "stem: unknown stem 'cifar10'; nearest: cifar"),
        ("resnet18", {"depth": 18}, "depth: unknown option of model resnet18 'depth'"),
        ("resnet-18", {}, "name: unknown model 'resnet-18'; nearest: resnet18"),
    ],
)
def test_mistakes_name_what_is_nearest(name, options, problem):
    (fault,) = models.check(name, options)
    assert str(fault).startswith(problem)


@pytest.mark.parametrize(("name", "options"), [("resnet18", {"stem": "imagenet"}), ("resnet50", {})])
def test_the_network_computes_what_the_paper_says(name, options, reference):
    r = reference
    model = r.randomized(models.build(name, seed=0, width=4, mean=0.25, std=0.5, **options))
    state, x = model.state_dict(), r.images(size=32)
    y = (x - 0.25) / 0.5
    y = r.norm(state, "bn1", r.conv(state, "conv1", y, 2 if options else 1)).relu()
    if options:
        y = functional.max_pool2d(y, 3, 2, 1)
    last = 3 if name == "resnet50" else 2
    for stage, count in enumerate((3, 4, 6, 3) if last == 3 else (2, 2, 2, 2), start=1):
        for block in range(count):
            path, z = f"layer{stage}.{block}", y
            stride = 2 if stage > 1 and block == 0 else 1
            for index in range(1, last + 1):
                z = r.conv(state, f"{path}.conv{index}", z, stride if index == last - 1 else 1)
                z = r.norm(state, f"{path}.bn{index}", z)
                z = z if index == last else z.relu()
            if f"{path}.downsample.0.weight" in state:
                y = r.norm(state, f"{path}.downsample.1", r.conv(state, f"{path}.downsample.0", y, stride))
            y = (z + y).relu()
    torch.testing.assert_close(model(x), r.linear(state, "fc", y.mean((2, 3))), rtol=1e-3, atol=1e-4)
