import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, Selection, resolve, select


@pytest.fixture
def inventory(net):
    return Inventory(net("resnet"))


@pytest.mark.parametrize("like", ["norm", "head", "norm.weight", "bias", "stage(1)", "random(like=head, seed=5)"])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_it_has_exactly_as_many_parameters_and_none_of_like_nor_a_buffer(inventory, like, seed):
    model, found = resolve(inventory, like), resolve(inventory, f"random(like={like}, seed={seed})")
    assert found.parameters == model.parameters > 0
    assert found.buffers == 0 and not any(inventory[name].buffer for name in found)
    assert not found & model


def test_it_is_the_same_every_time_and_in_every_process(inventory, net):
    first = resolve(inventory, "random(like=norm, seed=3)")
    torch.rand(7)
    assert resolve(Inventory(net("resnet")), "random(seed=3, like=norm)") == first
    assert resolve(inventory, "random(like=norm)") == resolve(inventory, "random(like=norm, seed=0)")
    # Pinned, since a study that is run again must train the same entries.
    tiny = Inventory(torch.nn.Sequential(torch.nn.Linear(8, 1, bias=False), torch.nn.Linear(2, 1, bias=False)))
    mask = resolve(tiny, 'random(like="1", seed=0)').parts["0.weight"]
    assert mask is not None and mask.flatten().nonzero().flatten().tolist() == [4, 5]


def test_another_seed_makes_another_draw(inventory):
    draws = [resolve(inventory, f"random(like=norm, seed={seed})") for seed in range(6)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            common = (one & other).parameters
            assert common < 0.5 * one.parameters
    # the values of the weights do not matter
    with torch.no_grad():
        for parameter in inventory.model.parameters():
            parameter.mul_(3)
    assert resolve(inventory, "random(like=norm, seed=2)") == draws[2]


def test_every_entry_is_drawn_equally_often(inventory):
    count, pool = resolve(inventory, "linear").parameters, (~resolve(inventory, "linear")).parameters
    hits = {entry.name: torch.zeros(entry.tensor.shape) for entry in inventory}
    seeds = 150
    for seed in range(seeds):
        found = resolve(inventory, f"random(like=linear, seed={seed})")
        for name, mask in found.parts.items():
            hits[name] += 1.0 if mask is None else mask.float()
    expected = seeds * count / pool
    per_tensor = {
        entry.name: float(hits[entry.name].mean())
        for entry in inventory
        if not entry.buffer and entry.size >= 60 and entry.name not in resolve(inventory, "linear")
    }
    assert len(per_tensor) >= 6
    for name, mean in per_tensor.items():
        deviation = (expected / inventory[name].size) ** 0.5
        assert abs(mean - expected) < 5 * deviation, name
    counts = torch.cat([hits[name].flatten() for name in per_tensor])
    assert float(counts.max()) < expected + 7 * expected**0.5 + 3


def test_of_restricts_the_draw(inventory):
    found = resolve(inventory, "random(like=norm.bias, of=stage(3) & conv, seed=1)")
    assert found.parameters == resolve(inventory, "norm.bias").parameters
    assert set(found) <= set(select(inventory.model, "stage(3) & conv"))
    half = resolve(inventory, "random(like=head, of=conv, seed=0)")
    other = resolve(inventory, "random(like=head, of=conv - random(like=head, of=conv, seed=0), seed=0)")
    assert not half & other and half.parameters == other.parameters  # drawn from a masked pool


def test_of_everything_takes_everything(inventory):
    assert resolve(inventory, "random(like=linear, of=linear)") == resolve(inventory, "linear")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("random()", "selector function 'random' needs like=SELECTOR, as in random(like=norm, seed=0)"),
        ("random(norm)", "selector function 'random' takes like, of, seed"),
        ("random(like=norm.statistics)", "selector function 'random': like= picks no parameters"),
        ("random(like=norm, seed=x)", "selector function 'random': seed must be a whole number of at least 0"),
        ("random(like=norm, seed=0.5)", "selector function 'random': seed must be a whole number of at least 0"),
        ("random(like=norm, sed=1)", "unknown argument of random() 'sed'; nearest: seed; allowed: like, of, seed"),
        ("random(like=3)", "3 is not a selector"),
    ],
)
def test_a_mistake_is_told(inventory, selector, message):
    with pytest.raises(UserError) as error:
        resolve(inventory, selector)
    assert str(error.value) == message


def test_too_many_are_told_with_the_numbers(inventory):
    convolutions, others = (resolve(inventory, text).parameters for text in ("conv", "~conv"))
    with pytest.raises(UserError, match=f"{convolutions} entries wanted, only {others} to draw from"):
        resolve(inventory, "random(like=conv)")


def test_the_masks_are_bool_of_the_tensors_shape(inventory):
    found = resolve(inventory, "random(like=norm)")
    assert isinstance(found, Selection)
    masked = {name: mask for name, mask in found.parts.items() if mask is not None}
    assert masked
    for name, mask in masked.items():
        assert mask.shape == inventory[name].tensor.shape and mask.dtype == torch.bool and mask.device.type == "cpu"
