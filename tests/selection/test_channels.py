import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, Partition, Selection, resolve


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, bias=False)
        self.fc = nn.Linear(10, 5)
        self.scale = nn.Parameter(torch.ones(()))


INVENTORY = Inventory(Net())


def picked(selection: Selection, name: str) -> list[int]:
    """The channels of a tensor that are selected, each of them whole."""
    mask = (
        torch.ones(INVENTORY[name].tensor.shape, dtype=torch.bool)
        if selection.parts[name] is None
        else selection.parts[name]
    )
    assert mask is not None
    rows = mask.reshape(len(mask), -1)
    assert torch.equal(rows.any(1), rows.all(1))  # never a part of a channel
    return rows.all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("selector", "counts"),
    [
        ("channels(conv, 0.25)", {"conv1.weight": 2, "conv1.bias": 2, "conv2.weight": 3}),  # 2.5 is rounded up
        ("channels(conv, 0.01)", {"conv1.weight": 1, "conv1.bias": 1, "conv2.weight": 1}),
        ("channels(conv, 1)", {"conv1.weight": 8, "conv1.bias": 8, "conv2.weight": 10}),
        ("channels(all, 0.5)", {"conv1.weight": 4, "conv1.bias": 4, "bn1.weight": 4, "bn1.bias": 4, "conv2.weight": 5,
                                "fc.weight": 3, "fc.bias": 3}),  # neither buffers nor the scalar
        ("channels(selector=linear.weight, share='1/5', seed=3)", {"fc.weight": 1}),
        ("channels(channels(conv2, 0.6, seed=1), 0.5)", {"conv2.weight": 3}),  # of the 6 that are whole
    ],
)  # fmt: skip
def test_a_share_of_whole_channels_is_picked(selector, counts):
    selection = resolve(INVENTORY, selector)
    assert {name: len(picked(selection, name)) for name in selection} == counts


def test_channels_of_a_module_go_together_and_of_modules_apart():
    draws = [resolve(INVENTORY, f"channels(all, 0.5, seed={seed})") for seed in range(12)]
    for draw in draws:
        assert picked(draw, "conv1.weight") == picked(draw, "conv1.bias")
        assert picked(draw, "fc.weight") == picked(draw, "fc.bias")
    assert any(picked(draw, "conv1.weight") != picked(draw, "bn1.weight") for draw in draws)
    assert len({tuple(picked(draw, "conv2.weight")) for draw in draws}) > 6
    assert {channel for draw in draws for channel in picked(draw, "conv2.weight")} == set(range(10))


def test_the_draw_depends_on_the_seed_alone():
    again = Inventory(Net())
    for selector in ("channels(conv, 0.5)", "random_channels(like=bn1, of=conv | linear)"):
        torch.manual_seed(1)
        one = resolve(INVENTORY, selector)
        torch.manual_seed(2)
        other = resolve(again, selector)
        assert {n: one.count(n) for n in one} == {n: other.count(n) for n in other}
        assert all(torch.equal(one._mask(name), other._mask(name)) for name in one)
    # Another selector around the module changes nothing of its draw.
    assert picked(resolve(INVENTORY, "channels(conv, 0.5)"), "conv2.weight") == picked(
        resolve(INVENTORY, "channels(conv2 | linear, 0.5)"), "conv2.weight"
    )


@given(
    share=st.integers(1, 100),
    seed=st.integers(0, 20),
    of=st.sampled_from(["conv", "conv | linear", "all", "bn1 | fc", "conv2"]),
)
def test_random_channels_come_as_close_as_whole_channels_can(share, seed, of):
    like = resolve(INVENTORY, f"channels(conv1, {share / 100}, seed=1)")
    selector = f"random_channels(like=channels(conv1, {share / 100}, seed=1), of={of}, seed={seed})"
    try:
        control = resolve(INVENTORY, selector)
    except UserError as error:
        text = str(error)
        assert "only" in text or "smallest channel" in text
        return
    whole = resolve(INVENTORY, of)
    assert control - whole == Selection(INVENTORY, {}) and control.buffers == 0
    missing = like.parameters - control.parameters
    assert missing >= 0
    left = []
    for name in whole:
        entry = INVENTORY[name]
        if not entry.buffer and entry.tensor.dim():
            taken = len(picked(control, name)) if name in control else 0
            left += [entry.tensor[0].numel()] * (len(entry.tensor) - taken)
    assert not left or missing < min(left)


def test_random_channels_stay_outside_unless_told_and_can_be_a_group():
    like = "channels(conv, 0.25, seed=1)"
    control = f"random_channels(like={like}, seed=2)"
    chosen, drawn = resolve(INVENTORY, like), resolve(INVENTORY, control)
    assert not chosen & drawn
    assert drawn.parameters == chosen.parameters  # biases are channels of one entry
    partition = Partition(INVENTORY.model, {"channels": like, "control": control, "others": "rest"})
    assert partition["channels"].parameters == partition["control"].parameters == 2 * 28 + 3 * 72
    tensors = {tuple(resolve(INVENTORY, f"random_channels(like={like}, seed={seed})")) for seed in range(5)}
    assert len(tensors) > 1


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("channels()", "selector function 'channels' needs selector, as in channels(conv, 0.25)"),
        ("channels(conv)", "selector function 'channels' needs share"),
        ("channels(conv, 0)", "selector function 'channels': share must be more than 0"),
        ("channels(conv, 1.5)", """selector function 'channels': share must be from 0 to 1, as in 0.25 or "1/3\""""),
        ("channels(conv, 0.5, 1)", "selector function 'channels' takes selector, share, seed"),
        ("channels(conv, 0.5, seed=0.5)", "selector function 'channels': seed must be a whole number of at least 0"),
        ("channels(norm.statistics, 0.5)", "selector function 'channels': the selector holds no whole channel of a parameter"),
        ("channels(scale, 0.5)", "selector function 'channels': the selector holds no whole channel of a parameter"),
        ("random_channels()", "selector function 'random_channels' needs like, as in random_channels(like=norm, seed=0)"),
        ("random_channels(conv)", "selector function 'random_channels' takes like, of, seed"),
        ("random_channels(like=norm.statistics)", "selector function 'random_channels': like= picks no parameters"),
        ("random_channels(like=conv, of=norm)",
         "selector function 'random_channels': 944 entries wanted, only 16 to draw from"),
        ("random_channels(like=conv, of=norm.statistics)",
         "selector function 'random_channels': 944 entries wanted, only 0 to draw from"),
        ("random_channels(like=bn1.bias, of=conv.weight)",
         "selector function 'random_channels': 8 entries wanted, but the smallest channel to draw from has 27"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(selector, message):
    with pytest.raises(UserError) as error:
        resolve(INVENTORY, selector)
    assert str(error.value) == message
