import copy
import json

import pytest
import torch

from robustlayers.analysis import PARTS, fresh_state, transplant
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import accuracy
from robustlayers.normalization import recalibrate

ATTACK = PGD(Linf(0.15), steps=3)


def pair(learned):
    model, start, x, y = learned
    other = copy.deepcopy(model)
    other.load_state_dict(start)
    return model, other, x, y


def test_a_layer_that_was_randomized_on_purpose_is_found(learned):
    good, _, x, y = learned
    broken = copy.deepcopy(good)
    broken[3].load_state_dict({n[2:]: v for n, v in fresh_state(good, 7).items() if n.startswith("3.")})
    found = transplant(good, broken, "conv | linear | norm", x, y, names=("good", "broken"), attack=ATTACK)
    whole = found.row("good", "nothing")
    assert found.row("broken", "everything") == type(whole)(**{**vars(whole), "host": "broken", "donor": "good",
                                                             "group": "everything", "parameters": 802})  # fmt: skip
    assert found.row("broken", "nothing").clean_accuracy < whole.clean_accuracy - 0.3
    for row in found.results:
        if row.group in ("nothing", "everything"):
            continue
        hit = (row.host == "broken") == (row.group == "3")  # the good layer heals, the bad one breaks
        expected = whole if hit else found.row("broken", "nothing")
        assert (row.clean_accuracy, row.robust_accuracy) == (expected.clean_accuracy, expected.robust_accuracy)
        assert row.robust_loss == expected.robust_loss


def test_each_part_goes_over_alone(learned):
    one, other, x, y = pair(learned)
    found = transplant(one, other, PARTS, x, y, attack=ATTACK, batch_size=60, seed=1)
    assert [row.group for row in found.results[:5]] == ["nothing", "weights", "affine", "statistics", "everything"]
    picks = {
        "weights": lambda n: n[0] in "037",
        "affine": lambda n: n in ("1.weight", "1.bias", "4.weight", "4.bias"),
        "statistics": lambda n: "running" in n or "num" in n,
    }
    for row in found.results:
        if row.group in picks:
            host, donor = (one, other) if row.host == "one" else (other, one)
            mixed, theirs = copy.deepcopy(host), donor.state_dict()
            mixed.load_state_dict({n: theirs[n] if picks[row.group](n) else v for n, v in host.state_dict().items()})
            assert row.clean_accuracy == accuracy(mixed, x, y)
            assert row.robust_accuracy == accuracy(mixed, x, y, ATTACK, 60, seed=1)
    assert found.row("one", "weights").parameters == 6 * 10 + 6 * 55 + 388
    assert found.row("one", "statistics").parameters == 0


def test_re_estimated_statistics_belong_to_the_mixed_net(learned):
    one, other, x, y = pair(learned)
    found = transplant(one, other, {"head": "'7'", "weights": "~norm"}, x, y, recalibrate_on=x, batch_size=60)
    mixed, theirs = copy.deepcopy(one), other.state_dict()
    mixed.load_state_dict({n: theirs[n] if n[0] in "037" else v for n, v in one.state_dict().items()})
    recalibrate(mixed, [x[:60] / 255, x[60:] / 255])
    assert found.row("one", "weights", "re-estimated").clean_accuracy == accuracy(mixed, x, y)
    assert found.row("one", "weights").clean_loss != found.row("one", "weights", "re-estimated").clean_loss
    own = copy.deepcopy(one)
    recalibrate(own, [x[:60] / 255, x[60:] / 255])
    assert found.row("other", "everything", "re-estimated").clean_accuracy == accuracy(own, x, y)


def test_nothing_is_left_behind(learned, no_trace):
    one, other, x, y = pair(learned)
    with no_trace(one), no_trace(other):
        transplant(one, other, "all", x[:20], y[:20], attack=ATTACK, recalibrate_on=x[:20])

    def stop(what, done, total):
        if what.startswith("4 of one in other"):
            raise KeyboardInterrupt

    with no_trace(one), no_trace(other), pytest.raises(KeyboardInterrupt):
        transplant(one, other, "all", x[:20], y[:20], attack=ATTACK, progress=stop)


def test_progress_ends_at_its_total(learned):
    one, other, x, y = pair(learned)
    seen = []
    transplant(one, other, "conv", x, y, attack=ATTACK, progress=lambda *what: seen.append(what))
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][1] == seen[-1][2] == 2 * 3 * 2 * 120


def test_user_errors(learned):
    one, other, x, y = pair(learned)
    with pytest.raises(UserError, match="two names that differ"):
        transplant(one, other, "all", x, y, names=("a", "a"))
    with pytest.raises(UserError, match="must not be called 'nothing'"):
        transplant(one, other, {"nothing": "all"}, x, y)
    other[7] = torch.nn.Linear(96, 5)
    with pytest.raises(UserError, match=r"natural: 7.weight is \[5, 96\], the model has \[4, 96\]"):
        transplant(one, other, "linear", x, y, names=("robust", "natural"))
    found = transplant(one, one, "linear", x[:8], y[:8])
    with pytest.raises(UserError, match="unknown host 'on'; nearest: one"):
        found.row("on", "7")
    with pytest.raises(UserError, match="unknown group"):
        found.row("one", "8")


def test_rows_are_plain_and_the_plot_is_a_matrix(learned):
    one, other, x, y = pair(learned)
    found = transplant(one, other, "conv", x[:20], y[:20], names=("robust", "natural"), attack=ATTACK)
    assert len(json.loads(json.dumps(found.rows(), allow_nan=False))) == 8
    axes = found.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["nothing", "0", "3", "everything"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["clean", "robust"] * 2
    assert [t.get_text().strip() for t in axes.get_xticklabels(minor=True)] == ["in robust", "in natural"]
    assert axes.texts[0].get_text() == f"{100 * found.row('robust', 'nothing').clean_accuracy:.1f}"
