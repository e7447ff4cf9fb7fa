import re

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, resolve, select
from robustlayers.selection.selectors import FUNCTIONS, KEYWORDS

NORM = r"(^|\.)bn\d?\.|downsample\.1\."
STATISTICS = r"(running_mean|running_var|num_batches_tracked)$"

# What each selector means on the zoo-like network of conftest.py, as a pattern on the names of its tensors.
ON_USERS_RESNET = {
    "all": r"",
    "norm": NORM,
    "batchnorm": NORM,
    "norm.weight": rf"({NORM})weight$",
    "norm.scale": rf"({NORM})weight$",
    "norm.bias": rf"({NORM})bias$",
    "norm.shift": rf"({NORM})bias$",
    "norm.affine": rf"({NORM})(weight|bias)$",
    "norm.statistics": STATISTICS,
    "all.statistics": STATISTICS,
    "conv": r"conv\d\.|downsample\.0\.",
    "conv.weight": r"conv\d\.|downsample\.0\.",
    "linear": r"^fc\.",
    "linear.bias": r"^fc\.bias$",
    "bias": r"\.bias$",
    "stem": r"^(conv1|bn1)\.",
    "stem.weight": r"^(conv1|bn1)\.weight$",
    "head": r"^fc\.",
    "shortcut": r"downsample\.",
    "stage(1)": r"^layer1\.",
    "stage(i=4)": r"^layer4\.",
    "block(2, 1)": r"^layer2\.0\.",
    "block(stage=3, block=2)": r"^layer3\.1\.",
    "type(BatchNorm2d)": NORM,
    "type(OwnNorm)": r"layer\d\.\d\.bn1\.",
    "type(BasicBlock)": r"^layer",
    "type(ResNet)": r"",
    'type("Linear")': r"^fc\.",
    "layer2.0.bn1": r"^layer2\.0\.bn1\.",
    "layer2.0.bn1.weight": r"^layer2\.0\.bn1\.weight$",
    '"layer2.0.bn1.weight"': r"^layer2\.0\.bn1\.weight$",
    "layer2": r"^layer2\.",
    "bn1": r"^bn1\.",
    "*.bn1": r"\.bn1\.",
    "*bn1": r"bn1\.",
    "layer?.0.conv[12].weight": r"^layer\d\.0\.conv\d\.weight$",
    "layer[!1-3]*": r"^layer4",
    "*.running_*": r"running_",
    "before(layer1)": r"^(conv1|bn1)\.",
    "after(fc)": r"^fc\.",
    "first(2)": r"^(conv1|bn1)\.",
    "last(1)": r"^fc\.",
    "depth(0, 0.04)": r"^(conv1|bn1)\.",
    'regex("layer[12]")': r"^layer[12]\.",
    "norm & stage(4)": rf"^layer4\.(.*\.)?({NORM[6:]})",
    "norm & stage(4) & shortcut": r"^layer4\.0\.downsample\.1\.",
    "conv - stem - shortcut": r"^layer.*conv",
    "~norm": rf"^(?!.*({NORM}))",
    "(conv | linear) & ~stage(1)": r"^(?!layer1)(.*conv\d\.|.*downsample\.0\.|fc\.)",
}  # fmt: skip


@pytest.mark.parametrize("selector", ON_USERS_RESNET)
def test_a_selector_picks_exactly_what_it_says(user, selector):
    model = user("resnet")
    expected = [name for name in model.state_dict() if re.search(ON_USERS_RESNET[selector], name)]
    assert expected
    assert select(model, selector) == expected


def test_every_keyword_and_function_is_tried():
    used = set(re.findall(r"[a-z]+", " ".join(ON_USERS_RESNET)))
    used |= {"random", "channels", "random_channels", "unused", "top", "bottom"}  # these have files of their own
    assert used >= {*KEYWORDS, *FUNCTIONS}


@pytest.mark.parametrize("name", models.names())
def test_selectors_on_our_models_agree_with_module_types_and_layout(name):
    options = {"resnet": {"depth": 14}, "wide-resnet": {"depth": 10, "widen": 1}, "preact-resnet": {"width": 4}}
    model = models.build(name, seed=0, **options.get(name, {}))
    state, layout = list(model.state_dict()), model.layout()

    def owned(*types):
        prefixes = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, types))
        return [n for n in state if n.startswith(prefixes)]

    def picked(selector):  # what a model has none of is an error
        try:
            return select(model, selector)
        except UserError as error:
            if f"selector {selector!r} picks nothing" not in str(error):
                raise
            return []

    assert picked("norm") == picked("batchnorm") == owned(nn.BatchNorm2d)
    assert picked("conv") == owned(nn.Conv2d)
    assert picked("linear") == owned(nn.Linear)
    parts = {
        "stem": "stem",
        "head": "head",
        **{f"stage({i})": f"stage({i})" for i in range(1, len(layout.stages) + 1)},
    }
    for selector, part in parts.items():
        found = select(model, selector)
        assert found and found == [n for n in state if layout.part_of(n) == part]
    assert select(model, "~(" + " | ".join(parts) + ")") == ["normalize.mean", "normalize.std"]
    assert picked("norm.statistics") == [n for n in state if n.endswith(("_mean", "_var", "_tracked"))]


def test_a_stage_never_takes_another_whose_name_begins_alike(user):
    model = user("deep")
    assert select(model, "layer1") == ["layer1.0.weight", "layer1.0.bias"] == select(model, "stage(1)")
    assert select(model, "layer1.*") == ["layer1.0.weight", "layer1.0.bias"]
    assert select(model, "stage(10)") == ["layer10.0.weight", "layer10.0.bias"] == select(model, "block(10, 1)")
    assert len(select(model, "layer1*")) == 8  # a glob is a glob: layer1, layer10, layer11, layer12


def test_a_keyword_wins_over_a_module_of_that_name_unless_quoted(user):
    model = user("confusing")
    assert [n for n in select(model, "norm") if n.endswith("weight")] == ["head.1.weight", "bn.weight"]
    assert select(model, '"norm"') == ["norm.weight", "norm.bias"]
    assert select(model, "norm.weight") == ["head.1.weight", "bn.weight"]
    assert select(model, "'norm.weight'") == ["norm.weight"]
    assert select(model, "norm.affine - 'head'") == ["bn.weight", "bn.bias"]
    assert select(model, "head.0") == ["head.0.weight", "head.0.bias"]
    assert select(model, '"odd-name"') == ["odd-name.weight", "odd-name.bias"]
    with pytest.raises(UserError, match=r"^unknown module or tensor 'conv'(?!.*conv,)"):
        select(model, '"conv"')


def test_a_tied_tensor_is_found_by_every_name_and_every_owner(user):
    model = user("tied")
    assert select(model, "out.weight") == select(model, "embed") == ["embed.weight"]
    assert select(model, "out") == select(model, "head") == ["embed.weight", "out.bias"]
    assert select(model, "linear") == ["embed.weight", "first.0.weight", "first.0.bias", "out.bias"]
    assert select(model, "type(Embedding)") == ["embed.weight"]
    assert select(model, "again.1") == select(model, "norm") == select(model, "first.1")
    assert select(model, "again.*.weight") == ["first.0.weight", "first.1.weight"]
    assert select(model, "embed & out") == ["embed.weight"]
    assert resolve(Inventory(model), "out").parameters == 15 + 5


def test_numbered_modules_go_by_their_number():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    assert select(model, "0") == ["0.weight", "0.bias"]
    assert select(model, "1.0 | 1.1.bias") == ["1.0.weight", "1.0.bias", "1.1.bias"]


def test_the_result_is_in_registration_order_whatever_was_asked_first(user):
    model = user("resnet")
    assert select(model, "fc | bn1 | conv1") == [
        n for n in model.state_dict() if n.split(".")[0] in ("fc", "bn1", "conv1")
    ]


def test_affine_less_and_statistics_less_layers():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False)
    )
    assert select(model, "norm.statistics") == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert select(model, "norm.affine") == ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("stge(1)", "unknown selector function 'stge'; nearest: stage, type, last"),
        ("relu", "module 'relu' has no tensors to select"),
        ("stage(5)", "ResNet has 4 stage(s), not 5"),
        ("stage()", "selector function 'stage' needs i"),
        ("stage(0)", "selector function 'stage': i must be a whole number of at least 1"),
        ("stage(1.5)", "selector function 'stage': i must be a whole number of at least 1"),
        ("stage(norm)", "selector function 'stage': i must be a whole number of at least 1"),
        ("stage(1, 2)", "selector function 'stage' takes i"),
        ("stage(1, i=1)", "selector function 'stage': 'i' is given twice"),
        ("stage(index=1)", "unknown argument of stage() 'index'; allowed: i"),
        ("block(1)", "selector function 'block' needs block"),
        ("block(1, 3)", "stage 1 has 2 block(s), not 3"),
        ("type()", "selector function 'type' needs the name of a class, as in type(BatchNorm2d)"),
        ("type(3)", "selector function 'type' needs the name of a class, as in type(BatchNorm2d)"),
        ("type(ReLU)", "selector 'type(ReLU)' picks nothing from ResNet"),
        ("bias & norm.statistics", "selector 'bias & norm.statistics' picks nothing from ResNet"),
        ("*.foo", "selector '*.foo' matches no tensor and no module"),
        ("norm | rest", "'rest' stands alone, as the last group of a partition"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(user, selector, message):
    with pytest.raises(UserError) as error:
        select(user("resnet"), selector)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [
        ("nrm", "norm"),
        ("layer1.0.bn", "layer1.0.bn2"),
        ("bn1.wieght", "bn1.weight"),
        ("Layer1.0.BN1", "layer1.0.bn1"),
        ("laye", "layer4"),  # nothing is matched by substring
        ("ayer1", "layer1"),
        ("norm.scal", "norm.scale"),
        ("haed", "head"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(user, selector, nearest):
    with pytest.raises(UserError, match=rf"^unknown selector '{selector}'; nearest: {re.escape(nearest)}(,|$)"):
        select(user("resnet"), selector)


def test_an_unknown_type_is_told_with_the_types_there_are(user):
    with pytest.raises(
        UserError, match=r"^unknown module type 'BatchNorm'; nearest: BatchNorm2d, OwnNorm; allowed: BasicBlock, "
    ):
        select(user("resnet"), "type(BatchNorm)")


def test_a_part_that_cannot_be_seen_is_told(net):
    for selector in ("shortcut", "stem"):
        with pytest.raises(UserError, match=rf"^Sequential has no {selector} .*name its modules or use a glob$"):
            select(net("mlp"), selector)
    with pytest.raises(UserError, match=r"^Sequential has 0 stage"):
        select(net("mlp"), "stage(1)")


def test_selecting_changes_nothing(user, bits):
    model = user("resnet").eval()
    before, state = bits(model), torch.get_rng_state()
    for selector in (*ON_USERS_RESNET, "random(like=norm, seed=0)"):
        select(model, selector)
    assert bits(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
