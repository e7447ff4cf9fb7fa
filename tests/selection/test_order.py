import gc
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, execution_order, order_of


class Shuffled(nn.Module):
    """Registered head, conv2, shortcut, aux, conv1; runs conv1, shortcut, conv2, head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.aux = nn.Linear(4, 2)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv1(x))
        y = self.shortcut(x) + self.conv2(y)
        return self.head(self.relu(y).mean((2, 3)))


class Unfriendly(nn.Module):
    """Would leave traces: dropout, batch norm, counts in evaluation mode, an own `train`, a hook; may raise at the end."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("calls", torch.zeros(2), persistent=False)
        self.seen: Tensor
        self.calls: Tensor
        self.trained: list[bool] = []

    def train(self, mode: bool = True) -> nn.Module:
        self.trained.append(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # in place
        self.calls = self.calls + 1  # another tensor
        y = self.drop(self.bn(self.conv(x))) + torch.rand(()) + random.random()
        y = y + float(np.random.rand())  # noqa: NPY002
        if self.fails:
            raise ValueError("broken\non purpose")
        return y


def test_the_order_is_that_of_the_forward_not_of_registration():
    order = execution_order(Shuffled())
    assert order.modules == ("conv1", "shortcut.0", "shortcut.1", "conv2", "head")
    assert order.unused == ("aux",)
    assert set(order.uses.values()) == {1}
    assert order.shape == (2, 3, 32, 32)
    assert order.start_of("aux.bias") is None
    assert order.starts["conv1"] < order.starts["relu"] < order.starts["shortcut"] < order.starts["shortcut.0"]
    assert str(order).splitlines() == [
        "   1  conv1       Conv2d",
        "   2  shortcut.0  Conv2d",
        "   3  shortcut.1  BatchNorm2d",
        "   4  conv2       Conv2d",
        "   5  head        Linear",
        "   -  aux         Linear  never runs",
    ]


@pytest.mark.parametrize("name", ["resnet", "preact-resnet", "wide-resnet", "small-cnn"])
def test_our_models_run_from_normalization_to_head(name):
    options = {"resnet": {"depth": 14, "shortcut": "B"}, "wide-resnet": {"depth": 10, "widen": 1}}
    model = models.build(name, seed=0, channels=1, **options.get(name, {"width": 4}))
    order = execution_order(model)
    assert order.unused == () and set(order.uses.values()) == {1}
    assert order.modules[0] == "normalize" and order.modules[-1] == "linear"
    assert order.shape == (2, 1, 32, 32)
    parts = [model.layout().part_of(module) for module in order.modules]
    assert parts[1:] == sorted(parts[1:], key=list(model.layout().parts()).index)
    if name == "resnet":  # the convolution of a shortcut, registered last, comes after bn2 here as well
        assert order.modules[-3:] == ("layer3.1.conv2", "layer3.1.bn2", "linear")


def test_a_module_used_twice_stands_where_it_is_used_first():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)
            self.shared = nn.Linear(3, 3)
            self.alias = self.shared

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.last(self.alias(x)))

    order = execution_order(Twice())
    assert order.modules == ("shared", "last")
    assert order.uses == {"shared": 2, "last": 1}
    assert order.starts["alias"] == order.starts["shared"]
    assert "runs 2 times" in str(order)


def test_a_tied_tensor_belongs_to_the_module_that_runs_first():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decode = nn.Linear(4, 4)
            self.encode = nn.Linear(4, 4)
            self.encode.weight = self.decode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x))

    order = execution_order(Tied())
    assert order.modules == ("encode", "decode")
    assert order.holders == {"decode.weight": "encode", "decode.bias": "decode", "encode.bias": "encode"}


def test_a_module_whose_weights_are_read_by_another_runs_there():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.idle = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            assert self.idle.weight.shape[0] == 8 and self.idle.weight.device == x.device  # asking is not using
            return self.last(self.attention(x, x, x)[0])

    order = execution_order(Reader(), torch.rand(2, 3, 8))
    assert order.modules == ("attention", "attention.out_proj", "last")
    assert order.unused == ("idle",)


def test_a_module_with_tensors_of_its_own_comes_before_its_children():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    assert execution_order(nn.Sequential(nn.Linear(3, 3), Scaled())).modules == ("0", "1", "1.inner")
    assert execution_order(Scaled()).modules == ("", "inner")  # the model itself has no name


def test_parametrized_weights_and_modules_without_saved_tensors():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert execution_order(model).modules == ("0", "0.parametrizations.weight")
    assert execution_order(nn.ReLU(), torch.ones(1)).modules == ()


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(fails):
    model = Unfriendly(fails)
    fired = []
    model.bn.register_forward_pre_hook(lambda module, inputs: fired.append(1))
    model.drop.training = False  # modes differ from module to module
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.conv.weight.requires_grad_(False)

    def look():
        return {
            "modes": [module.training for module in model.modules()],
            "buffers": [(name, id(value), value.numpy().tobytes()) for name, value in model.named_buffers()],
            "parameters": [
                (name, id(value), id(value.grad), value.requires_grad, value._version)
                for name, value in model.named_parameters()
            ],
            "hooks": [
                (
                    list(module._forward_pre_hooks),
                    list(module._forward_hooks),
                    len(module._forward_pre_hooks_with_kwargs),
                )
                for module in model.modules()
            ],
            "random": [torch.get_rng_state().tolist(), random.getstate()],
            "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
            "own": (list(model.trained), torch.is_grad_enabled()),
        }

    before = look()
    if fails:
        with pytest.raises(
            UserError, match=r"^Unfriendly cannot be run .*: ValueError: broken on purpose; give an example"
        ):
            execution_order(model)
    else:
        execution_order(model)
    assert look() == before
    assert fired  # the forward was a real one


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(7, 3)), (2, 7)),
        (nn.Sequential(nn.Conv1d(5, 3, 3)), (2, 5, 32)),
        (nn.Sequential(nn.Conv3d(2, 3, 3)), (2, 2, 32, 32, 32)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26**2, 2)), (2, 1, 28, 28)),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(64**2, 2)), (2, 1, 64, 64)),
        (nn.Sequential(nn.Conv2d(1, 1, 8, 8), nn.Flatten(), nn.Linear(28**2, 2)), (2, 1, 224, 224)),
        (nn.Sequential(nn.Linear(6, 9), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 1, 1)), (2, 6)),
        (nn.Linear(4, 2).double(), (2, 4)),
        (nn.Linear(4, 2).bfloat16(), (2, 4)),
        (Shuffled(), (2, 3, 32, 32)),  # not the channels of conv2, which is registered first
    ],
)
def test_an_input_is_guessed(model, shape):
    assert execution_order(model).shape == shape


def test_an_input_may_be_given_or_be_the_models_own():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"set model\.example_input_array = example"):
        execution_order(model)
    assert execution_order(model, torch.tensor([[1, 2]])).modules == ("0", "1")
    model.example_input_array = torch.tensor([[3]])
    assert execution_order(model).shape == (1, 1)
    with pytest.raises(
        UserError, match=r"^Sequential cannot be run on the example input of shape \[1, 2\]: RuntimeError: "
    ):
        execution_order(model, torch.rand(1, 2))
    model.example_input_array = (torch.tensor([[3]]),)
    with pytest.raises(UserError, match="is of type tuple; allowed: one tensor"):
        execution_order(model)


def test_a_given_example_is_not_written_into():
    example = -torch.ones(2, 3)
    execution_order(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), example)
    assert example.max() == -1


def test_models_that_cannot_be_run_are_told():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x + y)

    with pytest.raises(
        UserError, match=r"Two cannot be run .*: TypeError: .*missing 1 required positional argument: 'y';"
    ):
        execution_order(Two())
    with pytest.raises(UserError, match="is on the meta device"):
        execution_order(nn.Linear(3, 3, device="meta"))
    with pytest.raises(UserError, match="has lazy modules"):
        execution_order(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UserError, match="no convolution and no linear layer"):
        execution_order(nn.Sequential(nn.BatchNorm1d(3)))


def test_the_error_of_the_guess_that_came_furthest_is_shown():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(8, 8, 1)
            self.first = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.last(self.first(x))
            raise KeyError("a missing key")

    with pytest.raises(UserError, match="KeyError: 'a missing key'"):
        execution_order(Late())


def test_an_interrupt_passes_and_leaves_no_hook():
    class Stopped(nn.Linear):
        def forward(self, *inputs: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Stopped(3, 3)
    with pytest.raises(KeyboardInterrupt):
        execution_order(model)
    assert model.training and not model._forward_pre_hooks


def test_an_order_is_traced_once_for_an_inventory_and_forgotten_with_it():
    model = Shuffled()
    ran = Counter()
    model.register_forward_pre_hook(lambda module, inputs: ran.update(["all"]))
    inventory = Inventory(model)
    first = order_of(inventory)
    runs = ran["all"]
    assert order_of(inventory) is first and ran["all"] == runs
    assert order_of(inventory, torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)  # a given example counts
    assert order_of(inventory).shape == (1, 3, 8, 8)
    gone = weakref.ref(inventory)
    del inventory
    gc.collect()
    assert gone() is None


def test_a_compiled_model_shows_the_order_of_its_modules():
    compiled = torch.compile(Shuffled(), backend="eager")
    assert isinstance(compiled, nn.Module)
    assert [name.removeprefix("_orig_mod.") for name in execution_order(compiled).modules] == [
        *("conv1", "shortcut.0", "shortcut.1", "conv2", "head")
    ]
