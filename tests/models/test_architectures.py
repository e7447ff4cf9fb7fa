"""Every architecture: parameter counts against closed facts, forward shapes, initialization, layout, tracing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.normalization import crafting_forward
from robustlayers.selection import norm_layers, select

SMALL = {
    "resnet": {"depth": 8, "width": 4},
    "preact-resnet": {"depth": 18, "width": 4},
    "wide-resnet": {"depth": 10, "widen": 1},
    "resnet18": {"width": 4},
    "resnet34": {"width": 4, "stem": "imagenet"},
    "resnet50": {"width": 4},
    "vgg": {"depth": 11, "width": 4},
    "nf-resnet": {"width": 4},
    "fixup-resnet": {"depth": 14, "width": 4},
    "small-cnn": {},
    "mlp": {"width": 16},
}
VARIANTS = [
    *SMALL.items(),
    ("resnet", {"depth": 8, "width": 4, "shortcut": "B"}),
    ("resnet", {"depth": 8, "width": 4, "shortcut": "B", "norm": "none"}),
    ("preact-resnet", {"width": 4, "norm": "none"}),
    ("resnet18", {"width": 4, "stem": "imagenet", "norm": "none"}),
    ("resnet50", {"width": 4, "norm": "none"}),
    ("vgg", {"depth": 16, "width": 4, "norm": "none"}),
    ("nf-resnet", {"depth": 26, "width": 4, "stem": "imagenet", "last_gain": 0}),
    ("small-cnn", {"norm": "none"}),
    ("mlp", {"width": 16, "norm": "none"}),
]


def build(name, size=32, **options):
    """A network for images of `size` x `size`: only an MLP has to know."""
    return models.build(name, **options, **({"size": size} if name == "mlp" else {}))


def counts(name, **options):
    with torch.device("meta"):
        model = models.build(name, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return sum(p.numel() for m in norms for p in m.parameters()), sum(p.numel() for p in model.parameters())


def test_every_architecture_is_tested_here():
    assert set(SMALL) == set(models.names())


@pytest.mark.parametrize(
    ("name", "options", "norm", "total"),
    [
        ("resnet", {"depth": 20}, 1_376, 269_722),
        ("resnet", {"depth": 20, "shortcut": "B"}, 1_568, 272_474),
        ("resnet", {"depth": 14, "shortcut": "B"}, 1_120, 175_258),
        ("resnet", {"depth": 32}, 2_272, 464_154),
        ("preact-resnet", {"depth": 18}, 7_808, 11_172_170),
        ("resnet", {"depth": 110, "shortcut": "B"}, 8_288, 1_730_714),
        ("preact-resnet", {"depth": 34}, 15_232, 21_280_330),
        ("wide-resnet", {"depth": 28, "widen": 4}, 7_200, 5_849_050),
        ("wide-resnet", {"depth": 28, "widen": 10}, 17_952, 36_479_194),
        ("wide-resnet", {"depth": 34, "widen": 10}, 22_432, 46_160_474),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, options, norm, total):
    assert counts(name, **options) == (norm, total)


@pytest.mark.parametrize("depth", [20, 32, 110])
def test_norm_share_of_the_option_a_resnet_follows_its_formula(depth):
    # Per block of width w: 2 norm layers of 2w, 2 convolutions of 9 w^2 (the first of a stage 9 * w/2 * w).
    blocks = (depth - 2) // 6
    norm = 2 * 16 + sum(blocks * 2 * 2 * w for w in (16, 32, 64))
    conv = 27 * 16 + 9 * 16**2 * 2 * blocks + sum(9 * w * w * (2 * blocks - 1) + 9 * w * w // 2 for w in (32, 64))
    assert counts("resnet", depth=depth) == (norm, norm + conv + 64 * 10 + 10)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (2, 8)])
def test_forward_gives_finite_logits_and_leaves_its_input_alone(name, options, channels, size):
    model = build(name, size, seed=0, channels=channels, classes=7, **options).eval()
    x = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    logits = model(x)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_layout_and_normalize_cover_every_tensor_exactly_once(name, options):
    model = models.build(name, seed=0, **options)
    layout = model.layout()
    prefixes = [prefix for part in layout.parts().values() for prefix in part] + ["normalize"]
    modules = dict(model.named_modules())
    assert all(prefix in modules for prefix in prefixes)
    for tensor in model.state_dict():
        assert sum(tensor.startswith(prefix + ".") for prefix in prefixes) == 1, tensor
        assert (layout.part_of(tensor) is None) == tensor.startswith("normalize.")
    for stage in layout.stages:
        assert next(child for child, _ in modules[stage[0]].named_children()) == "0"


def test_layout_names_of_the_two_families():
    resnet = models.build("resnet", seed=0, **SMALL["resnet"]).layout()
    assert resnet == models.Layout(("conv1", "bn1"), (("layer1",), ("layer2",), ("layer3",)), ("linear",))
    wide = models.build("wide-resnet", seed=0, **SMALL["wide-resnet"]).layout()
    assert wide.stem == ("conv1",)
    assert wide.stages[-1] == ("layer3", "bn")


@pytest.mark.parametrize(("name", "options"), SMALL.items())
def test_a_seeded_build_is_pure_and_leaves_the_global_generator_alone(name, options):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = models.build(name, seed=3, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = models.build(name, seed=3, **options)
    other = models.build(name, seed=4, **options)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for tensor, weight in first.named_parameters():
        if weight.dim() > 1 and weight.std() > 0:  # others are 0 or 1
            assert not torch.equal(weight, other.get_parameter(tensor)), tensor


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_selectors_find_stem_stages_blocks_and_head(name, options):
    model = models.build(name, seed=0, **options)
    layout, modules = model.layout(), dict(model.named_modules())
    found = [set(select(model, part)) for part in ("stem", "head")]
    for index, (prefix, *_) in enumerate(layout.stages, start=1):
        found.append(set(select(model, f"stage({index})")))
        for place, (child, _) in enumerate(modules[prefix].named_children(), start=1):
            block = set(select(model, f"block({index}, {place})"))
            assert block == {tensor for tensor in model.state_dict() if tensor.startswith(f"{prefix}.{child}.")}
            assert block
    assert all(found)
    assert sum(map(len, found)) == len(set().union(*found)) == len(model.state_dict()) - 2  # mean and std


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_folded_forward_equals_the_model(name, options):
    model = build(name, 16, seed=0, **options).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    forward = crafting_forward(model)
    assert forward.reason == ""
    torch.testing.assert_close(forward(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), SMALL.items())
@pytest.mark.parametrize("norm", [norm for norm in models.norm_names() if norm != "batch"])
def test_other_norms_train_in_every_model_that_has_norm_layers(name, options, norm):
    if "norm" not in models.options_of(name) or (name == "mlp" and norm in ("instance", "random")):
        assert [fault.path for fault in models.check(name, {"norm": norm})] == ["norm"]
        return
    model = build(name, 64, seed=0, **{**options, "norm": norm})
    norms = norm_layers(model)
    assert bool(norms) == (norm != "none")
    logits = model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for tensor, parameter in model.named_parameters():  # a branch that did not run gets no gradient
        assert parameter.grad is not None or tensor.startswith(tuple(norms)), tensor
    assert logits.isfinite().all()


def test_an_unseeded_build_draws_from_the_global_generator():
    with torch.random.fork_rng(devices=[]):
        built = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            built.append(models.build("small-cnn").get_parameter("conv1.weight"))
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_a_seeded_build_is_real_also_under_a_default_device():
    with torch.device("meta"):
        model = models.build("small-cnn", seed=0)
    expected = models.build("small-cnn", seed=0)
    assert torch.equal(model.get_parameter("conv1.weight"), expected.get_parameter("conv1.weight"))


def test_initialization_is_kaiming_fan_out():
    model = models.build("resnet", seed=0, depth=8, width=64, shortcut="B")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_convolution_has_a_bias_exactly_where_nothing_after_it_shifts(name, options):
    model = models.build(name, seed=0, **options)
    biased = options.get("norm") == "none" or name in ("nf-resnet", "vgg")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not (name == "preact-resnet" and "shortcut" in path):
            assert (module.bias is not None) == biased, path
    with_norm = "norm" in models.options_of(name) and options.get("norm") != "none"
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == with_norm


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_traceable_copyable_and_channels_last(name, options):
    model = build(name, 16, seed=0, **options).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), expected)
    assert any(node.op == "get_attr" and node.target == "normalize.mean" for node in traced.graph.nodes)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    last = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected)


def test_input_normalization_is_the_first_layer():
    model = models.build("small-cnn", seed=0, mean=[0.1, 0.2, 0.3], std=0.25).eval()
    plain = models.build("small-cnn", seed=0, mean=0, std=1).eval()
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(x), plain((x - mean) / 0.25))
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 8, 8), "this model takes [n, 3, height, width]"),
        (torch.zeros(3, 8, 8), "this model takes [n, 3, height, width]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floats in [0, 1]"),
    ],
)
def test_input_of_the_wrong_shape_or_type_is_refused(x, message):
    with pytest.raises(UserError) as error:
        models.build("small-cnn", seed=0)(x)
    assert message in str(error.value)


def test_the_pad_shortcut_slices_and_puts_zeros_on_both_sides():
    model = models.build("resnet", seed=0, depth=8, width=4)
    shortcut = model.get_submodule("layer2.0.shortcut")
    x = torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    y = shortcut(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_the_stem_stride_divides_the_pixels_that_the_stages_see():
    sizes = []
    model = models.build("resnet", seed=0, depth=8, width=4, stem_stride=2).eval()
    model.get_submodule("layer1").register_forward_hook(lambda module, args, output: sizes.append(output.shape[2:]))
    model(torch.rand(1, 3, 28, 28))
    assert sizes == [(14, 14)]


def test_the_resnet_computes_what_the_paper_says(reference):
    conv, norm, randomized = reference.conv, reference.norm, reference.randomized
    model = randomized(models.build("resnet", seed=0, depth=8, width=4, shortcut="B"))
    state, x = model.state_dict(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = norm(state, "bn1", conv(state, "conv1", (x - 0.5) / 0.5)).relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{stage}.0"
        z = norm(state, f"{block}.bn1", conv(state, f"{block}.conv1", y, stride)).relu()
        z = norm(state, f"{block}.bn2", conv(state, f"{block}.conv2", z))
        if stride == 2:
            y = norm(state, f"{block}.shortcut.1", conv(state, f"{block}.shortcut.0", y, 2))
        y = (z + y).relu()
    expected = y.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_pre_activation_network_computes_what_the_paper_says(reference):
    conv, norm, randomized = reference.conv, reference.norm, reference.randomized
    model = randomized(models.build("wide-resnet", seed=0, depth=10, widen=1))
    state, x = model.state_dict(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = conv(state, "conv1", (x - 0.5) / 0.5)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{stage}.0"
        active = norm(state, f"{block}.bn1", y).relu()
        z = norm(state, f"{block}.bn2", conv(state, f"{block}.conv1", active, stride)).relu()
        shortcut = conv(state, f"{block}.shortcut.0", active, 2) if stride == 2 else y
        y = conv(state, f"{block}.conv2", z) + shortcut
    expected = norm(state, "bn", y).relu().mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
