import json

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.analysis import probes
from robustlayers.analysis.activations import activations
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError

ATTACK = PGD(Linf(0.15), steps=3)


def parts(learned):
    model, _, x, y = learned
    return model, (x[:80], y[:80]), (x[80:], y[80:])


def ridge(fit, labels, test, penalty, classes):
    """The formula, with numpy's least squares on an extended system instead of sums of products."""
    keep = fit.std(0) > 1e-12
    z, t = ((part[:, keep] - fit[:, keep].mean(0)) / fit[:, keep].std(0) for part in (fit, test))
    target = np.eye(classes)[labels]
    rows = np.concatenate([z, np.sqrt(penalty * len(z)) * np.eye(z.shape[1])])
    weights = np.linalg.lstsq(rows, np.concatenate([target - target.mean(0), np.zeros((z.shape[1], classes))]))[0]
    return (t @ weights + target.mean(0)).argmax(1)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_a_probe_is_ridge_regression_on_pooled_features(learned, penalty):
    model, fit, held = parts(learned)
    found = probes(model, None, fit, held, penalty=penalty, batch_size=33)
    rows = {row.layer: row for row in found.results}
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "7"]
    features = [
        {name: torch.cat([batch[name] for batch in found]).double().numpy() for name in rows}
        for found in (list(activations(model, x, pool=True)) for x, _ in (fit, held))
    ]
    for name, row in rows.items():
        one, two = features[0][name], features[1][name]
        assert row.features == one.shape[1]
        assert row.accuracy == (ridge(one, fit[1], two, penalty, 4) == held[1].numpy()).mean()
        assert row.fit_accuracy == (ridge(one, fit[1], one, penalty, 4) == fit[1].numpy()).mean()
        assert row.gap == row.fit_accuracy - row.accuracy


def test_separable_features_are_read_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    signal = torch.rand(400, 1, 4, 4, generator=generator) * 0.2 + 0.6 * y[:, None, None, None]
    noise = torch.rand(400, 1, 4, 4, generator=generator)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(48, 2))
    for x, low, high in ((signal, 1.0, 1.0), (noise, 0.35, 0.65)):
        found = probes(model, "conv", (x[:200], y[:200]), (x[200:], y[200:]))
        assert low <= found.results[0].accuracy <= high


def test_dead_and_repeated_features_change_nothing():
    class Doubled(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.more, self.inner = more, nn.Identity()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            z = x.flatten(1)
            z = torch.cat([z, z, torch.full_like(z, 1e6)], 1) if self.more else z
            return self.layer(self.inner(z)[:, :4])

    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(60, 1, 2, 2, generator=generator), torch.arange(60) % 3
    plain, more = (
        probes(Doubled(flag), ["inner"], (x[:40], y[:40]), (x[40:], y[40:]), penalty=penalty).results[0]
        for flag, penalty in ((False, 0.01), (True, 0.02))
    )
    # Of a feature that is there twice each copy takes half the weight, at half the price.
    assert (plain.accuracy, plain.fit_accuracy) == (more.accuracy, more.fit_accuracy)
    assert (plain.features, more.features) == (4, 12)


def test_adversarial_images_are_those_of_the_attack_on_the_model(learned):
    model, fit, held = parts(learned)
    found = probes(model, "conv | linear", fit, held, attack=ATTACK, batch_size=40, seed=3)
    pairs = dict.fromkeys((row.fitted_on, row.tested_on) for row in found.results)
    assert list(pairs) == [("clean", "clean"), ("clean", "adversarial"), ("adversarial", "clean"),
                           ("adversarial", "adversarial")]  # fmt: skip
    alone = probes(model, "conv | linear", fit, held)
    assert [r.accuracy for r in found.of()] == [r.accuracy for r in alone.results]
    assert found.of("clean", "adversarial")[0].gap is None
    from robustlayers.analysis._ground import attacked

    crafted = [attacked(model, *part, ATTACK, batch_size=40, seed=3) for part in (fit, held)]
    both = probes(model, "conv | linear", *crafted)
    assert [r.accuracy for r in found.of("adversarial", "adversarial")] == [r.accuracy for r in both.results]
    mixed = probes(model, "conv | linear", fit, crafted[1])
    assert [r.accuracy for r in found.of("clean", "adversarial")] == [r.accuracy for r in mixed.results]
    assert found.of("clean", "adversarial")[-1].accuracy < found.of()[-1].accuracy


def test_the_same_call_gives_the_same_numbers_and_batches_do_not_matter(learned):
    model, fit, held = parts(learned)
    one, two, other = (probes(model, "all", fit, held, batch_size=size) for size in (30, 30, 7))
    assert one == two
    assert [r.accuracy for r in one.results] == pytest.approx([r.accuracy for r in other.results], abs=0.03)


def test_nothing_is_left_behind(learned, no_trace):
    model, fit, held = parts(learned)
    with no_trace(model):
        probes(model, None, fit, held, attack=ATTACK)

    def stop(what, done, total):
        if what == "testing on adversarial images":
            raise KeyboardInterrupt

    with no_trace(model), pytest.raises(KeyboardInterrupt):
        probes(model, None, fit, held, attack=ATTACK, progress=stop)


def test_progress_ends_at_its_total(learned):
    model, fit, held = parts(learned)
    seen = []
    probes(model, "conv", fit, held, attack=ATTACK, batch_size=30, progress=lambda *what: seen.append(what))
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and seen[-1][1] == seen[-1][2] == 120 + 2 * (2 * 80 + 40)


def test_user_errors(learned):
    model, fit, held = parts(learned)
    with pytest.raises(UserError, match="penalty: 0"):
        probes(model, None, fit, held, penalty=0)
    with pytest.raises(UserError, match="no image"):
        probes(model, None, fit, (held[0][:0], held[1][:0]))
    with pytest.raises(UserError, match="clean to adversarial was not measured; allowed: clean to clean"):
        probes(model, "conv", fit, held).of("clean", "adversarial")
    with pytest.raises(UserError, match="unknown"):
        probes(model, "layer9", fit, held)


def test_rows_are_plain_and_the_plot_has_a_line_for_each_pair(learned):
    model, fit, held = parts(learned)
    found = probes(model, "conv", fit, held, attack=ATTACK)
    assert len(json.loads(json.dumps(found.rows(), allow_nan=False))) == 8
    axes = found.plot()
    assert [line.get_label() for line in axes.lines][:2] == ["clean to clean", "clean to adversarial"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "3"]
