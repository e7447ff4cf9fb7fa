import copy
import json

import pytest
import torch
from torch import nn

from robustlayers.analysis import interpolation, on_line, sharpness
from robustlayers.analysis.interpolation import Line, LinePoint
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import accuracy
from robustlayers.normalization import inference, recalibrate
from robustlayers.selection import Inventory, resolve

ATTACK = PGD(Linf(0.15), steps=3)
SELECTORS = ["all", "conv", "norm", "norm.statistics", "channels('3', share=0.5)"]


def other_of(model, start):
    other = copy.deepcopy(model)
    other.load_state_dict(start)
    return other


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_ends_are_the_two_nets_in_every_bit(learned, bits, selector):
    model, start, _, _ = learned
    start["0.weight"][0, 0, 0, 0] = -0.0  # equal to 0, but not in every bit
    before, source = bits(model), bits(other_of(model, start))
    selection = resolve(Inventory(model), selector)
    with on_line(model, start, selection, 1) as end:
        assert bits(end) == before
    with on_line(model, other_of(model, start), selection, 0) as end:
        state, masks = end.state_dict(), selection
        for name, found in bits(end).items():
            if name in masks.parts and masks.parts[name] is None:
                assert found == source[name]
            elif name not in masks.parts:
                assert found == before[name]
            else:
                mask = masks._mask(name)
                assert torch.equal(state[name][mask], start[name][mask])
    assert bits(model) == before


def test_the_line_between_two_nets_ends_at_their_own_qualities(learned):
    model, start, x, y = learned
    other = other_of(model, start)
    line = interpolation(model, other, {"all": "all"}, x, y, positions=[0, 0.5, 1], attack=ATTACK, batch_size=60)
    for point, net in ((line.points[0], other), (line.points[-1], model)):
        assert point.clean_accuracy == accuracy(net, x, y)
        assert point.robust_accuracy == accuracy(net, x, y, ATTACK, 60)
    middle = copy.deepcopy(model)
    end = model.state_dict()
    middle.load_state_dict({n: v if not v.is_floating_point() else (v + end[n]) / 2 for n, v in start.items()})
    assert line.points[1].clean_accuracy == accuracy(middle, x, y)


def test_one_layer_moves_and_the_others_stay(learned):
    model, start, x, y = learned
    line = interpolation(model, start, "conv | linear", x, y, positions=["1/4", 1])
    assert [(p.group, p.position) for p in line.points] == [(g, t) for g in ("0", "3", "7") for t in (0.25, 1.0)]
    ends = {p.clean_loss for p in line.points if p.position == 1}
    assert len(ends) == 1  # every group's line ends at the model
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("3.weight", "3.bias"):
            tensor = changed.get_parameter(name)
            tensor.copy_(0.75 * start[name] + 0.25 * tensor)
    with inference(changed), torch.no_grad():
        loss = nn.functional.cross_entropy(changed(x / 255), y).item()
    assert line.points[2].clean_loss == pytest.approx(loss, rel=1e-5) and loss not in ends
    assert line.points[2].robust_loss is None


def test_re_estimated_statistics_are_those_of_the_point(learned):
    model, start, x, y = learned
    line = interpolation(model, start, {"conv": "conv"}, x, y, positions=[0.5, 1], recalibrate_on=x, batch_size=60)
    kinds = [(p.statistics, p.position) for p in line.points]
    assert kinds == [("kept", 0.5), ("re-estimated", 0.5), ("kept", 1.0), ("re-estimated", 1.0)]
    with on_line(model, start, resolve(Inventory(model), "conv"), 0.5) as net:
        changed = copy.deepcopy(net)
    recalibrate(changed, [x[:60] / 255, x[60:] / 255])
    assert line.points[1].clean_accuracy == accuracy(changed, x, y)
    assert line.points[1].clean_loss != line.points[0].clean_loss
    assert line.points[3].clean_loss != line.points[2].clean_loss


def test_nothing_is_left_behind(learned, no_trace):
    model, start, x, y = learned
    other = other_of(model, start)
    with no_trace(model), no_trace(other):
        interpolation(model, other, "all", x[:20], y[:20], positions=[0, 0.3, 1], attack=ATTACK, recalibrate_on=x[:20])

    def stop(what, done, total):
        if what.endswith("re-estimated"):
            raise KeyboardInterrupt

    with no_trace(model), pytest.raises(KeyboardInterrupt):
        interpolation(model, other, "all", x, y, positions=[0.3], recalibrate_on=x[:20], progress=stop)
    with (
        no_trace(model),
        pytest.raises(KeyboardInterrupt),
        on_line(model, start, resolve(Inventory(model), "all"), 0.3),
    ):
        raise KeyboardInterrupt


def test_progress_ends_at_its_total(learned):
    model, start, x, y = learned
    seen = []
    interpolation(
        model, start, "conv", x, y, positions=[0, 1], attack=ATTACK, recalibrate_on=x,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][2] == 2 * 2 * 2 * 2 * 120 and seen[-1][1] == seen[-1][2]


def test_a_barrier_is_the_height_over_the_chord():
    def line(*losses):
        return [LinePoint("g", "kept", t / 4, 0.5, loss, None, None) for t, loss in enumerate(losses)]

    assert Line(tuple(line(1.0, 2.5, 2.0, 2.5, 3.0))).barriers("clean_loss") == {"g": 1.0}
    assert Line(tuple(line(1.0, 1.2, 1.4, 1.6, 3.0))).barriers("clean_loss") == {"g": 0.0}
    assert Line(tuple(line(1.0))).barriers("clean_loss") == {"g": 0.0}
    with pytest.raises(UserError, match="no attack"):
        Line(tuple(line(1.0, 2.0))).barriers()
    with pytest.raises(UserError, match="allowed: clean_loss, robust_loss"):
        Line(tuple(line(1.0, 2.0))).barriers("clean_accuracy")


def test_a_net_and_its_permuted_twin_are_parted_by_a_barrier(learned):
    model, _, x, y = learned
    twin = copy.deepcopy(model)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    with torch.no_grad():
        for module in (twin[0], twin[1]):
            for tensor in module.state_dict().values():
                if tensor.dim():
                    tensor.copy_(tensor[order].clone())
        twin[3].weight.copy_(twin[3].weight[:, order].clone())
    line = interpolation(model, twin, {"all": "all"}, x, y, positions=[0, 0.5, 1])
    assert line.points[0].clean_loss == pytest.approx(line.points[-1].clean_loss, rel=1e-4)
    assert line.barriers("clean_loss")["all"] > 0.1


def test_sharpness_is_larger_where_the_loss_is_steeper(learned):
    model, _, x, y = learned
    small, large = (sharpness(model, "conv", x, y, ATTACK, size=size).results for size in (0.01, 0.1))
    assert all(0 < one.rise < two.rise for one, two in zip(small, large, strict=True))
    assert all(row.distance == pytest.approx(row.radius, rel=1e-5) for row in large)
    flat = copy.deepcopy(model)
    with torch.no_grad():
        flat[7].weight.mul_(0)
    assert sharpness(flat, "conv", x, y).results[0].rise == 0


def test_user_errors(learned):
    model, start, x, y = learned
    for positions in ([], [1, 0], [0, 0], [-0.1], [1.1]):
        with pytest.raises(UserError, match="positions"):
            interpolation(model, start, "all", x, y, positions=positions)
    with pytest.raises(UserError, match=r"the start has no tensor '7\.weight'"):
        interpolation(model, {}, {"head": "'7'"}, x, y)
    with pytest.raises(UserError, match=r"4.weight is \[5\], the model has \[6\]"):
        interpolation(model, {**start, "4.weight": torch.ones(5)}, {"g": "'4'"}, x, y)
    with pytest.raises(UserError, match="position: 2"), on_line(model, start, resolve(Inventory(model), "all"), 2):
        pass
    no_norm = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match="no norm layer"):
        interpolation(no_norm, no_norm, "all", x, y, recalibrate_on=x)


def test_rows_are_plain_and_the_plot_shows_each_line(learned):
    model, start, x, y = learned
    line = interpolation(model, start, "all", x[:20], y[:20], positions=[0, 1], attack=ATTACK)
    assert len(json.loads(json.dumps(line.rows(), allow_nan=False))) == 10
    axes = line.plot()
    assert len(axes.lines) == 5 and axes.get_ylabel() == "robust loss, nats"
    assert line.plot(metric="clean_accuracy").get_ylabel() == "clean accuracy, %"
    with pytest.raises(UserError, match="nearest: clean_loss"):
        line.plot(metric="clean_los")
