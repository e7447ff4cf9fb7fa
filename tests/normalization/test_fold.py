"""The crafting forward equals the plain model in evaluation mode, under attacks too, and leaves no trace in it."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustlayers.attacks import PGD, Linf
from robustlayers.normalization import inference
from robustlayers.normalization.fold import crafting_forward
from robustlayers.normalization.fold_scaling import Scaling, Scalings

_spec = importlib.util.spec_from_file_location("fold_cases", Path(__file__).with_name("fold_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

MODELS, X, Y = cases.MODELS, cases.X, cases.Y
UserNet, distance, images, scramble = cases.UserNet, cases.distance, cases.images, cases.scramble


@pytest.fixture(params=cases.MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    return cases.case(request.param)


@pytest.fixture
def small() -> nn.Module:
    return cases.small()


@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_plain_model(case: tuple[nn.Module, Tensor, int, int], channels_last: bool) -> None:
    model, x, folded, fused = case
    forward = crafting_forward(model, channels_last=channels_last)
    assert (forward.folded, forward.fused, forward.as_it_is, forward.reason) == (folded, fused, {}, "")
    assert distance(model, forward, x) < 1e-10


def test_equals_the_plain_model_in_single_precision(case: tuple[nn.Module, Tensor, int, int]) -> None:
    model, x, _, _ = case
    model.float()
    assert distance(model, crafting_forward(model), x.float()) < 1e-4


def test_channels_last_only_where_the_code_cannot_notice(small: nn.Module) -> None:
    assert crafting_forward(small, channels_last=True).channels_last
    assert not crafting_forward(UserNet(), channels_last=True).channels_last  # calls view


def test_folding_removes_the_norm_layers_from_the_autograd_graph(small: nn.Module) -> None:
    def kinds(logits: Tensor) -> set[str]:
        seen, todo = set(), [logits.grad_fn]
        while todo:
            function = todo.pop()
            if function is not None and function not in seen:
                seen.add(function)
                todo += [parent for parent, _ in function.next_functions]
        return {type(function).__name__ for function in seen}

    x = X.clone().requires_grad_()
    with inference(small):
        assert any("BatchNorm" in kind for kind in kinds(small(x)))
    found = kinds(crafting_forward(small)(x))
    assert not any("BatchNorm" in kind for kind in found)
    assert sum("AccumulateGrad" in kind for kind in found) == 1  # the images', no parameter's


def test_wrong_images_get_the_models_own_message(small: nn.Module) -> None:
    forward = crafting_forward(small)
    for wrong in (X[:, :1], X[0], (X * 255).byte()):
        with pytest.raises(Exception) as plain:
            small(wrong)
        with pytest.raises(type(plain.value), match="model input") as folded:
            forward(wrong)
        assert str(folded.value) == str(plain.value)


# -- no trace, attacks, planted faults -------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(case: tuple[nn.Module, Tensor, int, int]) -> None:
    model, x, _, _ = case
    model.train()
    next(model.modules()).training = False  # an uneven state
    next(model.parameters()).requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers()]
        held = [(id(t), t.data_ptr(), t.requires_grad, id(t.grad), t._version, t.detach().clone()) for t in tensors]
        modules = [(id(m), m.training, {k: id(v) for k, v in vars(m).items()}) for m in model.modules()]
        hooks = [list(v) for m in model.modules() for k, v in sorted(vars(m).items()) if "hooks" in k]
        return [[row[:-1] for row in held], modules, hooks, [row[-1] for row in held], torch.get_rng_state()]

    before = state()
    forward = crafting_forward(model)
    images = x.clone().requires_grad_()
    forward(images).sum().backward()
    forward.refresh()
    PGD(Linf("8/255"), steps=2)(forward, x, Y[:3] % 4)
    after = state()
    assert before[:3] == after[:3]
    assert all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(before[4], after[4])
    assert not isinstance(forward, nn.Module)


@pytest.mark.parametrize("name", ["resnet-B", "preact"])
def test_pgd_finds_the_same_images(name: str) -> None:
    make, size, _, _ = MODELS[name]
    model = scramble(make()).double()
    x = images(4, 3, size, size)
    attack = PGD(Linf("8/255"), steps=5, step_size="2/255")
    forward = crafting_forward(model)
    with inference(model):
        wanted = attack(model, x, Y, generator=torch.Generator().manual_seed(3))
    found = attack(forward, x, Y, generator=torch.Generator().manual_seed(3))
    # Where the gradient is rounding noise around zero, its sign may differ.
    assert float(((wanted - found).abs() > 1e-9).double().mean()) < 1e-3
    assert not torch.equal(wanted, x)


def test_works_in_every_grad_mode(small: nn.Module) -> None:
    with torch.inference_mode():
        forward = crafting_forward(small)
        forward.refresh()
        values = forward(X)
    assert distance(small, forward, X) < 1e-10
    assert not forward(X).requires_grad
    assert torch.allclose(values, forward(X))


def _without_eps(self: Scaling) -> None:
    self.eps = 0.0


def _without_bias(self: Scaling) -> None:
    self.bias = None


def _without_beta(self: Scaling) -> None:
    self.beta = None


@pytest.mark.parametrize("fault", [_without_eps, _without_bias, _without_beta])
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Scaling], None]) -> None:
    model = scramble(UserNet()).double()
    assert distance(model, crafting_forward(model), X) < 1e-10
    right = Scaling.__post_init__

    def wrong(self: Scaling) -> None:
        right(self)
        fault(self)

    monkeypatch.setattr(Scaling, "__post_init__", wrong)
    assert distance(model, crafting_forward(model), X) > 1e-4


def test_scaling_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=0.5)
    for tensor, value in ((norm.weight, 3.0), (norm.bias, 7.0), (norm.running_mean, 2.0), (norm.running_var, 3.5)):
        assert tensor is not None
        tensor.data.fill_(value)
    scaling = Scaling.of(norm, torch.tensor([11.0]))
    with torch.no_grad():
        Scalings([scaling]).compute()
    assert math.isclose(scaling.scale.item(), 1.5, rel_tol=1e-6)
    assert math.isclose(scaling.shift.item(), 1.5 * (11 - 2) + 7, rel_tol=1e-6)
