import contextlib
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.attacks import guard


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.head = nn.Linear(4, 3)
        self.register_buffer("scratch", torch.tensor([float("nan"), 1.0]), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).mean((2, 3)))


def make():
    net = Net()
    net.body[1].eval()  # modes differ from module to module
    net.head.bias.requires_grad_(False)
    net(torch.rand(8, 1, 6, 6)).sum().backward()  # gradients and statistics that are not the initial ones
    net.norm.bias.grad = None
    net.body[0].register_forward_hook(lambda *_: None)
    net.head.register_full_backward_hook(lambda *_: None)
    return net


def state(net):
    """Everything that must be the same afterwards; objects by identity, tensors by bits."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "modes": [module.training for module in net.modules()],
        "parameters": [(name, id(p), p.requires_grad, id(p.grad)) for name, p in net.named_parameters()],
        "values": [(p.dtype, p.data_ptr(), p.detach().numpy().tobytes()) for p in net.parameters()],
        "gradients": [None if p.grad is None else p.grad.numpy().tobytes() for p in net.parameters()],
        "buffers": [(name, id(b), b.numpy().tobytes()) for name, b in net.named_buffers()],
        "absent": [list(module._buffers) for module in net.modules()],
        "saved": sorted(net.state_dict()),
        "hooks": [
            [
                (name, list(value), list(map(id, value.values())))
                for name, value in vars(module).items()
                if "hook" in name and isinstance(value, dict)
            ]
            for module in net.modules()
        ],
        "hook kind": [module._is_full_backward_hook for module in net.modules()],
        "children": [[(name, id(child)) for name, child in module.named_children()] for module in net.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), numpy_state[2:]),
        "autograd": torch.is_grad_enabled(),
    }


X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def backward(net):
    net.requires_grad_(True)
    net.train()(X).square().sum().backward()


def flip_modes(net):
    for module in net.modules():
        module.training = not module.training


def step_statistics(net):
    net.train()(X)


def write_statistics(net):
    net.norm.running_mean.fill_(7)
    net.norm.running_var.data = torch.zeros(4)
    net.scratch.zero_()


def replace_statistics(net):
    net.norm.running_mean = torch.full((4,), 7.0)
    net.scratch = torch.zeros(5)
    net.absent = torch.zeros(2)


def resize_statistics(net):
    net.scratch.data = torch.zeros(7, dtype=torch.float64)


def convert(net):
    net.double()


def register(net):
    net.register_buffer("extra", torch.zeros(1))
    net.register_parameter("more", nn.Parameter(torch.zeros(1)))
    net.add_module("wrapper", nn.Linear(2, 2))
    del net._buffers["scratch"]


def replace_parts(net):
    net.head.weight = nn.Parameter(torch.zeros(3, 4))
    net.body[1] = nn.Identity()


def hook(net):
    net.register_forward_hook(lambda *_: None)
    net.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    net.body[1].register_full_backward_hook(lambda *_: None)
    net.body[0]._forward_hooks.clear()
    net.norm._forward_hooks = {}


def draw(net):
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)


def stop_autograd(net):
    torch.set_grad_enabled(False)


def set_gradients(net):
    net.head.weight.grad = torch.ones(3, 4)
    net.requires_grad_(True).zero_grad()


FOREIGN = [
    backward, flip_modes, step_statistics, write_statistics, replace_statistics, resize_statistics, convert, register,
    replace_parts, hook, draw, stop_autograd, set_gradients,
]  # fmt: skip


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("attack", FOREIGN, ids=lambda attack: attack.__name__)
def test_a_foreign_attack_leaves_no_trace(attack, raises):
    net = make()
    before = state(net)
    with contextlib.suppress(ZeroDivisionError), guard(net):
        attack(net)
        changed = state(net)
        if raises:
            raise ZeroDivisionError
    assert state(net) == before
    # The planted attack did something, beyond what the guard itself does on entry.
    with guard(net):
        entered = state(net)
    assert changed != entered


def test_nobody_pays_for_gradients_of_the_weights():
    net = make()
    with guard(net):
        assert not any(p.requires_grad for p in net.parameters())
        assert all(p.grad is None for p in net.parameters())
        x = X.clone().requires_grad_()
        net(x).sum().backward()
        assert x.grad is not None and all(p.grad is None for p in net.parameters())


def test_keep_statistics_keeps_the_updates_and_only_those():
    net = make()
    before = state(net)
    count = int(net.norm.num_batches_tracked)
    with guard(net, keep_statistics=True):
        net.norm(torch.rand(8, 4, 2, 2))
        flip_modes(net)
    after = state(net)
    assert int(net.norm.num_batches_tracked) == count + 1
    assert {key for key in before if before[key] != after[key]} == {"buffers"}


def test_guards_nest():
    net = make()
    before = state(net)
    with guard(net):
        outer = state(net)
        with guard(net):
            backward(net)
        assert state(net) == outer
    assert state(net) == before


def test_handles_of_hooks_still_work_afterwards():
    net, calls = make(), []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    with guard(net):
        net._forward_hooks.clear()
    net(X)
    handle.remove()
    net(X)
    assert calls == [1]


def test_a_graph_from_before_can_still_be_differentiated():
    net = make().eval()  # evaluation mode: the graph keeps the running statistics
    loss = net(X).sum()
    with guard(net):
        step_statistics(net)
    net.zero_grad()
    loss.backward()
    assert net.head.weight.grad is not None


def test_tied_and_repeated_modules():
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(norm, nn.Sequential(norm))
    net[1].register_buffer("alias", norm.running_mean)
    with guard(net):
        net(X)
    assert norm.running_mean.item() == 0 and net[1].alias is norm.running_mean


def test_it_is_cheap():
    # 81 modules, 140 parameters and buffers, about a ResNet-18: 1 ms here; the bound leaves room for a busy machine.
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(20)))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        with guard(net):
            pass
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.01
