"""VGG: published counts, runs between poolings, odd sizes, and the forward written again from the paper's table."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models

TABLE = {  # table 1 of the paper, columns A and D; "M" is a max pooling
    11: [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    16: [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
}


@pytest.mark.parametrize(
    ("options", "norm", "total"),
    [
        ({"depth": 11}, 5_504, 9_231_114),
        ({"depth": 16}, 8_448, 14_728_266),
        ({"depth": 16, "norm": "none"}, 0, 14_719_818),
        ({"depth": 19}, 11_008, 20_040_522),
    ],
)
def test_parameter_counts_are_those_of_the_network_in_circulation(options, norm, total):
    with torch.device("meta"):
        model = models.build("vgg", **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(p.numel() for m in norms for p in m.parameters()) == norm
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("depth", TABLE)
def test_convolutions_follow_the_table_of_the_paper(depth):
    with torch.device("meta"):
        model = models.build("vgg", depth=depth)
    rows = []
    for part in ("stem", "layer1", "layer2", "layer3", "layer4"):
        rows += [m.out_channels for m in model.get_submodule(part).modules() if isinstance(m, nn.Conv2d)] + ["M"]
    assert rows == TABLE[depth]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_network_computes_what_the_paper_says(norm, reference):
    r = reference
    model = r.randomized(models.build("vgg", seed=0, depth=16, width=4, norm=norm))
    state, x = model.state_dict(), r.images(size=32)
    y = (x - 0.5) / 0.5
    place = [0, 0]
    for entry in TABLE[16]:
        if entry == "M":
            y, place = functional.max_pool2d(y, 2), [place[0] + 1, 0]
            continue
        path = f"layer{place[0]}.{place[1]}" if place[0] else f"stem.{place[1]}"
        y = r.conv(state, f"{path}.conv1", y)
        y = (r.norm(state, f"{path}.bn1", y) if norm == "batch" else y).relu()
        place[1] += 1
    assert y.shape[2:] == (1, 1)
    torch.testing.assert_close(model(x), r.linear(state, "linear", y.flatten(1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "stride", "left"), [(28, 1, 1), (32, 1, 1), (28, 2, 1), (8, 4, 1), (64, 1, 2)])
def test_images_of_any_size_pass_five_poolings(size, stride, left):
    model = models.build("vgg", seed=0, depth=11, width=2, channels=1, stem_stride=stride).eval()
    y = model.get_submodule("normalize")(torch.rand(1, 1, size, size))
    for part in ("stem", "layer1", "layer2", "layer3", "layer4"):
        y = functional.max_pool2d(model.get_submodule(part)(y), 2, ceil_mode=True)
    assert y.shape[2:] == (left, left)
    assert model(torch.rand(1, 1, size, size)).shape == (1, 10)


def test_depths_that_are_not_in_the_paper_are_refused():
    (fault,) = models.check("vgg", {"depth": 17})
    assert str(fault) == "depth: 17 is not allowed; nearest: 16; allowed: 11, 13, 16, 19"
