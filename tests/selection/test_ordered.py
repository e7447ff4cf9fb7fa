import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, Partition, execution_order, resolve, select
from robustlayers.selection import order as order_module


class Shuffled(nn.Module):
    """Registered head, conv2, shortcut, aux, conv1; runs conv1, bn, shortcut, conv2, head; aux never."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.aux = nn.Linear(4, 2)
        self.bn = nn.BatchNorm2d(4, affine=False)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused_pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv1(x)).relu()
        y = self.shortcut(x) + self.conv2(y)
        return self.head(self.pool(y).flatten(1))


class Tied(nn.Module):
    """A module used twice, a weight of two layers, and a list of blocks whose own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.encode = nn.Linear(4, 4)
        self.encode.weight = self.decode.weight
        self.again = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        for block in self.blocks:
            x = block(x)
        return self.decode(self.again(x))


RESNET = models.build("resnet", seed=0, depth=8, width=3, channels=1, classes=3, shortcut="B")


def tensors(model: nn.Module, *modules: str) -> list[str]:
    """The tensors of these modules, in registration order."""
    return [name for name in model.state_dict() if name.rpartition(".")[0] in modules]


SHUFFLED = {
    "before(conv1)": None,
    "before(bn)": ("conv1",),
    "before(shortcut)": ("conv1", "bn"),
    'before("shortcut.1")': ("conv1", "bn", "shortcut.0"),
    "before(conv2.bias)": ("conv1", "bn", "shortcut.0", "shortcut.1"),
    "before(conv2.bias) & norm": ("bn", "shortcut.1"),
    "before(pool)": ("conv1", "bn", "shortcut.0", "shortcut.1", "conv2"),  # a module without tensors
    "before(head)": ("conv1", "bn", "shortcut.0", "shortcut.1", "conv2"),
    "before(norm)": ("conv1",),  # any selector: the first of it to run
    "before(*2 | shortcut.1)": ("conv1", "bn", "shortcut.0"),
    "after(conv2)": ("conv2", "head"),
    "after(pool)": ("head",),
    "after(x=conv1)": ("conv1", "bn", "shortcut.0", "shortcut.1", "conv2", "head"),
    "after(shortcut) - after(head)": ("shortcut.0", "shortcut.1", "conv2"),
    "first(1)": ("conv1",),
    "first(2)": ("conv1", "shortcut.0"),  # bn has no parameters
    "first(5)": ("conv1", "shortcut.0", "shortcut.1", "conv2", "head"),
    "first(2, of=conv)": ("conv1", "shortcut.0"),
    "first(1, of=norm)": ("shortcut.1",),
    "first(n=1, of=bias)": ("shortcut.0",),
    "first(1, of=norm.statistics)": ("shortcut.1",),  # whole modules
    "last(1)": ("head",),
    "last(2)": ("conv2", "head"),
    "last(2, of=conv)": ("shortcut.0", "conv2"),
    "last(1, of=conv | aux)": ("conv2",),
    "depth(0, 1)": ("conv1", "shortcut.0", "shortcut.1", "conv2", "head"),
    "depth(0, 0.2)": ("conv1",),
    "depth(0, 0.201)": ("conv1", "shortcut.0"),
    'depth("1/5", "4/5")': ("shortcut.0", "shortcut.1", "conv2"),
    "depth(a=0.5, b=1)": ("conv2", "head"),
    'depth(0, "1/3", of=conv)': ("conv1",),
    'depth("1/3", 1, of=conv)': ("shortcut.0", "conv2"),
    "unused": ("aux",),
    "unused.bias | head": ("head",),
}  # fmt: skip


@pytest.mark.parametrize("selector", [key for key, modules in SHUFFLED.items() if modules])
def test_cuts_follow_the_forward(selector):
    model = Shuffled()
    expected = tensors(model, *(SHUFFLED[selector] or ()))
    if selector.startswith("unused.bias"):
        expected = [*expected, "aux.bias"]
    assert select(model, selector) == expected


def test_the_order_of_registration_would_be_caught(monkeypatch):
    """The planted fault: modules in the order in which `named_modules` lists them."""
    right = {selector: select(Shuffled(), selector) for selector, modules in SHUFFLED.items() if modules}

    def registered(inventory, example):
        names = [name for name in inventory.modules() if name]
        return order_module.ExecutionOrder(
            modules=tuple(dict.fromkeys(entry.module_name for entry in inventory)),
            unused=(),
            uses={},
            kinds={},
            starts={name: place for place, name in enumerate(names)},
            holders={entry.name: entry.module_name for entry in inventory},
            shape=(),
        )

    monkeypatch.setattr(order_module, "_traced", registered)

    def found(selector):
        try:
            return select(Shuffled(), selector)
        except UserError:
            return []

    same = {selector for selector in right if found(selector) == right[selector]}
    assert same <= {"first(2, of=conv)", "first(1, of=norm)", "first(1, of=norm.statistics)"}


def test_tied_tensors_and_modules_used_twice_stand_where_they_are_used_first():
    model = Tied()
    assert select(model, "first(1)") == ["decode.weight", "encode.bias"]  # the tied weight under its first name
    assert select(model, "before(decode)") == [
        "decode.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "encode.bias",
    ]  # fmt: skip
    assert select(model, "last(1)") == ["decode.bias"]
    assert select(model, "before(again)") == select(model, "before(blocks)") == ["decode.weight", "encode.bias"]
    assert select(model, "before(decode.weight) | norm | linear") == select(model, "after(encode)")
    assert Partition(model, {"early": "before(blocks.1)", "late": "after(blocks.1)"})["late"].parameters == 24


NEVER = " never runs in a forward of Shuffled, so nothing comes before or after it"
EXECUTED = execution_order(RESNET)
CUTS = [*EXECUTED.starts, *RESNET.state_dict()]


@given(cut=st.sampled_from([name for name in CUTS if name]))
def test_before_and_after_part_what_runs(cut):
    inventory = Inventory(RESNET)
    late = resolve(inventory, f'after("{cut}")')
    if cut.startswith("normalize"):  # runs first: nothing is before it
        assert late == resolve(inventory, "all")
        return
    early = resolve(inventory, f'before("{cut}")')
    assert not early & late
    assert early | late == resolve(inventory, "all")
    assert {"normalize.mean", "normalize.std"} <= set(early)
    module = cut if cut in inventory.modules() else inventory[cut].module_name
    inside = [name for name in inventory.entries if name.startswith(f"{module}.")]
    assert set(inside) <= set(late)
    # What is early ran, by the list that is printed, before everything that is late.
    place = {name: EXECUTED.modules.index(inventory[name].module_name) for name in inventory.entries}
    assert max(place[name] for name in early) < min(place[name] for name in late)


@given(n=st.integers(1, 18))
def test_first_and_last_part_the_modules_with_parameters(n):
    inventory = Inventory(RESNET)
    counted = [module for module in EXECUTED.modules if module != "normalize"]
    assert len(counted) == 19
    early, late = resolve(inventory, f"first({n})"), resolve(inventory, f"last({19 - n})")
    assert list(early) == tensors(RESNET, *counted[:n]) and list(late) == tensors(RESNET, *counted[n:])


@given(cuts=st.lists(st.integers(1, 99), max_size=4, unique=True))
def test_depths_that_meet_share_nothing_and_leave_nothing(cuts):
    inventory = Inventory(RESNET)
    edges = [0, *(cut / 100 for cut in sorted(cuts)), 1]
    whole = resolve(inventory, "depth(0, 1)")
    total, refused = 0, []
    for low, high in pairwise(edges):
        try:
            total += resolve(inventory, f"depth({low}, {high})").parameters
        except UserError as error:
            refused.append(str(error))
    assert total == whole.parameters == inventory.parameters
    assert all("holds no module; 19 are counted, one every 0.0526" in message for message in refused)


def test_a_cut_moves_by_one_module_along_the_printed_order():
    sizes = [len(select(RESNET, f'after("{module}")')) for module in EXECUTED.modules]
    steps = [len(tensors(RESNET, module)) for module in EXECUTED.modules]
    assert [big - small for big, small in zip(sizes, [*sizes[1:], 0], strict=True)] == steps


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("before(conv1)", "selector 'before(conv1)' picks nothing from Shuffled"),
        ("before()", """selector function 'before' needs a module, a tensor or a selector, as in before("conv1")"""),
        ("before(3)", """selector function 'before': quote the name of a module, as in before("3")"""),
        ("before(conv1, conv2)", "selector function 'before' takes x"),
        ("before(aux)", "selector function 'before': 'aux'" + NEVER),
        ("after(aux.bias)", "selector function 'after': 'aux.bias'" + NEVER),
        ("after(unused_pool)", "selector function 'after': 'unused_pool'" + NEVER),
        ("after(unused)", "selector function 'after': 'unused'" + NEVER),
        ("after(aux & bias)", "selector function 'after': its argument" + NEVER),
        ("after(conv3)", "unknown selector 'conv3'; nearest: conv, conv2, conv1"),
        ("first()", "selector function 'first' needs n"),
        ("first(0)", "selector function 'first': n must be a whole number of at least 1"),
        ("first(6)", "Shuffled has 5 modules with parameters that run, not 6"),
        ("last(4, of=conv)", "Shuffled has 3 such modules that run, not 4"),
        ("first(1, of=aux)", "selector function 'first': of= picks no module that has parameters and runs"),
        ("first(1, of=bn)", "selector function 'first': of= picks no module that has parameters and runs"),
        ("first(1, in=conv)", "unknown argument of first() 'in'; nearest: n; allowed: n, of"),
        ("depth(0.5)", "selector function 'depth' needs b"),
        ("depth(0.5, 0.5)", "selector function 'depth': a must be less than b, got 0.5 and 0.5"),
        ("depth(0, 2)", """selector function 'depth': b must be from 0 to 1, as in 0.25 or "1/3\""""),
        ("depth(0, conv)", """selector function 'depth': b must be from 0 to 1, as in 0.25 or "1/3\""""),
        ("depth(0, 'x')", "selector function 'depth': b: 'x' is not a number; write 0.03 or 8/255"),
        ("depth(0.21, 0.22)", "depth(0.21, 0.22) holds no module; 5 are counted, one every 0.2"),
        ("regex(conv1)", r"selector function 'regex' needs a quoted expression, as in regex('layer[12]\..*')"),
        ("regex()", r"selector function 'regex' needs a quoted expression, as in regex('layer[12]\..*')"),
        ("regex('(')", "selector function 'regex': '(' is no regular expression: missing ), unterminated subpattern at "
                       "position 0"),
        ("regex('onv1')", "regular expression 'onv1' matches no tensor and no module"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(selector, message):
    with pytest.raises(UserError) as error:
        select(Shuffled(), selector)
    assert str(error.value).startswith(message)
    if "nearest" not in message:
        assert str(error.value) == message


def test_models_without_anything_to_count_or_to_run_are_told():
    with pytest.raises(UserError, match=r"set model\.example_input_array"):
        select(nn.Sequential(nn.Embedding(3, 2)), "first(1)")
    assert select(nn.Sequential(nn.Embedding(3, 2)), "first(1)", torch.tensor([1])) == ["0.weight"]
    with pytest.raises(UserError, match=r"^selector 'unused' picks nothing"):
        select(nn.Sequential(nn.Linear(3, 2)), "unused")
    # A partition reports what cannot be run as the fault of its group.
    with pytest.raises(UserError, match=r"^early: Sequential cannot be run"):
        Partition(nn.Sequential(nn.Embedding(3, 2)), {"early": "first(1)", "late": "rest"})


@pytest.mark.parametrize(
    ("expression", "pattern"),
    [
        (r"layer[12]\..*", r"^layer[12]\."),
        (r"layer[12]", r"^layer[12]\."),  # modules stand for all their tensors
        (r".*\.bn\d", r"\.bn\d\."),
        (r".*weight", r"weight$"),
        (r"(conv1|linear)\.(weight|bias)", r"^(conv1\.weight|linear\.(weight|bias))$"),
    ],
)
def test_a_regular_expression_matches_whole_names(expression, pattern):
    assert select(RESNET, f'regex("{expression}")') == [n for n in RESNET.state_dict() if re.search(pattern, n)]
