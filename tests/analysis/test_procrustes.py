import json

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.analysis.activations import activations
from robustlayers.analysis.procrustes import nuclear, procrustes, roots
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


def unit(features):
    features = features - features.mean(0)
    return features / features.norm()


def best_rotation(x, y):
    """|X - Y R|_F^2 / 2 at the rotation that is best (Schönemann 1966): Y'X = U S V', R = U V'."""
    u, _, v = torch.linalg.svd(y.T @ x)
    return float((x - y @ (u @ v)).norm() ** 2 / 2)


def test_the_distance_is_what_the_best_rotation_leaves():
    a, b, x = normal(6, 4, seed=1), normal(6, 4, seed=2), normal(30, 4, seed=3)
    found = procrustes(linear(a), x, linear(b))
    expected = best_rotation(unit(x @ a.T), unit(x @ b.T))
    assert 0.02 < expected < 0.9
    assert found.distances[0, 0] == pytest.approx(expected, abs=1e-10)


def test_more_features_than_samples_give_the_same_as_the_features_themselves():
    a, b, x = normal(40, 60, seed=1), normal(50, 60, seed=2), normal(12, 60, seed=3)
    f, g = unit(x @ a.T), unit(x @ b.T)
    expected = float(torch.linalg.matrix_norm(f.T @ g, "nuc"))
    assert procrustes(linear(a), x, linear(b)).values[0, 0] == pytest.approx(expected, abs=1e-10)


def test_it_does_not_change_with_rotation_scale_and_shift_and_does_with_other_maps():
    a, b, x = normal(5, 4, seed=1), normal(6, 4, seed=2), normal(50, 4, seed=3)
    turn = torch.linalg.qr(normal(5, 5, seed=4)).Q
    moved = linear(turn @ a * -7.5)
    moved.bias = nn.Parameter(torch.full((5,), 100.0, dtype=torch.float64))
    one, two = procrustes(linear(a), x, linear(b)), procrustes(moved, x, linear(b))
    assert one.values[0, 0] == pytest.approx(two.values[0, 0], abs=1e-9)
    assert procrustes(linear(a), x, moved).distances[0, 0] == pytest.approx(0, abs=1e-7)
    skewed = linear(torch.diag(torch.tensor([1.0, 2, 3, 4, 50]).double()) @ a)
    assert procrustes(linear(a), x, skewed).distances[0, 0] > 0.01


def test_streaming_is_the_mean_over_batches_of_all_pairs(net, batch):
    model, (x, _) = net("small-cnn", torch.float64), batch(22, dtype=torch.float64)
    other = net("small-cnn", torch.float64)
    with torch.no_grad():
        other.layer1[0].conv1.weight.mul_(torch.rand(3, 1, 1, 1, generator=generator(), dtype=torch.float64))
    found = procrustes(model, x, other, batch_size=8)
    (mine,), (theirs,) = activations(model, x), activations(other, x)
    parts = [slice(0, 8), slice(8, 15), slice(15, 22)]
    for i, one in enumerate(mine.values()):
        for j, two in enumerate(theirs.values()):
            values = [
                torch.linalg.matrix_norm(unit(one[p].flatten(1)).T @ unit(two[p].flatten(1)), "nuc") for p in parts
            ]
            expected = sum(float(v) * (p.stop - p.start) / 22 for v, p in zip(values, parts, strict=True))
            assert found.values[i, j] == pytest.approx(expected, abs=1e-8)
    alone = procrustes(model, x, batch_size=8)
    assert np.allclose(alone.values, procrustes(model, x, net("small-cnn", torch.float64), batch_size=8).values)
    one_by_one = procrustes(model, x, other, batch_size=8, same_layer=True)
    assert np.allclose(one_by_one.diagonal(), found.diagonal())
    assert np.isnan(one_by_one.values).sum() == len(mine) * (len(mine) - 1)
    assert one_by_one.rows()[1]["similarity"] is None


def test_pooling_lets_few_samples_say_something(net, batch):
    """With many features any two sets of a few points can nearly be turned into each other; the baseline tells."""
    model, (x, _) = net("small-cnn"), batch(30)
    options = {"layers": ["conv1"], "permutations": 5}
    whole = procrustes(model, x, generator=generator(), **options)
    pooled = procrustes(model, x, pool=True, generator=generator(), **options)
    assert whole.values[0, 0] == pytest.approx(1, abs=1e-5) and pooled.values[0, 0] == pytest.approx(1, abs=1e-5)
    assert whole.baseline.mean() > pooled.baseline.mean() + 0.1
    assert whole.baseline.shape == (5, 1, 1)
    again = procrustes(model, x, generator=generator(), **options)
    assert np.array_equal(again.baseline, whole.baseline)


def test_pooled_features_are_compared_over_all_samples_at_once_and_every_pair_is_that_of_the_two_alone(net, batch):
    model, (x, _) = net("small-cnn", torch.float64), batch(22, dtype=torch.float64)
    other = net("small-cnn", torch.float64)
    with torch.no_grad():
        other.layer1[0].conv1.weight.mul_(torch.rand(3, 1, 1, 1, generator=generator(), dtype=torch.float64))
    found = procrustes(model, x, other, pool=True, batch_size=22)
    for size in (5, 11):
        assert np.allclose(procrustes(model, x, other, pool=True, batch_size=size).values, found.values, atol=1e-8)
    (mine,), (theirs,) = (activations(each, x, pool=True) for each in (model, other))
    for i, (name, one) in enumerate(mine.items()):
        for j, (other_name, two) in enumerate(theirs.items()):
            expected = float(torch.linalg.matrix_norm(unit(one).T @ unit(two), "nuc"))
            assert found.values[i, j] == pytest.approx(min(1, expected), abs=1e-8)
            pair = procrustes(model, x, other, layers=[name], other_layers=[other_name], pool=True)
            assert pair.values[0, 0] == pytest.approx(found.values[i, j], abs=1e-12)
    assert found.batch_size == 22


def test_more_pooled_features_than_samples_give_the_same_as_the_features_themselves():
    a, b, x = normal(40, 60, seed=1), normal(50, 60, seed=2), normal(12, 60, seed=3)
    expected = float(torch.linalg.matrix_norm(unit(x @ a.T).T @ unit(x @ b.T), "nuc"))
    assert procrustes(linear(a), x, linear(b), pool=True).values[0, 0] == pytest.approx(expected, abs=1e-10)
    constant = procrustes(linear(torch.zeros(2, 60).double()), x, linear(b), pool=True)
    assert np.isnan(constant.values).all()


def test_features_in_single_precision_are_enough_and_threads_are_put_back(net, batch):
    x, _ = batch(40)
    threads = torch.get_num_threads()
    single, double = procrustes(net("resnet"), x), procrustes(net("resnet", torch.float64), x.double())
    assert np.abs(single.values - double.values).max() < 1e-5
    assert torch.get_num_threads() == threads


def test_roots_of_gram_matrices_have_few_columns_and_nuclear_norms_are_sums_of_singular_values():
    x = normal(9, 3)
    x = x - x.mean(0)
    (root,) = roots((x @ x.T)[None])
    assert root.shape == (9, 3)
    assert torch.allclose(root @ root.T, x @ x.T / x.norm() ** 2, atol=1e-12)
    assert nuclear(torch.eye(3), torch.diag(torch.tensor([0.1, 0.2, -0.3]))) == pytest.approx(0.6)


def test_a_constant_layer_has_no_similarity():
    found = procrustes(nn.Sequential(linear(normal(4, 3)), linear(torch.zeros(2, 4).double())), normal(10, 3))
    assert np.isfinite(found.values[0, 0]) and np.isnan(found.values[1]).all() and np.isnan(found.values[0, 1])
    json.dumps(found.rows(), allow_nan=False)


def test_mistakes_are_said_and_progress_counts_layers(net, batch):
    model, (x, _) = net("mlp"), batch(10)
    with pytest.raises(UserError, match="same_layer needs as many layers on both sides; got 1 and 3"):
        procrustes(model, x, layers=["1"], other_layers="linear", same_layer=True)
    with pytest.raises(UserError, match="give a generator"):
        procrustes(model, x, permutations=1)
    seen = []
    procrustes(model, x, layers="linear", batch_size=5, progress=lambda *step: seen.append(step))
    assert seen == [("procrustes", done, 6) for done in range(1, 7)]
    assert "Procrustes" in procrustes(model, x).plot().figure.axes[1].get_ylabel()
