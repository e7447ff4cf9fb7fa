"""Conversion: what is carried over, what is shared, what is refused; a published network to dual and back, bit for bit."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.normalization import crafting_forward
from robustlayers.normalization.convert import convert, outermost_norms
from robustlayers.normalization.layers import (
    AdapterNorm,
    DualBatchNorm,
    FilmNorm,
    JointBatchNorm,
    RandomNorm,
    RobustNorm,
    WeightStandardizedConv2d,
)
from robustlayers.selection import Partition, norm_layers
from robustlayers.training import PartialStep

DATA = Path(os.environ.get("ROBUSTLAYERS_DATA") or Path(__file__).parents[2] / "../shared/data")
KINDS = models.norm_names()


@pytest.fixture(scope="module")
def pretrained():
    path = DATA / "pretrained" / "resnet20.safetensors"
    if not path.is_file():
        pytest.skip(f"the pretrained network {path} is not here")
    model = models.build("resnet", seed=0, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    models.load_weights(model, path)
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", [(True, True), (False, True), (True, False), (False, False)])
def test_a_published_network_to_dual_and_back_is_the_same_bit_for_bit(pretrained, images, bits, cell, training):
    model = copy.deepcopy(pretrained)
    before, expected = bits(model), pretrained(images)
    dual = convert(model, "dual", own_statistics=cell[0], own_affine=cell[1])
    assert dual is model
    logits = dual(images)
    if cell[0] == cell[1]:
        assert torch.equal(logits, expected)
    else:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if training:  # of the auxiliary branch
        for layer in dual.modules():
            if isinstance(layer, DualBatchNorm):
                layer.branch = "auxiliary"
        if cell == (True, True):  # nothing is shared
            with torch.no_grad():
                dual.train()(images)
            dual.eval()
        for layer in dual.modules():
            if isinstance(layer, DualBatchNorm):
                layer.branch = "main"
    back = convert(dual, "batch")
    assert bits(back) == before
    assert torch.equal(back(images), expected)
    assert model.layout() == pretrained.layout()


def test_the_auxiliary_branch_can_be_what_is_kept(images):
    model = convert(models.build("resnet", seed=0, depth=8, width=4).eval(), "dual")
    duals = [layer for layer in model.modules() if isinstance(layer, DualBatchNorm)]
    for layer in duals:
        layer.branch = "auxiliary"
        nn.init.constant_(layer.get_parameter("auxiliary.weight"), 0.5)
    expected = model(images)
    assert torch.equal(convert(model, "batch")(images), expected)


SAME = ["adapter", "film", "film(dual=true)", "dual", "joint", "batch"]


@pytest.mark.parametrize("kind", SAME)
def test_what_begins_as_the_same_function_is_the_same_function(kind, net, batch):
    x, _ = batch()
    model = net("resnet").eval()
    expected = model(x)
    assert torch.equal(convert(model, kind)(x), expected)
    torch.testing.assert_close(convert(model, "batch")(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_scale_and_shift_and_can_be_converted_to_every_other(kind, net):
    carried = kind not in ("none", "batch-no-affine")
    for other in KINDS:
        model = net("small-cnn")
        scale = model.get_parameter("bn1.weight")
        convert(model, kind)
        if kind == "none":
            with pytest.raises(UserError, match="has no norm layers to convert"):
                convert(model, other)
            return
        if kind == other and kind in ("dual", "adapter", "film"):
            with pytest.raises(UserError, match="convert"):
                convert(model, other)
            continue
        convert(model, other)
        if carried and other not in ("none", "batch-no-affine"):
            values = [p for name, p in model.named_parameters() if name.startswith("bn1.") and p.shape == scale.shape]
            assert any(torch.equal(value, scale) for value in values), other
            if "adapter" not in (kind, other) and "film" not in (kind, other):
                assert any(value is scale for value in values), other


@pytest.mark.parametrize("architecture", ["resnet", "preact-resnet", "small-cnn", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_takes_every_kind_in_training_evaluation_and_crafting(architecture, kind):
    if (architecture, kind) == ("mlp", "instance"):
        pytest.skip("instance norm of feature maps of one pixel is an error")
    sizes = {"resnet": {"depth": 8, "width": 4, "shortcut": "B"}, "preact-resnet": {"width": 4}, "small-cnn": {}}
    options = sizes.get(architecture, {"hidden": 2, "width": 8, "size": 16})
    norm = "random(kinds=batch+layer)" if (architecture, kind) == ("mlp", "random") else kind
    model = models.build(architecture, seed=0, norm=norm, **options)
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.train()(x).square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None and ".auxiliary." not in n]
    assert not unreached
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    if kind != "random":
        torch.testing.assert_close(crafting_forward(model)(x), model(x), rtol=1e-3, atol=1e-4)
    target = models.build(architecture, seed=1, norm=norm, **options).eval()
    models.load_weights(target, model.state_dict())
    if kind != "random":
        assert torch.equal(target(x), model(x))
    prefixes = [prefix for part in model.layout().parts().values() for prefix in part] + ["normalize"]
    assert all(sum(name.startswith(f"{prefix}.") for prefix in prefixes) == 1 for name in model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "instance", "layer", "group")])
def test_frozen_norms_of_every_kind_stay_bit_equal_in_a_step(kind, batch, bits):
    model = models.build("small-cnn", seed=1, width=4, channels=1, classes=3, norm=kind)
    signals = {"norm": "frozen", "rest": "natural"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    has_tensors = any(True for norm in norm_layers(model).values() for _ in norm.state_dict())
    if not has_tensors:
        pytest.skip("nothing to freeze")
    partition = Partition(model, {"norm": "norm", "rest": "rest"})
    before = bits(model)
    PartialStep(model, partition, signals, optimizer=optimizer)(*batch())
    after = bits(model)
    frozen = set(partition["norm"])
    assert {name for name in before if before[name] == after[name]} >= frozen
    assert before["conv1.weight"] != after["conv1.weight"]


class Shared(nn.Module):
    """A user's model: one norm layer under three names, one in a list, one in a foreign block."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.again = self.norm
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), self.norm), nn.BatchNorm2d(4)])
        self.flat = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.again(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return self.flat(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["group", "dual", "robust", "random", "joint", "instance"])
def test_a_shared_layer_is_swapped_once_and_stays_shared(kind):
    model = Shared()
    assert list(outermost_norms(model)) == ["norm", "blocks.1", "flat"]
    convert(model, kind, select="norm | 'blocks.1'" if kind != "instance" else "norm - flat")
    assert model.norm is model.again is model.get_submodule("blocks.0.1")
    assert not isinstance(model.norm, nn.BatchNorm2d)
    if kind != "instance":
        assert model(torch.rand(3, 4, 2, 2)).shape == (3, 4)


def test_the_dimensions_of_the_layer_are_kept():
    model = Shared()
    convert(convert(model, "dual", own_affine=False), "batch")
    assert (type(model.norm), type(model.flat)) == (nn.BatchNorm2d, nn.BatchNorm1d)
    assert type(convert(nn.BatchNorm3d(2), "instance")) is nn.InstanceNorm3d
    for kind in ("joint", "robust", "random", "random(kinds=instance+layer)", "adapter", "film"):
        assert type(convert(convert(nn.BatchNorm1d(2), kind), "batch")) is nn.BatchNorm1d
    assert type(convert(nn.SyncBatchNorm(2), "batch-no-affine")) is nn.SyncBatchNorm


def test_a_selector_says_which_layers(net):
    model = net("resnet")
    convert(model, "group", select="norm & stage(2)", groups=1)
    converted = {name for name, module in norm_layers(model).items() if isinstance(module, nn.GroupNorm)}
    assert converted == {"layer2.0.bn1", "layer2.0.bn2", "layer2.0.shortcut.1"}


def test_eps_momentum_mode_dtype_and_flags_are_kept():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=None).double().eval()
    norm.weight.requires_grad_(False)
    for kind in ("joint", "batch-no-affine", "dual"):
        layer = convert(copy.deepcopy(norm), kind)
        inner = next(m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        assert (inner.eps, inner.momentum, inner.training) == (1e-3, None, False)
        assert all(p.dtype == torch.float64 for p in layer.parameters())
        assert not any(p.requires_grad for name, p in layer.named_parameters() if name.endswith("weight"))
    for kind, made in (("robust", RobustNorm), ("adapter", AdapterNorm), ("film", FilmNorm), ("random", RandomNorm)):
        layer = convert(copy.deepcopy(norm), kind)
        assert isinstance(layer, made)
        assert not any(module.training for module in layer.modules())
        assert {tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point()} == {torch.float64}


def test_a_subclass_of_the_users_keeps_its_forward_where_it_is_wrapped():
    class Doubled(nn.BatchNorm2d):
        def forward(self, input):  # noqa: A002
            return 2 * super().forward(input)

    x = torch.rand(3, 2, 2, 2)
    for kind in ("dual", "adapter", "film", "batch"):
        norm = Doubled(2).eval()
        assert torch.equal(convert(copy.deepcopy(norm), kind)(x), norm(x))


def test_weight_standardization_comes_with_its_kind(net, batch):
    model = convert(net("small-cnn"), "group-ws", groups=1)
    assert all(type(m) is WeightStandardizedConv2d for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model(batch()[0]).isfinite().all()


def test_kinds_registered_by_others_can_be_converted_to(monkeypatch, net):
    from robustlayers.models import norms

    monkeypatch.setattr(norms, "_KINDS", dict(norms._KINDS))
    models.register_norm("own", models.NormKind(lambda channels: nn.InstanceNorm2d(channels, affine=True)))
    model = net("small-cnn")
    scale = model.get_parameter("bn1.weight")
    assert convert(model, "own").get_parameter("bn1.weight") is scale


def test_statistics_that_begin_anew_have_the_dtype_of_the_layer():
    for norm, kind in (
        (nn.GroupNorm(1, 2), "batch"),
        (nn.InstanceNorm2d(2, affine=True), "batch"),
        (nn.BatchNorm2d(2, track_running_stats=False), "joint"),
        (nn.BatchNorm2d(2), "robust(tracked=both)"),
    ):
        layer = convert(norm.double(), kind)
        assert {buffer.dtype for buffer in layer.buffers() if buffer.is_floating_point()} == {torch.float64}


def test_what_is_inside_a_norm_layer_is_not_converted_by_itself():
    model = nn.Sequential(DualBatchNorm(nn.BatchNorm2d(2)), AdapterNorm(nn.GroupNorm(1, 2)))
    assert list(outermost_norms(model)) == ["0", "1"]
    kept = model[0].main
    convert(model, "adapter", select="'0'")
    assert isinstance(model[0], AdapterNorm)
    assert isinstance(model[0].norm, DualBatchNorm)
    assert model[0].norm.main is kept


class Odd(nn.Module):
    is_normalization = True


@pytest.mark.parametrize(
    ("model", "to", "settings", "message"),
    [
        (nn.BatchNorm2d(2), "grup", {}, "unknown norm 'grup'; nearest: group"),
        (nn.BatchNorm2d(2), "group", {"group": 2}, "unknown option of norm group 'group'; nearest: groups"),
        (nn.BatchNorm2d(2), "group", {"groups": 0}, "option groups of norm group: 0 is not allowed; nearest: 1"),
        (nn.BatchNorm2d(2), "layer", {"groups": 1}, "norm layer has no options, not 'groups'"),
        (nn.Sequential(nn.ReLU()), "group", {}, "Sequential has no norm layers to convert"),
        (nn.Sequential(nn.BatchNorm2d(2), Odd()), "group", {}, "1: Odd has no number of channels"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm(2)), "group", {}, "1: LayerNorm has no number of channels"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Linear(2, 2)), "group", {"select": "linear"}, "picks no norm layer"),
    ],
)
def test_mistakes_are_told_and_nothing_changes(model, to, settings, message):
    before = list(model.modules())
    with pytest.raises(UserError) as error:
        convert(model, to, **settings)
    assert message in str(error.value)
    assert list(model.modules()) == before


def test_a_layer_with_hooks_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="0: this norm layer has hooks, which would be lost"):
        convert(model, "group")


def test_joint_is_the_class_that_it_says():
    assert isinstance(convert(nn.BatchNorm2d(2), "joint", statistics="clean"), JointBatchNorm)
