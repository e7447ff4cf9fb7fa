import copy

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.normalization import crafting_forward, inference, normalizing
from robustlayers.normalization.layers import DualBatchNorm
from robustlayers.selection import is_norm, select

CELLS = [(True, True), (False, True), (True, False), (False, False)]


def dual(own_statistics=True, own_affine=True, channels=3, **settings):
    return DualBatchNorm(nn.BatchNorm2d(channels, **settings), own_statistics=own_statistics, own_affine=own_affine)


def names(layer, branch):
    """Map the tensors of torch's batch norm to those of a branch."""
    found = {}
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        own = layer.own_affine if name in ("weight", "bias") else layer.own_statistics
        found[name] = f"{branch if own else 'shared'}.{name}"
    return found


class Branch(nn.Module):
    """One branch of a dual norm as a layer, with its parameters and the shared ones only."""

    def __init__(self, layer, branch):
        super().__init__()
        self.layer, other = layer, {"main": "auxiliary", "auxiliary": "main"}[branch]
        layer.branch = branch
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(f"{other}."))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("branch", ["main", "auxiliary"])
@pytest.mark.parametrize("cell", CELLS)
def test_each_branch_is_torchs_batch_norm(cell, branch, momentum, same_as_torch):
    layer = dual(*cell, momentum=momentum)
    wrapped = Branch(layer, branch)
    buffers = {f"layer.{ours}": name for name, ours in names(layer, branch).items() if name not in ("weight", "bias")}
    same_as_torch(wrapped, nn.BatchNorm2d(3, momentum=momentum), 4, 3, 2, 2, buffers=buffers)


@pytest.mark.parametrize("cell", CELLS)
def test_training_one_branch_never_moves_the_others_private_tensors(cell, bits, values):
    for branch, other in (("main", "auxiliary"), ("auxiliary", "main")):
        layer = dual(*cell).double().train()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer.branch = branch
        before = bits(layer)
        for step in range(2):
            optimizer.zero_grad()
            layer(values(4, 3, 2, 2, seed=step)).pow(3).sum().backward()
            optimizer.step()
        after = bits(layer)
        moved = {name for name in before if before[name] != after[name]}
        assert moved == set(names(layer, branch).values())
        assert not any(name.startswith(f"{other}.") for name in moved)


@pytest.mark.parametrize("cell", CELLS)
def test_either_branch_can_be_evaluated_and_crafted_on(cell, values):
    # A published fault: the auxiliary branch could be trained, but nothing could evaluate it.
    spec = {"name": "dual", "own_statistics": cell[0], "own_affine": cell[1]}
    model = models.build("small-cnn", seed=0, norm=spec, width=4, channels=3).eval()
    layers = [module for module in model.modules() if isinstance(module, DualBatchNorm)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1 and tensor.is_floating_point() and len(tensor) != 3:
                tensor.uniform_(0.5, 1.5, generator=generator)
    x = torch.rand(4, 3, 8, 8, generator=generator)
    crafting = crafting_forward(model)
    logits = {}
    for branch in DualBatchNorm.branches:
        for layer in layers:
            layer.branch = branch
        crafting.refresh()
        logits[branch] = model(x)
        torch.testing.assert_close(crafting(x), logits[branch], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["main"], logits["auxiliary"]) == (cell == (False, False))


def test_the_context_reaches_the_statistics_of_each_branch(values):
    layer = dual().double()
    x = values(4, 3, 2, 2)
    layer.branch = "auxiliary"
    with normalizing(layer, {layer.auxiliary: ("batch", True)}, training=True):
        layer(x)
    assert int(layer.get_buffer("auxiliary.num_batches_tracked")) == 1
    assert int(layer.get_buffer("main.num_batches_tracked")) == 0
    with inference(layer):
        by_running = layer(x)
    torch.testing.assert_close(by_running, layer.eval()(x))


@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_round_trip_without_the_branch(cell, values):
    source, target = dual(*cell).double(), dual(*cell).double()
    for branch in source.branches:
        source.branch = branch
        source(values(4, 3, 2, 2, seed=len(branch)))
    target.load_state_dict(source.state_dict())
    assert target.branch == "main"
    for branch in source.branches:
        source.branch = target.branch = branch
        assert torch.equal(source.eval()(values(4, 3, 2, 2)), target.eval()(values(4, 3, 2, 2)))
    assert copy.deepcopy(source).branch == "auxiliary"


def test_which_tensors_there_are_and_that_selectors_find_them():
    affine, statistics = {"weight", "bias"}, {"running_mean", "running_var", "num_batches_tracked"}
    for cell in CELLS:
        layer = dual(*cell)
        expected = {name for branch in layer.branches for name in names(layer, branch).values()}
        assert set(layer.state_dict()) == expected
        assert all(is_norm(module) for module in layer.modules())
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3, 2))
        assert len(select(model, "norm")) == len(expected)
        assert {name.rpartition(".")[2] for name in select(model, "norm.statistics")} == statistics
        assert {name.rpartition(".")[2] for name in select(model, "norm.affine")} == affine


def test_gradcheck_where_a_half_is_shared(values):
    for cell in ((False, True), (True, False)):
        layer = dual(*cell, channels=2, track_running_stats=True).double().eval()
        layer.branch = "auxiliary"
        assert torch.autograd.gradcheck(layer, (values(3, 2, 2, 2).requires_grad_(),))


def test_autocast_gives_what_batch_norm_gives(values):
    x = values(4, 3, 2, 2).float().bfloat16()
    for cell in CELLS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = dual(*cell)(x), nn.BatchNorm2d(3)(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_mistakes_are_told():
    layer = dual()
    layer.branch = "aux"
    with pytest.raises(UserError, match="unknown branch of DualBatchNorm 'aux'; nearest: auxiliary"):
        layer(torch.rand(2, 3, 2, 2))
    with pytest.raises(UserError, match="GroupNorm has no statistics and scale and shift that could be divided"):
        DualBatchNorm(nn.GroupNorm(1, 3), own_statistics=False)
    assert DualBatchNorm(nn.GroupNorm(1, 3)).channels == 3
