"""Fixup: identity and zero logits at the start, the scaling rule, the scalars, and the forward written again."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.models.fixup import FixupBlock, Scale, Shift
from robustlayers.selection import select


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_at_the_start_blocks_are_the_identity_and_logits_zero():
    model = models.build("fixup-resnet", seed=0, depth=20, width=8)
    x = torch.rand(2, 8, 8, 8, generator=generator())
    assert torch.equal(model.get_submodule("layer1.1")(x), x)
    down = model.get_submodule("layer2.0")(x)
    assert torch.equal(down[:, 4:12], x[:, :, ::2, ::2])
    assert not down[:, :4].any() and not down[:, 12:].any()
    assert not model(torch.rand(2, 3, 32, 32, generator=generator())).any()


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_the_first_convolution_of_a_branch_is_scaled_by_the_number_of_branches(depth):
    model = models.build("fixup-resnet", seed=0, depth=depth, width=32)
    branches = (depth - 2) // 2
    for block in (module for module in model.modules() if isinstance(module, FixupBlock)):
        kaiming = (2 / (9 * block.conv1.out_channels)) ** 0.5
        assert block.conv1.weight.std().item() == pytest.approx(kaiming * branches**-0.5, rel=0.05)
        assert not block.conv2.weight.any()
    stem = model.get_parameter("conv1.weight")
    assert stem.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_the_scalars_are_five_for_each_block_and_two(depth):
    with torch.device("meta"):
        model = models.build("fixup-resnet", depth=depth)
        normal = models.build("resnet", depth=depth)
    norm = sum(p.numel() for m in normal.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    scalars = 5 * (depth - 2) // 2 + 2
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in normal.parameters()) - norm + scalars
    owned = [p for m in model.modules() if isinstance(m, Shift | Scale) for p in m.parameters()]
    assert len(owned) == scalars
    assert all(parameter.shape == (1,) for parameter in owned)


def test_a_selector_picks_the_scalars():
    model = models.build("fixup-resnet", seed=0, depth=8, width=4)
    found = select(model, "type(Shift) | type(Scale)")
    block = ["bias1a.bias", "bias1b.bias", "bias2a.bias", "scale.weight", "bias2b.bias"]
    assert sorted(found) == sorted(
        ["bias1.bias", "bias2.bias", *(f"layer{stage}.0.{name}" for stage in (1, 2, 3) for name in block)]
    )
    assert select(model, "head") == ["bias2.bias", "linear.weight", "linear.bias"]


def test_the_network_computes_what_the_paper_says():
    model = models.build("fixup-resnet", seed=0, depth=14, width=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel())))
    state, x = model.state_dict(), torch.rand(2, 3, 16, 16, generator=generator())

    def conv(path, y, stride=1):
        return functional.conv2d(y, state[f"{path}.weight"], stride=stride, padding=1)

    y = (conv("conv1", (x - 0.5) / 0.5) + state["bias1.bias"]).relu()
    for stage in (1, 2, 3):
        for block in (0, 1):
            path, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            a, b, c, d = (state[f"{path}.bias{name}.bias"] for name in ("1a", "1b", "2a", "2b"))
            z = (conv(f"{path}.conv1", y + a, stride) + b).relu()
            z = conv(f"{path}.conv2", z + c) * state[f"{path}.scale.weight"] + d
            if stride == 2:
                zeros = torch.zeros(2, y.shape[1] // 2, *z.shape[2:])
                y = torch.cat([zeros, (y + a)[:, :, ::2, ::2], zeros], 1)
            y = (z + y).relu()
    expected = (y.mean((2, 3)) + state["bias2.bias"]) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_each_image_is_for_itself_and_it_learns():
    model = models.build("fixup-resnet", seed=0, depth=8, width=8, channels=1, classes=2)
    x, y = torch.rand(32, 1, 14, 14, generator=generator()), torch.arange(32) % 2
    x[y == 1, :, 4:8] += 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(35):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    together = model(x)
    assert (together.argmax(1) == y).all()
    torch.testing.assert_close(model.eval()(x[:1]), together[:1])


def test_there_is_no_norm_option():
    (fault,) = models.check("fixup-resnet", {"norm": "batch"})
    assert str(fault).startswith("norm: unknown option of model fixup-resnet 'norm'")
