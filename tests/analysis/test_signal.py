import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.analysis._axes import round_ticks
from robustlayers.analysis.activations import activations
from robustlayers.analysis.signal import NORMS, SignalExcess, signal_ratio
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_the_ratio_of_a_linear_layer_is_the_operators():
    a, x = rand(5, 4, seed=1) - 0.5, 0.2 + 0.6 * rand(30, 4)
    d = 0.1 * (rand(30, 4, seed=2) - 0.5)
    found = signal_ratio(linear(a), x, {"d": x + d}, batch_size=7)
    for norm, p in NORMS.items():
        expected = np.linalg.norm((d @ a.T).numpy(), p, axis=1) / np.linalg.norm((x @ a.T).numpy(), p, axis=1)
        assert np.allclose(found.ratios("d", norm)[0], expected, rtol=1e-10)
    # Along the first right singular vector the difference grows by the largest singular value.
    _, s, v = torch.linalg.svd(a, full_matrices=False)
    moved = x[:1] + 0.01 * v[0]
    top = float(signal_ratio(linear(a), x[:1], {"v": moved}).ratios("v")[0, 0])
    assert top == pytest.approx(float(0.01 * s[0] / (x[:1] @ a.T).norm()), rel=1e-8)


def test_every_layer_and_channel_is_what_the_features_say(net, batch):
    model, (x, _) = net("resnet", torch.float64), batch(9, dtype=torch.float64)
    moved = (x + 0.1 * (rand(*x.shape, seed=5) - 0.5)).clamp(0, 1)
    found = signal_ratio(model, x, {"other": moved, "same": x}, batch_size=4)
    (clean,), (dirty,) = activations(model, x), activations(model, moved)
    assert [layer.name for layer in found.layers] == list(clean)
    for place, name in enumerate(clean):
        f, e = clean[name].numpy(), (dirty[name] - clean[name]).numpy()
        for row, (norm, p) in enumerate(NORMS.items()):
            whole = [np.linalg.norm(e[i].ravel(), p) / np.linalg.norm(f[i].ravel(), p) for i in range(9)]
            assert np.allclose(found.ratios("other", norm)[place], whole, rtol=1e-9)
            channels = [
                sum(np.linalg.norm(e[i, c].ravel(), p) for i in range(9))
                / sum(np.linalg.norm(f[i, c].ravel(), p) for i in range(9))
                if f[:, c].any()
                else math.nan
                for c in range(f.shape[1])
            ]
            assert np.allclose(found.channels["other"][place][row], channels, rtol=1e-9, equal_nan=True)
    assert not found.ratios("same").any()


def test_perturbations_stay_floats_so_that_nothing_wraps_around():
    """A cast to bytes turns 255 + 8 into 7: the published code's fault gives another ratio, and is refused here."""
    x = torch.full((1, 1, 4, 4), 1.0)
    moved = (x + 8 / 255).clamp(0, 1)  # nothing is left of it
    wrapped = torch.from_numpy((255 * x.double().numpy() + 8).astype(np.int64).astype(np.uint8))
    assert wrapped.max() == 7
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert signal_ratio(net, x, {"adversarial": moved}).ratios("adversarial").max() == 0
    assert signal_ratio(net, x, {"faulty": wrapped.float() / 255}).ratios("faulty").max() > 0.1
    with pytest.raises(UserError, match=r"faulty: perturbed images stay floats .* got torch.uint8"):
        signal_ratio(net, x, {"faulty": wrapped})
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        signal_ratio(net, x, {"unclipped": x + 8 / 255})
    small = signal_ratio(net, torch.full((1, 1, 4, 4), 0.5), {"small": torch.full((1, 1, 4, 4), 0.5 + 0.4 / 255)})
    assert small.ratios("small").max() > 0  # which bytes cannot hold


def test_a_silent_layer_has_no_ratio_and_a_woken_one_an_infinite_one():
    gate = nn.Linear(1, 2).double()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        gate.bias.copy_(torch.tensor([-0.5, -1.0]))
    net = nn.Sequential(gate, nn.ReLU())
    x = torch.tensor([[0.2], [0.4], [0.6]], dtype=torch.float64)
    found = signal_ratio(net, x, {"up": x + 0.2}, layers=["1"])
    assert np.allclose(found.ratios("up")[0], [math.nan, math.inf, 2.0], equal_nan=True)
    assert np.allclose(found.quantiles("up", levels=(0.1, 0.9))[0], [2.0, math.inf])
    assert np.allclose(found.channels["up"][0][1], [0.3 / 0.1, math.nan], equal_nan=True)
    rows, channels = found.rows(), found.channel_rows()
    assert rows[0]["q95"] is None and rows[0]["samples"] == 3 and channels[1]["l2"] is None
    json.dumps([*rows, *channels], allow_nan=False)
    found.plot()


def test_an_operator_that_writes_into_the_output_before_it_changes_nothing():
    first = linear(rand(5, 4) - 0.5)
    x, moved = rand(6, 4, seed=1), rand(6, 4, seed=2)
    found = [signal_ratio(nn.Sequential(first, nn.ReLU(inplace=here)), x, {"d": moved}) for here in (False, True)]
    assert np.array_equal(found[0].samples["d"], found[1].samples["d"])


def test_quantiles_rows_and_names(net, batch):
    model, (x, _) = net("mlp"), batch(21)
    found = signal_ratio(model, x, {"a": x * 0.9, "b": x * 0.5}, layers="linear")
    values = found.ratios("b", "linf")
    assert np.allclose(found.quantiles("b", "linf", (0.0, 0.5, 1.0))[1], np.quantile(values[1], [0, 0.5, 1]))
    rows = found.rows()
    assert len(rows) == 2 * 3 * 3 and rows[0]["layer"] == "1" and rows[0]["kind"] == "linear"
    assert {(row["perturbation"], row["norm"]) for row in rows} == {(a, b) for a in "ab" for b in NORMS}
    assert len(found.channel_rows()) == 2 * (7 + 5 + 3)
    with pytest.raises(UserError, match="unknown perturbation 'c'"):
        found.ratios("c")
    with pytest.raises(UserError, match="unknown norm 'l7'"):
        found.ratios("a", "l7")
    with pytest.raises(UserError, match="no perturbed input"):
        signal_ratio(model, x, {})


def test_progress_counts_samples_and_the_model_is_left_as_it_was(net, batch, bits):
    model, (x, _) = net("resnet").train(), batch(6)
    values, seen = bits(model), []
    signal_ratio(model, x, {"a": x}, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen == [("signal", 3, 6), ("signal", 6, 6)]
    assert bits(model) == values
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_the_plot_has_a_ridge_for_each_layer_and_perturbation(net, batch):
    model, (x, _) = net("resnet"), batch(12)
    found = signal_ratio(model, x, {"a": x * 0.9, "b": (x * 1.2).clamp(0, 1)})
    axes = found.plot(norm="l1")
    ridges = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(ridges) == 2 * len(found.layers)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "perturbation / signal of an image, l1"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem", "stage 1", "stage 2", "stage 3", "head"]


@pytest.mark.parametrize(("low", "high"), [(0.001, 20), (0.08, 0.11), (0.03, 0.2), (0.5, 5)])
def test_ticks_are_few_and_round(low, high):
    ticks = round_ticks(low, high)
    assert 3 <= len(ticks) <= 6 and all(low <= tick <= high and len(f"{tick:g}") <= 5 for tick in ticks)


def test_the_excess_is_the_ratio_of_medians_and_one_for_the_same_perturbation():
    a, x = rand(5, 4, seed=1) - 0.5, 0.2 + 0.6 * rand(31, 4)
    d = 0.05 * (rand(31, 4, seed=2) - 0.5)
    found = signal_ratio(linear(a), x, {"one": x + d, "three": x + 3 * d})
    for norm in NORMS:
        assert np.allclose(found.over("three", "one", norm), 3, rtol=1e-8)
        assert np.allclose(found.over("one", "one", norm), 1)
    values = {"l2": found.over("three", "one"), "l2, cast": np.array([0.0])}
    axes = SignalExcess(found.layers, values).plot()
    solid, dashed = (line for line in axes.lines if line.get_label() in values)
    assert solid.get_color() == dashed.get_color() and (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert axes.get_ylim()[0] <= 1 <= axes.get_ylim()[1]
    assert SignalExcess(found.layers, {"l2": np.array([np.nan])}).plot() is not None


def test_a_channel_that_carries_the_perturbation_is_at_the_end_of_the_spread():
    """Planted: of five channels one hands on ten times as much."""
    weight = torch.eye(5, dtype=torch.float64)
    layer = linear(weight)
    x = torch.full((6, 5), 0.5, dtype=torch.float64)
    moved = x + torch.tensor([0.01, 0.01, 0.01, 0.01, 0.1], dtype=torch.float64)
    found = signal_ratio(layer, x, {"d": moved})
    assert np.allclose(found.spread("d")[0], [0.02, 0.02, 0.02, 0.02, 0.2])
    assert np.allclose(found.spread("d", "linf", (0.0, 1.0))[0], [0.02, 0.2])
    axes = found.by_channel().plot()
    (ridge,) = (line for line in axes.lines if line.get_label() == "d")
    heights = 0.45 - np.asarray(ridge.get_ydata())  # the layer stands at 0, its ridge grows upwards
    places = np.asarray(ridge.get_xdata())
    top, tail = places[heights.argmax()], heights[np.abs(places / 0.2 - 1).argmin()]
    assert top == pytest.approx(0.02, rel=0.1)
    between = heights[np.abs(places / 0.1 - 1).argmin()]
    assert 0.15 < tail / heights.max() < 0.5 and between < tail  # one channel of five, a hill of its own
    with pytest.raises(UserError, match="unknown perturbation 'e'"):
        found.spread("e")
