import json

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.analysis import CKA, Contrast, Crossing, Layer, SameLayer, cka, cka_views
from robustlayers.analysis._axes import INK
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def net(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()


@pytest.fixture
def x():
    return torch.rand(22, 1, 8, 8, generator=generator(), dtype=torch.float64)


def made(values):
    layers = tuple(Layer(f"l{i}", "conv") for i in range(len(values)))
    return CKA(layers, layers, np.array(values, dtype=float), None, 10, 10, "CKA")


def test_each_pair_of_views_is_what_cka_gives_for_the_two_alone(x):
    """All nine combinations of what two nets see: clean images, and two kinds of attacked ones on either side."""
    one, other = net(0), net(1)
    seen = {
        name: (x + 0.1 * k * torch.rand(x.shape, generator=generator(k))).clamp(0, 1) for k, name in enumerate("abc")
    }
    views = {f"one {name}": (one, shown) for name, shown in seen.items()}
    views |= {f"other {name}": (other, shown) for name, shown in seen.items()}
    pairs = [(f"one {i}", f"other {j}") for i in seen for j in seen]
    found = cka_views(views, pairs, batch_size=8)
    assert list(found) == pairs
    for (i, j), each in found.items():
        alone = cka(one, seen[i[-1]], other, seen[j[-1]], batch_size=8)
        assert np.abs(each.values - alone.values).max() < 1e-12 and each.rows_layers == alone.rows_layers
    assert len({round(float(each.values[0, 0]), 6) for each in found.values()}) == 9


def test_the_order_of_views_turns_the_matrix_and_one_view_twice_is_symmetric(x):
    views = {"clean": (net(0), x), "dark": (net(1), 0.5 * x**2)}
    found = cka_views(views, [("clean", "dark"), ("dark", "clean"), ("dark", "dark")], batch_size=11)
    assert np.allclose(found["clean", "dark"].values, found["dark", "clean"].values.T)
    assert np.allclose(found["dark", "dark"].values, found["dark", "dark"].values.T)
    assert np.allclose(np.diagonal(found["dark", "dark"].values), 1)


def test_a_baseline_is_the_same_as_that_of_the_pair_alone(x):
    views = {"clean": (net(0), x), "dark": (net(0), x**2)}
    pairs = [("clean", "clean"), ("clean", "dark")]
    found = cka_views(views, pairs, permutations=4, generator=generator(3), batch_size=11)
    alone = cka(net(0), x, other_x=x**2, permutations=4, generator=generator(3), batch_size=11)
    both, clean = found["clean", "dark"].baseline, found["clean", "clean"].baseline
    assert both is not None and alone.baseline is not None and np.allclose(both, alone.baseline)
    assert clean is not None and clean.shape == (4, 3, 3)


def test_mistakes_are_said(x):
    with pytest.raises(UserError, match="unknown view 'dirk'; nearest: dark"):
        cka_views({"dark": (net(0), x)}, [("dark", "dirk")])
    with pytest.raises(UserError, match="all views need the same samples; got 9 and 22 inputs"):
        cka_views({"a": (net(0), x), "b": (net(0), x[:9])}, [("a", "b")])
    with pytest.raises(UserError, match="give a generator"):
        cka_views({"a": (net(0), x)}, [("a", "a")], permutations=1)


def test_layers_drawn_anew_part_on_every_kind_of_input():
    """Planted: both nets are the same up to a layer, whatever they see."""
    one, two, other = (models.build("resnet", seed=seed, depth=8, width=8) for seed in (0, 0, 1))
    two.get_submodule("layer3").load_state_dict(other.get_submodule("layer3").state_dict())
    x = torch.rand(40, 3, 16, 16, generator=generator())
    seen = {"clean": x, "dark": 0.5 * x}
    views = {f"{k} {name}": (each, shown) for k, each in enumerate((one, two)) for name, shown in seen.items()}
    pairs = [(f"0 {i}", f"1 {j}") for i in seen for j in seen]
    found = cka_views(views, pairs)
    lines = np.stack([found[pair].diagonal() for pair in pairs]).reshape(2, 2, -1)
    crossing = Crossing(found[pairs[0]].rows_layers, tuple(seen), tuple(seen), lines)
    for name in seen:
        assert crossing.parting(name, name, 0.999).layer == "layer3.0.conv1"
    assert crossing.parting("clean", "dark", -2).layer is None and crossing.parting("clean", "dark", -2).depth == 1
    with pytest.raises(UserError, match="unknown kind of input 'drk'; nearest: dark"):
        crossing.parting("clean", "drk")
    rows = crossing.rows()
    assert len(rows) == 4 * len(crossing.layers) and json.dumps(rows, allow_nan=False)
    texts = [text.get_text() for text in crossing.plot().texts]
    assert len(texts) == 4 and all("\n" in text for text in texts)
    same = crossing.lines({"both clean": ("clean", "clean"), "mixed": ("clean", "dark")})
    assert np.array_equal(same.values["mixed"], lines[0, 1])
    assert [line.get_label() for line in same.plot().lines if not str(line.get_label()).startswith("_")] == [
        "both clean",
        "mixed",
    ]


def test_lines_and_tables_without_a_number_are_drawn():
    layers = made(np.eye(2)).rows_layers
    same = SameLayer(layers, {"a": np.array([np.nan, np.nan])})
    assert same.plot() and [row["similarity"] for row in same.rows()] == [None, None]
    assert Crossing(layers, ("a",), ("b",), np.full((1, 1, 2), np.nan)).plot().texts[0].get_color() == INK


def test_a_contrast_is_one_minus_the_other_and_finds_where_they_differ_most():
    one, other = made([[1, 0.5], [0.5, 1]]), made([[1, 0.9], [0.5, 1]])
    contrast = Contrast(one, other)
    assert np.allclose(contrast.values, [[0, -0.4], [0, 0]])
    assert contrast.largest() == (pytest.approx(-0.4), "l0", "l1")
    row = contrast.rows()[1]
    assert (row["similarity"], row["other_similarity"], row["difference"]) == (0.5, 0.9, pytest.approx(-0.4))
    (image,) = contrast.plot().images
    assert image.get_clim() == pytest.approx((-0.4, 0.4))
    assert contrast.plot(reach=0.7).images[0].get_clim() == (-0.7, 0.7)
    nothing = Contrast(one, one).plot().images[0]
    assert nothing.get_clim() == (-0.05, 0.05)  # noise must not fill the range of colors
