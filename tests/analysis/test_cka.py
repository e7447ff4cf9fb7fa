import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.analysis.activations import Layer, activations
from robustlayers.analysis.cka import CKA, Block, Parting, center, cka, gram
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def hsic(k, el):
    """The unbiased estimator as Song et al. 2012 and the docstring write it."""
    n = len(k)
    k, el = (m - torch.diag(torch.diag(m)) for m in (k, el))
    one = torch.ones(n, dtype=k.dtype)
    terms = torch.trace(k @ el)
    terms = terms + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2)) - 2 * (one @ k @ el @ one) / (n - 2)
    return float(terms / (n * (n - 3)))


def test_centered_grams_give_the_formula_of_the_unbiased_estimator():
    x, y = normal(9, 4) + 3, normal(9, 6, seed=1) - 1
    k, el = x @ x.T, y @ y.T
    assert float((center(k) * center(el)).sum()) / (9 * 6) == pytest.approx(hsic(k, el), rel=1e-10)
    # Also where the features were centered first, as they are for precision.
    assert float((center(gram(x)) * center(gram(y))).sum()) / (9 * 6) == pytest.approx(hsic(k, el), rel=1e-10)


def test_centered_grams_give_the_formula_of_the_biased_estimator():
    x, y = normal(9, 4) + 3, normal(9, 6, seed=1)
    h = torch.eye(9, dtype=torch.float64) - 1 / 9
    expected = torch.trace(x @ x.T @ h @ y @ y.T @ h)
    assert float((center(x @ x.T, "biased") * center(y @ y.T, "biased")).sum()) == pytest.approx(float(expected))


def test_cka_of_a_linear_map_is_the_closed_form():
    """For white inputs E HSIC(XA', XB') = |A B'...|: population CKA is tr(A'A B'B) / (|A'A| |B'B|)."""
    a, b = normal(5, 4, seed=1), normal(7, 4, seed=2)
    x = normal(40000, 4, seed=3)
    found = cka(linear(a), x, linear(b), batch_size=100).values[0, 0]
    one, two = a.T @ a, b.T @ b
    expected = float((one * two).sum() / (one.norm() * two.norm()))
    assert 0.1 < expected < 0.9
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_one_batch_is_the_formula_on_the_features(estimator):
    a, b, x = normal(5, 4, seed=1), normal(7, 4, seed=2), normal(30, 4, seed=3)
    found = cka(linear(a), x, linear(b), estimator=estimator)
    f, g = x @ a.T, x @ b.T
    if estimator == "unbiased":
        k, el = f @ f.T, g @ g.T
        expected = hsic(k, el) / math.sqrt(hsic(k, k) * hsic(el, el))
    else:
        f, g = f - f.mean(0), g - g.mean(0)
        expected = float((f.T @ g).norm() ** 2 / ((f.T @ f).norm() * (g.T @ g).norm()))  # Kornblith et al., equation 5
    assert found.values[0, 0] == pytest.approx(expected, abs=1e-10)


def test_it_does_not_change_with_rotation_scale_and_shift():
    a, b, x = normal(5, 4, seed=1), normal(6, 4, seed=2), normal(50, 4, seed=3)
    turn = torch.linalg.qr(normal(5, 5, seed=4)).Q
    moved = nn.Sequential(linear(turn @ a * -7.5)).double()
    moved[0].bias = nn.Parameter(torch.full((5,), 100.0, dtype=torch.float64))
    one, two = cka(linear(a), x, linear(b), batch_size=25), cka(moved, x, linear(b), batch_size=25)
    assert one.values[0, 0] == pytest.approx(two.values[0, 0], abs=1e-10)
    assert cka(linear(a), x, moved, batch_size=25).values[0, 0] == pytest.approx(1, abs=1e-10)
    skewed = linear(torch.diag(torch.tensor([1.0, 2, 3, 4, 50]).double()) @ a)  # and it does with other maps
    assert cka(skewed, x, linear(b), batch_size=25).values[0, 0] != pytest.approx(one.values[0, 0], abs=1e-3)


@pytest.mark.parametrize(("estimator", "unbiased"), [("unbiased", True), ("biased", False)])
def test_the_mean_for_independent_features_at_64_samples_is_zero_only_unbiased(estimator, unbiased):
    draws = []
    for draw in range(300):
        x, y = normal(64, 20, seed=2 * draw), normal(64, 30, seed=2 * draw + 1)
        k, el = (center(gram(features), estimator) for features in (x, y))
        draws.append(float((k * el).sum() / (k.norm() * el.norm())))
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert bool(abs(np.mean(draws)) < 3 * error) is unbiased


def test_streaming_is_the_same_as_all_features_at_once(net, batch):
    model, other = net("resnet", torch.float64), net("small-cnn", torch.float64)
    x, _ = batch(22, dtype=torch.float64)
    found = cka(model, x, other, batch_size=8)
    (mine,), (theirs,) = activations(model, x), activations(other, x)
    assert [layer.name for layer in found.rows_layers] == list(mine)
    parts = [slice(0, 8), slice(8, 15), slice(15, 22)]

    def mean_hsic(one, two):
        total = 0.0
        for part in parts:
            f, g = one[part].flatten(1), two[part].flatten(1)
            total += len(f) * hsic(f @ f.T, g @ g.T) / 22
        return total

    for i, one in enumerate(mine.values()):
        for j, two in enumerate(theirs.values()):
            expected = mean_hsic(one, two) / math.sqrt(mean_hsic(one, one) * mean_hsic(two, two))
            assert abs(found.values[i, j] - expected) < 1e-8
    assert (found.samples, found.batch_size) == (22, 8)


def test_single_precision_is_enough(net, batch):
    x, _ = batch(20)
    single, double = cka(net("resnet"), x), cka(net("resnet", torch.float64), x.double())
    assert np.abs(single.values - double.values).max() < 1e-5
    assert np.allclose(np.diagonal(double.values), 1, atol=1e-12)


def test_one_model_on_two_inputs_and_its_own_layers(net, batch):
    model, (x, _) = net("small-cnn"), batch(20)
    other = (x + 0.2 * torch.randn(x.shape, generator=generator())).clamp(0, 1)
    alone, same = cka(model, x), cka(model, x, net("small-cnn"), x)
    assert np.allclose(alone.values, same.values) and np.allclose(alone.values, alone.values.T)
    found = cka(model, x, other_x=other)
    assert (found.diagonal() < 0.999).all() and (found.diagonal() > 0.05).all()
    assert np.allclose(cka(model, other, other_x=x).values, found.values.T)
    one = cka(model, x, other_x=other, layers="conv1", other_layers=["linear", ":relu"])
    everything = [layer.name for layer in found.rows_layers]
    expected = found.values[0, [everything.index(name) for name in (":relu", "linear")]]
    assert np.allclose(one.values, expected[None]) and one.values.shape == (1, 2)


def test_pooled_features_are_the_means_over_positions(net, batch):
    model, (x, _) = net("small-cnn", torch.float64), batch(12, dtype=torch.float64)
    found = cka(model, x, layers="conv1", other_layers="linear", pool=True).values[0, 0]
    (features,) = activations(model, x, ["conv1", "linear"])
    f, g = features["conv1"].mean((2, 3)), features["linear"]
    k, el = f @ f.T, g @ g.T
    assert found == pytest.approx(hsic(k, el) / math.sqrt(hsic(k, k) * hsic(el, el)), abs=1e-9)


def test_the_permutation_baseline_is_around_zero_and_far_below_what_is_similar(net, batch):
    model, (x, _) = net("small-cnn"), batch(60)
    found = cka(model, x, permutations=40, generator=generator(), batch_size=30)
    assert found.baseline is not None and found.baseline.shape == (40, *found.values.shape)
    error = found.baseline.std(0) / math.sqrt(40)
    assert (np.abs(found.baseline.mean(0)) < 4.5 * error).all()
    chance = found.chance()
    assert chance is not None and (np.diagonal(chance) < 0.5).all()
    assert "chance_95" in found.rows()[0] and found.rows()[0]["chance_95"] == pytest.approx(chance[0, 0])
    again = cka(model, x, permutations=40, generator=generator(), batch_size=30)
    assert np.array_equal(again.baseline, found.baseline)


def test_a_layer_that_is_constant_has_no_similarity():
    x = normal(10, 3)
    found = cka(nn.Sequential(linear(normal(4, 3)), linear(torch.zeros(2, 4).double())), x)
    assert np.isfinite(found.values[0, 0]) and np.isnan(found.values[1]).all()
    rows = found.rows()
    assert [row["similarity"] is None for row in rows] == [False, True, True, True]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "debiased"}, "unknown estimator 'debiased'"),
        ({"permutations": 2}, "give a generator"),
        ({"permutations": -1}, "permutations: -1 is not allowed"),
        ({"batch_size": 3}, "batch_size: 3 is not allowed; allowed: a whole number, 4 or more"),
        ({"other_x": torch.rand(5, 3)}, "both sides need the same samples; got 9 and 5"),
        ({"layers": "nothing"}, "unknown selector 'nothing'"),
    ],
)
def test_mistakes_are_said(options, message):
    with pytest.raises(UserError, match=message):
        cka(nn.Linear(3, 2), torch.rand(9, 3), **options)


def test_progress_counts_samples(net, batch):
    seen = []
    cka(net("mlp"), batch(10)[0], batch_size=5, progress=lambda *step: seen.append(step))
    assert seen == [("cka", 5, 10), ("cka", 10, 10)]


def test_the_model_is_left_as_it_was(net, batch, bits):
    model, (x, _) = net("resnet").train(), batch(8)
    values = bits(model)
    cka(model, x)
    assert bits(model) == values
    assert all(module.training and not module._forward_hooks for module in model.modules())

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cka(model, x, progress=stop)
    assert bits(model) == values
    assert all(module.training and not module._forward_hooks for module in model.modules())


def made(values):
    layers = tuple(Layer(f"l{i}", "conv", "stem" if i < 2 else "stage(1)") for i in range(len(values)))
    return CKA(layers, layers, np.array(values, dtype=float), None, 10, 10, "CKA")


def test_block_structure_is_the_longest_run_of_layers_that_are_all_alike():
    values = np.eye(6)
    for i, j in [(1, 2), (2, 3), (1, 3), (3, 4), (4, 5)]:
        values[i, j] = values[j, i] = 0.95
    assert made(values).block_structure() == Block("l1", "l3", 3, 0.5)  # 3, 4, 5 is a chain, but 3 and 5 differ
    assert made(values).block_structure(0.99) == Block("l0", "l0", 1, 1 / 6)
    assert made(np.ones((4, 4))).block_structure() == Block("l0", "l3", 4, 1.0)
    one_way = np.eye(3)
    one_way[0, 1] = 0.95  # between two models only one of the two comparisons may be high
    assert made(one_way).block_structure() == Block("l0", "l0", 1, 1 / 3)
    assert made(one_way.T).block_structure() == Block("l0", "l0", 1, 1 / 3)
    assert made(np.zeros((4, 4))).block_structure() == Block(None, None, 0, 0.0)


def test_long_range_similarity_is_the_mean_over_layers_far_apart():
    place = np.arange(5)
    values = 1 - np.abs(place[:, None] - place[None]) / 10
    assert made(values).long_range(1.0) == pytest.approx(0.6)
    assert made(values).long_range() == pytest.approx((6 * 0.8 + 4 * 0.7 + 2 * 0.6) / 12)


def test_nets_part_at_the_first_layer_below_the_bound():
    values = np.diag([0.9, 0.6, 0.4, 0.7])
    assert made(values).parting() == Parting("l2", 0.5)
    assert made(values).parting(0.3) == Parting(None, 1.0)
    with pytest.raises(UserError, match="got 1 and 2"):
        CKA(made(values).rows_layers[:1], made(values).rows_layers[:2], np.ones((1, 2)), None, 1, 1, "CKA").parting()


def test_a_net_whose_late_layers_were_drawn_anew_parts_there():
    """Planted: both nets are the same up to a layer."""
    one, two = (models.build("resnet", seed=0, depth=8, width=8) for _ in range(2))
    other = models.build("resnet", seed=1, depth=8, width=8)
    two.layer3.load_state_dict(other.layer3.state_dict())
    x = torch.rand(40, 3, 16, 16, generator=generator())
    found = cka(one, x, two)
    same = [layer.part not in ("stage(3)", "head") for layer in found.rows_layers]
    assert np.allclose(found.diagonal()[same], 1)
    parting = found.parting(0.999)
    assert parting.layer == "layer3.0.conv1" and parting.depth == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize("size", [4, 30])
def test_the_plot_shows_the_values_with_marks_where_a_part_begins(size):
    found = made(np.random.default_rng(0).random((size, size)))
    axes = found.plot()
    (image,) = axes.images
    assert np.array_equal(image.get_array(), found.values)
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5, 0]  # one down, one across
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == (["l0", "l1", "l2", "l3"] if size == 4 else ["stem", "stage 1"])
    assert found.plot(axes) is axes
