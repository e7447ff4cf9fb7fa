"""Updates in bfloat16 keep norm layers, losses and weights in float32; layouts change nothing but rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.core.errors import UserError
from robustlayers.models import build
from robustlayers.models.norms import norm_names
from robustlayers.normalization import NormPolicy, Switch, convert
from robustlayers.selection.inventory import norm_layers
from robustlayers.training.precision import Layout, computing

CPU = torch.device("cpu")


def _net(seed: int = 0) -> nn.Module:
    return build("resnet", seed=seed, depth=8, width=8)


def _batch(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.arange(n) % 10


def _step(model: nn.Module, **options) -> rl.PartialStep:
    return rl.PartialStep(model, rl.Partition(model, {"all": "all"}), {"all": "natural"}, optimizer=None, **options)


def _cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([found[name].flatten() for name in sorted(found)]) for found in (one, other))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_gradients_of_bf16_are_float32_and_point_the_same_way() -> None:
    x, y = _batch()
    exact = _step(_net()).gradients(x, y)
    rough = _step(_net(), precision="bf16").gradients(x, y)
    assert all(gradient.dtype == torch.float32 for gradient in rough.by_name.values())
    assert rough.log.loss.dtype == torch.float32
    assert exact.by_name.keys() == rough.by_name.keys()
    assert (
        0.98 < _cosine(dict(exact.by_name), dict(rough.by_name)) < 1 - 1e-7
    )  # the same but for rounding, which is there


def test_running_statistics_are_float32_and_close() -> None:
    x, y = _batch()
    nets = [_net(), _net()]
    for net, precision in zip(nets, ("fp32", "bf16"), strict=True):
        _step(net, precision=precision).gradients(x, y)
    for exact, rough in zip(*(net.buffers() for net in nets), strict=True):
        assert rough.dtype == exact.dtype
        if exact.is_floating_point():
            torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", sorted(norm_names()))
def test_every_norm_layer_computes_in_float32(kind: str) -> None:
    try:
        net = convert(_net(), kind)
    except UserError as error:
        pytest.skip(str(error))
    seen: set[torch.dtype] = set()
    layers = norm_layers(net).values()
    for module in layers:
        module.register_forward_hook(lambda module, args, out: seen.add(args[0].dtype))
    x, y = _batch()
    log = _step(net, precision="bf16").gradients(x, y).log
    assert torch.isfinite(log.loss)
    native = all(type(module) is nn.BatchNorm2d for module in layers)  # whose kernel adds up in float32
    assert seen == ({torch.bfloat16} if native else {torch.float32}) or not layers


def test_a_mixture_of_statistics_is_computed_in_float32() -> None:
    policy = NormPolicy(clean=Switch(by="mixture", alpha=0.5))
    x, y = _batch()
    exact = _step(_net(), policy=policy).gradients(x, y)
    rough = _step(_net(), policy=policy, precision="bf16").gradients(x, y)
    assert _cosine(dict(exact.by_name), dict(rough.by_name)) > 0.98


def test_nothing_is_left_behind_after_an_exception() -> None:
    net = convert(_net(), "group")
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    with pytest.raises(RuntimeError), computing(net, "bf16", CPU):
        raise RuntimeError
    assert hooks == [len(module._forward_pre_hooks) for module in net.modules()]
    assert not torch.is_autocast_enabled("cpu")


def test_precision_misspelt() -> None:
    with pytest.raises(UserError, match="precision"):
        _step(_net(), precision="bf61")


def test_training_in_bf16_learns() -> None:
    net = _net()
    step = rl.PartialStep(
        net,
        rl.Partition(net, {"all": "all"}),
        {"all": "adversarial"},
        attack=rl.PGD(rl.Linf("2/255"), steps=2),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        precision="bf16",
    )
    x, y = _batch()
    first = float(step(x, y).loss)
    for _ in range(14):
        last = float(step(x, y).loss)
    assert last < 0.5 * first


# -- layout --------------------------------------------------------------------------------------------------------


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).view(len(x), -1))


def test_channels_last_where_the_model_cannot_notice() -> None:
    x, _ = _batch()
    assert Layout(_net())(x).is_contiguous(memory_format=torch.channels_last)
    assert Layout(Asking())(x) is x  # view would fail
    assert Layout(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))(x) is x  # nothing would gain
    assert Layout(_net())(x[0]) is not None


def test_a_model_that_asks_for_the_layout_is_trained_as_ever() -> None:
    torch.manual_seed(0)
    x, y = _batch()
    assert torch.isfinite(_step(Asking()).gradients(x, y).log.loss)


def test_layout_changes_gradients_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (part.double() if part.is_floating_point() else part for part in _batch())
    last = _step(_net().double()).gradients(x, y).by_name
    monkeypatch.setattr(Layout, "__call__", lambda self, x: x)
    plain = _step(_net().double()).gradients(x, y).by_name
    for name, gradient in plain.items():
        torch.testing.assert_close(last[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_step_trains_on_images_that_are_laid_out() -> None:
    net, seen = _net(), []
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    step = _step(net)
    step._layout._free = True  # a hook on a layer makes the trace give up
    step.gradients(*_batch())
    assert seen == [True]
