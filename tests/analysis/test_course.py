import json

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.analysis import Course, Layer, cka, cka_course
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.training import snapshot


def test_a_moment_against_itself_is_one_at_every_layer(learned):
    net, _, x, _ = learned
    found = cka_course(net, x[:40], {"now": snapshot(net)}, batch_size=15)
    assert np.abs(found.values - 1).max() < 1e-6
    assert found.settled(0.99) == {layer.name: "now" for layer in found.layers}


def test_it_is_the_diagonal_of_cka_between_the_nets_and_leaves_no_trace(learned, no_trace):
    net, start, x, _ = learned
    earlier = nn.Sequential(*[type(m)(*_arguments(m)) for m in net])
    earlier.load_state_dict(start)
    with no_trace(net):
        found = cka_course(net, x[:40], {"start": start, "now": lambda: snapshot(net)}, batch_size=15)
    expected = cka(earlier, x[:40], net, batch_size=15).diagonal()
    assert np.allclose(found.values[0], expected, atol=1e-6) and (expected < 0.99).any()
    assert (found.samples, found.batch_size) == (40, 14)


def _arguments(module):
    kinds = {nn.Conv2d: lambda m: (m.in_channels, m.out_channels, 3), nn.BatchNorm2d: lambda m: (m.num_features,)}
    kinds[nn.Linear] = lambda m: (m.in_features, m.out_features)
    return kinds.get(type(module), lambda m: ())(module)


def test_streaming_equals_all_at_once_when_the_samples_are_alike(learned):
    """Batches of the same samples twice: the mean over batches is the value of one."""
    net, start, x, _ = learned
    net.double()
    start = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in start.items()}
    part = x[:12].double() / 255
    once = cka_course(net, part, {"start": start}, batch_size=12)
    twice = cka_course(net, torch.cat([part, part]), {"start": start}, batch_size=12)
    assert np.abs(once.values - twice.values).max() < 1e-8


def test_only_what_has_moved_differs(learned):
    """Planted: between two moments the last layer alone was drawn anew."""
    net, _, x, _ = learned
    state = snapshot(net)
    state["7.weight"] = torch.randn(state["7.weight"].shape, generator=torch.Generator().manual_seed(1))
    found = cka_course(net, x[:60], {"before": state})
    assert np.allclose(found.values[0, :-1], 1, atol=1e-6) and found.values[0, -1] < 0.9
    assert found.settled() == {layer.name: "before" if layer.name != "7" else None for layer in found.layers}


def test_settled_is_the_first_moment_after_which_nothing_falls_back():
    layers = (Layer("a", "conv"), Layer("b", "conv"), Layer("c", "conv"))
    values = np.array([[0.95, 0.95, np.nan], [0.5, 0.95, 0.95], [0.95, 0.95, 0.95]])
    found = Course(("1", "2", "3"), layers, values, 10, 10)
    assert found.settled() == {"a": "3", "b": "1", "c": "2"}
    json.dumps(found.rows(), allow_nan=False)
    axes = found.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    (image,) = axes.images
    assert np.array_equal(image.get_array()[:, :2], values[:, :2])


def test_states_may_be_read_when_they_are_needed(learned, tmp_path):
    net, start, x, _ = learned
    write_tensors(tmp_path / "start.safetensors", start)
    seen = []

    def read():
        seen.append(1)
        return read_tensors(tmp_path / "start.safetensors")

    one = cka_course(net, x[:20], {"start": read}, batch_size=10)
    assert len(seen) == 2 and np.allclose(one.values, cka_course(net, x[:20], {"start": start}, batch_size=10).values)


def test_mistakes_are_said_and_progress_reaches_the_end(learned, no_trace):
    net, start, x, _ = learned
    with pytest.raises(UserError, match="no earlier state"):
        cka_course(net, x, {})
    with no_trace(net), pytest.raises(UserError, match=r"then: does not fit Sequential: .*7\.weight"):
        cka_course(net, x[:8], {"then": {name: tensor for name, tensor in start.items() if name != "7.weight"}})
    steps = []
    cka_course(net, x[:20], {"a": start, "b": start}, batch_size=10, progress=lambda *step: steps.append(step))
    assert steps == [("a", 10, 40), ("b", 20, 40), ("a", 30, 40), ("b", 40, 40)]
