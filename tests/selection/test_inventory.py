import pytest
import torch
from torch import nn

from robustlayers.selection import Inventory, is_norm, norm_layers


def test_every_entry_of_the_state_dict_is_there_once(net, user):
    for model in (net("resnet"), net("mlp"), user("resnet"), user("deep"), user("confusing"), user("tied")):
        inventory = Inventory(model)
        state = model.state_dict()
        named = [name for entry in inventory for name in entry.names]
        assert sorted(named) == sorted(state) and set(inventory.canonical) == set(state)
        for name, tensor in state.items():
            assert inventory[name].tensor.data_ptr() == tensor.data_ptr() and inventory[name].size == tensor.numel()
        assert inventory.parameters == sum(p.numel() for p in model.parameters())
        assert len({id(entry.tensor) for entry in inventory}) == len(inventory)
        assert {entry.name for entry in inventory if entry.buffer}.isdisjoint(dict(model.named_parameters()))


def test_tied_tensors_have_one_entry_with_all_names_and_owners(user):
    model = user("tied")
    inventory = Inventory(model)
    weight = inventory["out.weight"]
    assert weight is inventory["embed.weight"]
    assert weight.names == ("embed.weight", "out.weight") and weight.owners == (model.embed, model.out)
    mean = inventory["again.1.running_mean"]
    assert mean.name == "first.1.running_mean" and mean.names == ("first.1.running_mean", "again.1.running_mean")
    assert mean.buffer and mean.owners == (model.first[1],)  # one module, used twice


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(4), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("my_extra_state", torch.zeros(5))

    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


def test_what_state_dict_leaves_out_is_left_out():
    inventory = Inventory(nn.Sequential(_Odd()))
    assert [entry.name for entry in inventory] == ["0.weight", "0.kept", "0.my_extra_state"]
    assert [entry.buffer for entry in inventory] == [False, True, True]
    assert inventory["0.kept"].attribute == "kept" and inventory["0.kept"].module_name == "0"


class _Marked(nn.Module):
    is_normalization = True


class _Unmarked(nn.Module):
    is_normalization = 1


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.BatchNorm2d(2), True),
        (nn.BatchNorm3d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm2d(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.LayerNorm(2), True),
        (nn.RMSNorm(2), True),
        (nn.LocalResponseNorm(2), True),
        (type("Mine", (nn.BatchNorm2d,), {})(2), True),
        (_Marked(), True),
        (_Unmarked(), False),
        (nn.Linear(2, 2), False),
        (nn.Dropout(), False),
        (nn.Sequential(nn.BatchNorm1d(2)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norm_layers_are_known_by_type(module, expected):
    assert is_norm(module) is expected


def test_norm_layers_are_listed_once_by_name(user):
    assert list(norm_layers(user("tied"))) == ["first.1"]
    expected = [n for n, m in user("resnet").named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert list(norm_layers(user("resnet"))) == expected and len(expected) == 20
