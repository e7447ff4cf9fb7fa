"""Norm reports: known statistics come back, planted faults are seen, and nothing is left behind."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers import models
from robustlayers.attacks import PGD, Linf, Noise
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import convert, recalibrate
from robustlayers.normalization.distances import symmetric_kl, wasserstein
from robustlayers.normalization.layers import RandomNorm
from robustlayers.normalization.report import effective_rates, norm_report, study_rows

PGD3 = PGD(Linf("8/255"), steps=3)


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(n, means, deviations, seed=0, shape=()):
    draw = torch.randn(n, len(means), *shape, generator=stream(seed, "gaussian"), dtype=torch.float64)
    place = (1, -1, *(1,) * len(shape))
    return draw * torch.tensor(deviations).double().view(place) + torch.tensor(means).double().view(place)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (9,)), (nn.BatchNorm2d, (4, 5)), (nn.BatchNorm3d, (2, 3, 2))],
)
def test_known_gaussians(make, shape):
    layer = make(2).double()
    x = gaussian(4000, (1.0, -3.0), (2.0, 0.5), shape=shape)
    found = norm_report(layer, [x[:2000], x[2000:]]).layers[0].passes["clean"]
    assert found.forwards == 2
    assert found.mean == pytest.approx((1.0, -3.0), abs=0.12)
    assert found.variance == pytest.approx((4.0, 0.25), rel=0.08)
    # Running statistics are N(0, 1): closed forms for the true moments.
    assert found.wasserstein == pytest.approx((2**0.5, 9.25**0.5), rel=0.1)
    assert found.kl == pytest.approx(((9 + 1 * 5) / 8, (0.5625 + 9 * 1.25) / 0.5), rel=0.1)


def test_statistics_are_torchs():
    x = gaussian(64, (0.5, 2.0, -1.0), (1.0, 3.0, 0.2), shape=(3, 3))
    layer = nn.BatchNorm2d(3, momentum=None).double()
    reference: Any = copy.deepcopy(layer)
    for part in x.split(16):
        reference(part)
    found = norm_report(layer, x.split(16)).layers[0].passes["clean"]
    assert torch.allclose(wide(found.mean), reference.running_mean, rtol=1e-12)
    assert torch.allclose(wide(found.variance), reference.running_var, rtol=1e-12)


def test_statistics_of_instance_norm_are_torchs():
    x = gaussian(12, (0.5, 2.0), (1.0, 3.0), shape=(3, 3))
    layer = nn.InstanceNorm2d(2, momentum=1.0, track_running_stats=True, affine=True).double()
    reference: Any = copy.deepcopy(layer)
    reference(x)
    found = norm_report(layer, [x]).layers[0].passes["clean"]
    assert torch.allclose(wide(found.mean), reference.running_mean, rtol=1e-12)
    assert torch.allclose(wide(found.variance), reference.running_var, rtol=1e-12)
    assert found.lipschitz == ()


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_after_a_recalibration_the_distances_are_zero(net, batch, name):
    model = net(name, torch.float64)
    batches = [batch(8, seed, torch.float64) for seed in range(3)]
    before = norm_report(model, batches, by="batch")
    recalibrate(model, batches)
    after = norm_report(model, batches, by="batch")
    for layer in after.layers:
        assert max(layer.passes["clean"].kl) < 1e-20
        assert layer.passes["clean"].mean_l2 < 1e-12  # pyright: ignore[reportOptionalOperand]
        assert max(before.layer(layer.name).passes["clean"].kl) > 1e-2


def test_by_running_statistics_the_first_layer_is_zero_too(net, batch):
    model, data = net("resnet", torch.float64), [batch(32, 0, torch.float64)]
    recalibrate(model, data)
    found = norm_report(model, data).layers
    assert max(found[0].passes["clean"].kl) < 1e-20
    assert max(max(layer.passes["clean"].kl) for layer in found) < 1e-2


def test_passes_see_their_own_images(net, batch):
    model, (x, y) = net("small-cnn", torch.float64), batch(8, 0, torch.float64)
    inputs = {"clean": None, "adversarial": PGD3, "noise": Noise(Linf("16/255"))}
    report = norm_report(model, [(x, y)], inputs=inputs, gradients=False)
    crafted = PGD3(copy.deepcopy(model).eval(), x, y, generator=stream(0, "norm-report", "adversarial", 0))
    alone = norm_report(model, [crafted])
    for layer in report.layers:
        mine = layer.passes["adversarial"]
        assert mine.mean == pytest.approx(alone.layer(layer.name).passes["clean"].mean, rel=1e-9)
        assert len({one.mean for one in layer.passes.values()}) == 3
        running = wide(layer.running_mean), wide(layer.running_variance)
        shown = wide(mine.mean), wide(mine.variance)
        assert mine.wasserstein == pytest.approx(wasserstein(*running, *shown).tolist())
        assert mine.kl == pytest.approx(symmetric_kl(*running, *shown, 1e-5).tolist())


def test_dead_channels_are_found_and_rows_add_up(net, batch):
    model = net("resnet")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    planted = {}
    with torch.no_grad():
        for position, (name, module) in enumerate(norms.items()):
            planted[name] = tuple(range(min(position, len(module.weight))))
            for channel in planted[name]:
                module.weight[channel] = (-1) ** channel * 0.009
    report = norm_report(model, [batch()], dead=0.01)
    assert {layer.name: layer.dead for layer in report.layers} == planted
    rows = report.rows()
    for metric in ("dead_channels", "scaled_channels"):
        values = {row["layer"]: row["value"] for row in rows if row["metric"] == metric}
        assert values.pop("all") == sum(values.values()) > 0
    dead = sum(map(len, planted.values()))
    assert report.dead_share == dead / sum(len(module.weight) for module in norms.values())
    assert norm_report(model, [batch()], dead=0.008).dead_share == 0
    assert all(set(row) == {"layer", "pass", "metric", "value"} for row in rows)
    assert len({(row["layer"], row["pass"], row["metric"]) for row in rows}) == len(rows)


def test_the_mean_over_all_channels(net, batch):
    report = norm_report(net("resnet"), [batch()])
    whole = [row["value"] for row in report.rows() if (row["layer"], row["metric"]) == ("all", "kl_mean")]
    every = [value for layer in report.layers for value in layer.passes["clean"].kl]
    assert whole == [pytest.approx(sum(every) / len(every))]


class Backwards(nn.Module):
    """Registered in one order, run in another; one layer never runs."""

    def __init__(self):
        super().__init__()
        self.late, self.never, self.early = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x).relu()))


def test_layers_stand_in_execution_order():
    report = norm_report(Backwards(), [(torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1]))])
    assert [layer.name for layer in report.layers] == ["early", "late", "never"]
    assert [list(layer.passes) for layer in report.layers] == [["clean"], ["clean"], []]


class Own(nn.BatchNorm1d):
    """A subclass with a forward and an `eps` of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        return super().forward(input) * 2


def test_user_subclasses_and_layers_used_twice():
    layer = Own(3, eps=0.5)
    report = norm_report(nn.Sequential(layer, layer), [torch.rand(6, 3)])
    assert [one.kind for one in report.layers] == ["Own"]
    assert report.layers[0].passes["clean"].forwards == 2
    assert report.layers[0].lipschitz == pytest.approx([1 / 1.5**0.5] * 3)


@pytest.mark.parametrize("kind", ["group", "instance", "layer", "batch-at-test", "robust", "batch-no-affine", "film"])
def test_what_a_layer_lacks_is_empty(net, batch, kind):
    model = convert(net("small-cnn"), kind)
    report = norm_report(model, [batch()])
    rows = report.rows()
    assert rows
    for layer in report.layers:
        tracked = layer.kind == "BatchNorm2d" and bool(layer.running_mean)
        assert all(bool(one.kl) == bool(one.wasserstein) == tracked for one in layer.passes.values())
        assert bool(layer.lipschitz) == tracked
    assert any(row["metric"] == "dead_share" for row in rows) == (kind != "batch-no-affine")


def test_layer_norm_counts_its_last_dimensions():
    x = gaussian(50, (0.0, 1.0, 2.0), (1.0, 2.0, 3.0))
    net = nn.Sequential(nn.LayerNorm(3), nn.RMSNorm(3), nn.LocalResponseNorm(2)).double()
    found = norm_report(net, [x.unsqueeze(1)]).layers
    assert found[0].passes["clean"].mean == pytest.approx(x.mean(0).tolist())
    assert [len(layer.scale) for layer in found] == [3, 3, 0]
    assert found[2].passes["clean"].mean == ()


@pytest.mark.parametrize("halves", [(True, True), (False, True), (True, False), (False, False)])
def test_dual_norms_by_branch(net, batch, halves):
    own_statistics, own_affine = halves
    model = convert(net("small-cnn"), "dual", own_statistics=own_statistics, own_affine=own_affine)
    inputs = {"clean": None, "adversarial": PGD3}
    report = norm_report(model, [batch()], inputs=inputs, branches={"adversarial": "auxiliary"})
    children = ["main", "auxiliary"] if any(halves) else []
    children += ["shared"] if not all(halves) else []
    first = report.layers[: len(children)]
    assert {layer.name.rpartition(".")[2] for layer in first} == set(children)
    assert len({layer.name.rpartition(".")[0] for layer in first}) == 1
    for layer in report.layers:
        wanted = {"main": ["clean"], "auxiliary": ["adversarial"], "shared": ["clean", "adversarial"]}
        assert list(layer.passes) == wanted[layer.name.rpartition(".")[2]]
    assert {module.branch for module in model.modules() if hasattr(module, "branches")} == {"main"}


def ratio(parameter):
    return (parameter.grad.norm() / parameter.norm()).item()


def test_rates_are_gradients_over_weights(net, batch):
    model, (x, y) = net("resnet", torch.float64), batch(6, 0, torch.float64)
    reference = copy.deepcopy(model).eval()
    functional.cross_entropy(reference(x), y).backward()
    report = norm_report(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    for layer in report.layers:
        own = reference.get_submodule(layer.name)
        one = layer.passes["clean"]
        assert one.scale_rate == pytest.approx(ratio(own.weight))
        assert one.shift_rate == pytest.approx(ratio(own.bias))
    rates = effective_rates(model, [(x, y)], select="conv")
    for name, rate in rates.items():
        assert rate == pytest.approx(ratio(reference.get_parameter(name)))
    assert len(rates) == sum(isinstance(module, nn.Conv2d) for module in model.modules())


def test_without_labels_or_with_shifts_of_zero_there_are_no_rates(batch):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    x, y = batch()
    one = norm_report(net, [x]).layers[0].passes["clean"]
    assert one.scale_rate is None and one.shift_rate is None
    one = norm_report(net, [(x, y)], gradients=False).layers[0].passes["clean"]
    assert one.scale_rate is None
    one = norm_report(net, [(x, y)]).layers[0].passes["clean"]
    assert one.scale_rate is not None and one.shift_rate is None  # a shift of 0 has no length


def test_scaled_weights_have_a_smaller_rate(net, batch):
    model, data = net("small-cnn", torch.float64), [batch(8, 0, torch.float64)]
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    before = effective_rates(model, data, select=f'"{name}.weight"', by="batch")
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").mul_(10)
    after = effective_rates(model, data, select=f'"{name}.weight"', by="batch")
    assert after[f"{name}.weight"] == pytest.approx(before[f"{name}.weight"] / 100, rel=1e-3)


def look(model):
    hooks = [len(vars(module)[name]) for module in model.modules() for name in vars(module) if name.endswith("_hooks")]
    draws = [module._draws.count for module in model.modules() if isinstance(module, RandomNorm)]
    return (
        [module.training for module in model.modules()],
        [(id(p), p.requires_grad, id(p.grad), p._version) for p in model.parameters()],
        [id(b) for b in model.buffers()],
        [getattr(module, "branch", None) for module in model.modules()],
        hooks,
        draws,
        [sorted(vars(module)) for module in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002  # pyright: ignore
        torch.is_grad_enabled(),
    )


def mixed(model):
    for position, module in enumerate(model.modules()):
        module.training = position % 2 == 0
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 > 0)
        parameter.grad = torch.ones_like(parameter)
    return model


def rude(forward, x, y, *, generator):
    """Touches what it can, and then gives up if told so."""
    _ = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    forward.train()
    forward(x.detach())
    for parameter in forward.parameters():
        parameter.requires_grad_(True)
    forward(x).sum().backward()
    return x


def failing(forward, x, y, *, generator):
    rude(forward, x, y, generator=generator)
    raise RuntimeError("no more")


@pytest.mark.parametrize("kind", ["batch", "dual", "random", "film(dual=true)", "adapter"])
@pytest.mark.parametrize("by", ["running", "batch"])
@pytest.mark.parametrize("attack", [PGD3, rude, failing])
def test_nothing_is_left_behind(net, batch, bits, kind, by, attack):
    model = mixed(convert(net("small-cnn"), kind))
    values, state = bits(model), look(model)
    for run in (norm_report, effective_rates):
        named: Any = {"inputs": {"clean": None, "bad": attack}} if run is norm_report else {"attack": attack}
        if attack is failing:
            with pytest.raises(RuntimeError, match="no more"):
                run(model, [batch(), batch()], by=by, **named)
        else:
            run(model, [batch(), batch()], by=by, **named)
        assert bits(model) == values
        assert look(model) == state


def test_repeated_reports_are_equal_and_seeds_matter(net, batch):
    model, data = convert(net("small-cnn"), "random"), [batch()]
    inputs = {"noise": Noise(Linf("16/255"))}
    with torch.inference_mode():
        one = norm_report(model, data, inputs=inputs)
    assert one == norm_report(model, data, inputs=inputs)
    assert one != norm_report(model, data, inputs=inputs, seed=1)


def test_a_selector_picks_layers(net, batch):
    model = net("resnet")
    every = [layer.name for layer in norm_report(model, [batch()]).layers]
    some = [layer.name for layer in norm_report(model, [batch()], select="norm.weight & stage(2)").layers]
    assert 0 < len(some) < len(every) and some == [name for name in every if name in some]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"select": "conv"}, "picks no norm layer"),
        ({"by": "frozen"}, "unknown statistics to normalize by 'frozen'"),
        ({"dead": 0}, "more than 0"),
        ({"branches": {"noise": "main"}}, "unknown pass 'noise'"),
        ({"branches": {"clean": "auxiliary"}}, "unknown branch"),
        ({"inputs": {"adversarial": PGD3}}, "need labels"),
    ],
)
def test_mistakes(net, batch, bits, named, said):
    model = net("small-cnn")
    before = bits(model), look(model)
    with pytest.raises(UserError, match=said):
        norm_report(model, [batch()[0]], **named)
    assert (bits(model), look(model)) == before


def test_batches_that_cannot_be_used(net, batch):
    model, (x, y) = net("mlp"), batch()
    with pytest.raises(UserError, match="there was no batch"):
        norm_report(model, [])
    with pytest.raises(UserError, match="batch 2 is empty"):
        norm_report(model, [x, x[:0]])
    with pytest.raises(UserError, match=r"2: an input of shape .* one value per channel"):
        norm_report(model, [x, x[:1]])
    with pytest.raises(UserError, match="cannot be run"):
        norm_report(model, [torch.rand(3, 5)])
    with pytest.raises(UserError, match="integer labels"):
        norm_report(model, [(x, y.float())])
    with pytest.raises(UserError, match="has no norm layer"):
        norm_report(nn.Linear(2, 2), [torch.rand(3, 2)])
    with pytest.raises(UserError, match="unknown norm layer '3'"):
        norm_report(model, [x]).layer("3")
    with pytest.raises(UserError, match="need labels"):
        effective_rates(model, [x])
    with pytest.raises(UserError, match="picks no parameter"):
        effective_rates(model, [(x, y)], select="norm.statistics")


def test_rows_of_a_study(net):
    model = net("small-cnn")
    generator = stream(0, "images")
    images = torch.randint(0, 256, (21, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (21,), generator=generator)
    noise = Noise(Linf("8/255"))
    rows = study_rows(model, images, labels, PGD3, noise=noise, batch_size=10)
    assert {row["pass"]: row["attack"] for row in rows} == {
        "": "",
        "clean": "",
        "adversarial": PGD3.describe(),
        "noise": noise.describe(),
    }
    assert {(row["pass"] != "", row["split"]) for row in rows} == {(True, "validation"), (False, "")}
    batches = [(x / 255, y) for x, y in zip(images.float().tensor_split(3), labels.tensor_split(3), strict=True)]
    plain = norm_report(model, batches, inputs={"clean": None, "adversarial": PGD3, "noise": noise}).rows()
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in plain])
    assert (
        study_rows(models.build("small-cnn", seed=0, width=3, channels=1, classes=3, norm="none"), images, labels, PGD3)
        == []
    )
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    assert any(row["value"] is None for row in study_rows(model, images, labels, PGD3))
