import copy
import json

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.analysis import criticality, fresh_state, write_scores
from robustlayers.analysis._ground import bind_groups
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import accuracy
from robustlayers.normalization import inference, recalibrate
from robustlayers.selection import Inventory, resolve, select

ATTACK = PGD(Linf(0.15), steps=3)


def test_a_layer_that_was_randomized_on_purpose_is_found(learned):
    good, _, x, y = learned
    broken = copy.deepcopy(good)
    broken[3].load_state_dict({name[2:]: v for name, v in fresh_state(good, 7).items() if name.startswith("3.")})
    found = criticality(broken, "conv | linear", x, y, {"good": good.state_dict()}, attack=ATTACK, batch_size=60)
    gains = {row.group: -row.clean_accuracy_drop for row in found.results}
    assert max(gains, key=gains.get) == "3" and gains["3"] > 0.3
    assert [gains[name] < 0.1 for name in ("0", "7")] == [True, True]
    row = next(row for row in found.results if row.group == "3")
    assert row.clean_accuracy == accuracy(good, x, y)
    assert row.robust_accuracy == accuracy(good, x, y, ATTACK, 60)


def test_numbers_are_those_of_the_evaluation_of_the_changed_net(learned):
    model, start, x, y = learned
    found = criticality(
        model, {"last": "'7'", "norms": "norm"}, x, y, {"initial": start}, attack=ATTACK, batch_size=50, seed=3
    )
    assert found.whole["kept"].robust_accuracy == accuracy(model, x, y, ATTACK, 50, seed=3)
    for row in found.results:
        changed = copy.deepcopy(model)
        names = select(model, row.selector)
        changed.load_state_dict({n: start[n] if n in names else v for n, v in model.state_dict().items()})
        assert row.clean_accuracy == accuracy(changed, x, y)
        assert row.robust_accuracy == accuracy(changed, x, y, ATTACK, 50, seed=3)
        with inference(changed), torch.no_grad():
            loss = nn.functional.cross_entropy(changed(x / 255), y).item()
        assert row.clean_loss == pytest.approx(loss, rel=1e-5)
        assert row.clean_accuracy_drop == accuracy(model, x, y) - row.clean_accuracy
        assert row.robust_loss >= row.clean_loss
        assert row.robust_loss_rise == pytest.approx(row.robust_loss - found.whole["kept"].robust_loss)


def test_the_robust_loss_is_that_of_all_attacked_images(learned):
    model, start, x, y = learned
    attack = PGD(Linf(0.15), steps=3, random_start=False)  # an image's result does not depend on its batch
    found = criticality(model, {"stem": "'0'"}, x, y, {"initial": start}, attack=attack, batch_size=50)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.copy_(start["0.weight"])
        changed[0].bias.copy_(start["0.bias"])
    for net, loss in ((model, found.whole["kept"].robust_loss), (changed, found.results[0].robust_loss)):
        with inference(net):
            expected = nn.functional.cross_entropy(net(attack(net, x / 255, y)), y).item()
        assert accuracy(net, x, y) < 1 and loss == pytest.approx(expected, rel=1e-4)


def test_re_estimated_statistics_are_those_of_a_recalibrated_net(learned):
    model, start, x, y = learned
    dark = x[:80] // 4
    found = criticality(model, {"stem": "'0'"}, x, y, {"initial": start}, recalibrate_on=dark, batch_size=40)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.copy_(start["0.weight"])
        changed[0].bias.copy_(start["0.bias"])
    kept, anew = found.of(statistics="kept")[0], found.of(statistics="re-estimated")[0]
    assert kept.clean_accuracy == accuracy(changed, x, y)
    recalibrate(changed, [dark[:40] / 255, dark[40:] / 255])
    assert anew.clean_accuracy == accuracy(changed, x, y)
    assert anew.clean_loss != kept.clean_loss and anew.robust_loss is None
    own = copy.deepcopy(model)
    recalibrate(own, [dark[:40] / 255, dark[40:] / 255])
    assert accuracy(own, x, y) != accuracy(model, x, y)
    assert anew.clean_accuracy_drop == accuracy(own, x, y) - anew.clean_accuracy


def test_nothing_is_left_behind(learned, no_trace):
    model, start, x, y = learned
    sources = {"initial": start, "random": fresh_state(model, 1)}
    with no_trace(model):
        criticality(model, "all", x[:20], y[:20], sources, attack=ATTACK, recalibrate_on=x[:20])

    def stop(what, done, total):
        if done > 30:
            raise KeyboardInterrupt

    with no_trace(model), pytest.raises(KeyboardInterrupt):
        criticality(model, "all", x[:20], y[:20], sources, attack=ATTACK, recalibrate_on=x[:20], progress=stop)
    with no_trace(model), torch.inference_mode():
        criticality(model, "linear", x[:20], y[:20], sources, attack=ATTACK)


def test_progress_ends_at_its_total(learned):
    model, start, x, y = learned
    seen = []
    criticality(
        model, "norm", x, y, {"initial": start}, attack=ATTACK, recalibrate_on=x, batch_size=50,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][1] == seen[-1][2] == 3 * 2 * 2 * 120
    assert {what for what, _, _ in seen} >= {"as it is", "1 from initial", "4 from initial, re-estimated"}


def test_a_fresh_draw_is_that_of_its_seed_and_of_the_builder():
    def build(seed):
        return models.build("small-cnn", seed=seed, width=3, channels=1, classes=3)

    model = build(0)
    drawn = fresh_state(model, 5, build)
    assert all(torch.equal(drawn[name], tensor) for name, tensor in build(5).state_dict().items())
    state = torch.get_rng_state()
    one, two, other = fresh_state(model, 1), fresh_state(model, 1), fresh_state(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["conv1.weight"], two["conv1.weight"]) and not torch.equal(
        one["conv1.weight"], other["conv1.weight"]
    )
    assert torch.equal(one["bn1.running_var"], torch.ones(3))
    assert not torch.equal(one["conv1.weight"], model.state_dict()["conv1.weight"])


def test_what_cannot_be_drawn_anew_is_an_error():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(1)), nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(x.flatten(1)) * self.scale

    model = Scaled()
    assert set(fresh_state(model)) == {"inner.weight", "inner.bias"}
    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert len(criticality(model, "inner", x, y, {"random": fresh_state(model)}).results) == 1
    with pytest.raises(UserError, match="random has no tensor 'scale'"):
        criticality(model, "scale", x, y, {"random": fresh_state(model)})


def test_scores_are_what_the_selectors_read(learned, tmp_path):
    model, start, x, y = learned
    found = criticality(model, "conv | linear", x, y, {"initial": start}, attack=ATTACK)
    path = found.to_scores(tmp_path / "scores.csv", "clean_loss_rise")
    ranked = sorted(found.results, key=lambda row: -row.clean_loss_rise)
    assert select(model, f'top("{path}", count=1)') == select(model, ranked[0].selector)
    assert select(model, f'bottom("{path}", count=1)') == select(model, ranked[-1].selector)
    assert path.read_text().splitlines()[0] == "name,score"
    clean = criticality(model, "linear", x, y, {"initial": start})
    with pytest.raises(UserError, match="no attack; use clean"):
        clean.to_scores(tmp_path / "robust.csv")
    with pytest.raises(UserError, match="nearest: clean_loss_rise"):
        clean.to_scores(tmp_path / "robust.csv", "clean_loss")


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([("a", (), 1.0)], "a part of a tensor"),
        ([("a", ("0",), 1.0), ("b", ("0",), 2.0)], "in the groups 'a' and 'b'"),
        ([("a", ("0",), float("nan"))], "not finite"),
    ],
)
def test_scores_that_no_selector_could_read_are_errors(tmp_path, scores, text):
    with pytest.raises(UserError, match=text):
        write_scores(tmp_path / "scores.csv", scores)
    with pytest.raises(UserError, match=r"does not end in \.csv"):
        write_scores(tmp_path / "scores.txt", [])


@pytest.mark.parametrize("selector", ["all", "~norm", "norm.affine", "norm.statistics", "random(like=bias, of=all)"])
@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_a_selector_is_taken_apart_by_module_in_order_of_execution(net, batch, name, selector):
    model = net(name)
    groups = bind_groups(model, selector, batch(2)[0])
    whole = resolve(Inventory(model), selector)
    union, count = None, 0
    for group in groups.values():
        count += group.selection.parameters + group.selection.buffers
        union = group.selection if union is None else union | group.selection
        assert resolve(group.selection.inventory, group.selector) == group.selection
        for entry_name in group.names:
            assert group.selection  # each name stands for tensors of this group alone
            assert set(resolve(group.selection.inventory, f'"{entry_name}"')) <= set(group.selection)
    assert union == whole
    assert count == whole.parameters + whole.buffers
    if name == "resnet" and selector == "~norm":
        names = list(groups)
        assert names[:2] == ["normalize", "conv1"] and names.index("layer2.0.conv2") < names.index("layer3.0.conv1")


def test_groups_may_overlap_and_rest_is_what_they_leave(learned):
    model = learned[0]
    groups = bind_groups(model, {"norms": "norm", "early": "'0' | '1'", "others": "rest"})
    assert list(groups["others"].selection) == ["3.weight", "3.bias", "7.weight", "7.bias"]
    assert select(model, groups["others"].selector) == list(groups["others"].selection)
    with pytest.raises(UserError, match="b: 'rest' may be given to one group only"):
        bind_groups(model, {"a": "rest", "b": "rest"})
    with pytest.raises(UserError, match="nearest: norm"):
        bind_groups(model, {"a": "nrm"})


def test_user_errors(learned):
    model, start, x, y = learned
    with pytest.raises(UserError, match="no source"):
        criticality(model, "all", x, y, {})
    with pytest.raises(UserError, match=r"old has no tensor '7.weight'; nearest: 3.weight"):
        criticality(model, "linear", x, y, {"old": {"3.weight": start["3.weight"]}})
    with pytest.raises(UserError, match="batch_size: 1"):
        criticality(model, "linear", x, y, {"initial": start}, batch_size=1)
    found = criticality(model, "linear", x[:8], y[:8], {"initial": start})
    with pytest.raises(UserError, match="unknown source 'intial'; nearest: initial"):
        found.of("intial")
    with pytest.raises(UserError, match="treatment of statistics"):
        found.of(statistics="re-estimated")


def test_rows_are_plain_and_the_plot_shows_each_group(learned):
    model, start, x, y = learned
    found = criticality(model, "conv | linear", x[:20], y[:20], {"initial": start}, attack=ATTACK)
    rows = json.loads(json.dumps(found.rows(), allow_nan=False))
    assert [row["group"] for row in rows] == ["0", "3", "7"]
    axes = found.plot()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "3", "7"]
    assert "points" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["clean", "robust"]
    assert found.plot(axes) is axes
