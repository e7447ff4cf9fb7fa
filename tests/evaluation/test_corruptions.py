"""Corruptions as a whole: every family on any image, its severity, and the table of accuracies under them."""

import copy
import itertools

import pytest
import torch

import robustlayers as rl
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation import CORRUPTIONS, accuracy, corrupt, corruption_accuracy, interval
from robustlayers.evaluation.corruptions import SEVERITIES, CorruptionTable

# Their published numbers change character on the way: other radii, other blends, water and then mud.
NOT_RISING = {"glass-blur", "procedural-frost", "elastic-transform", "saturate", "spatter"}


def test_the_benchmarks_families_are_there():
    groups = {}
    for name, corruption in CORRUPTIONS.items():
        groups.setdefault(corruption.group, []).append(name)
        assert len(corruption.levels) == 5
    assert {group: len(names) for group, names in groups.items()} == {
        "noise": 3,
        "blur": 4,
        "weather": 4,
        "digital": 4,
        "extra": 4,
    }
    paper = (
        "gaussian-noise shot-noise impulse-noise defocus-blur glass-blur motion-blur zoom-blur snow procedural-frost fog "
        "brightness contrast elastic-transform pixelate jpeg-compression speckle-noise gaussian-blur spatter saturate"
    )
    assert list(CORRUPTIONS) == paper.split()


@pytest.mark.parametrize("family", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 9), (1, 1, 1), (3, 40, 2)], ids=str)
def test_images_of_any_size_stay_images(family, shape):
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    if family == "saturate" and shape[0] == 1:
        with pytest.raises(UserError, match="1 channels; allowed: 3"):
            corrupt(x, family, 1)
        return
    for severity in (1, 5):
        z = corrupt(x, family, severity)
        assert z.shape == x.shape and z.dtype == x.dtype
        assert bool(z.isfinite().all()) and 0 <= float(z.min()) <= float(z.max()) <= 1


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_an_images_corruption_is_its_own(family, pictures):
    """The same in every batch, repeated, from bytes or floats; another image, or another seed, has other draws."""
    x, state = pictures[:4], torch.get_rng_state()
    kept = x.clone()
    whole = corrupt(x, family, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    one = corrupt(x[2:3], family, 3, seed=5, first=2)
    assert torch.allclose(whole[2:3], one, atol=1e-6)
    assert torch.equal(whole, corrupt(x, family, 3, seed=5))
    bytes_ = (x * 255).round().to(torch.uint8)
    assert torch.equal(corrupt(bytes_, family, 3), corrupt(rl.data.to_float(bytes_), family, 3))
    # Those that draw nothing give the same image again.
    twice = x[:1].repeat(2, 1, 1, 1)
    fixed = {"defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg-compression", "saturate"}
    first, second = corrupt(twice, family, 3)
    assert torch.equal(first, second) == (family in fixed | {"gaussian-blur"})
    assert torch.equal(corrupt(x, family, 3, seed=6), whole) == (family in fixed | {"gaussian-blur"})
    assert corrupt(x[:0], family, 3).shape == x[:0].shape
    assert corrupt(x.double(), family, 3).dtype == torch.float64


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_severity_is_distance_to_the_clean_image(family, pictures):
    distances = [float((corrupt(pictures, family, s) - pictures).square().mean().sqrt()) for s in SEVERITIES]
    assert distances[0] > 0.003 and distances[4] > 1.5 * distances[0] * (family not in NOT_RISING)
    # A box of another size meets the edges of a picture elsewhere, so pixelate rises but for a tenth.
    rising = all(two >= (0.9 if family == "pixelate" else 1) * one for one, two in itertools.pairwise(distances))
    assert rising or family in NOT_RISING, distances


# -- accuracy ------------------------------------------------------------------------------------------------------

FEW = ("gaussian-noise", "contrast", "speckle-noise")


def test_the_table_is_the_accuracy_on_corrupted_images(trained):
    model, x, y = trained
    told = []
    table = corruption_accuracy(model, x, y, FEW, (1, 5), seed=3, progress=lambda *what: told.append(what))
    assert table.clean == 115 and told[0] == ("clean", 120, 120) and told[-1] == ("speckle-noise 5", 120, 120)
    for family in FEW:
        for severity in (1, 5):
            expected = accuracy(model, corrupt(x, family, severity, seed=3), y)
            assert table.accuracy(family, severity) == expected
    assert table == corruption_accuracy(model, x, y, FEW, (1, 5), 7, seed=3)
    means = []
    for seed in (3, 3, 4):
        seen = []
        corruption_accuracy(lambda z: seen.append(z) or model(z), x, y, FEW[:1], (1,), seed=seed)  # noqa: B023
        means.append(float(seen[1].mean()))
    assert means[0] == means[1] != means[2]
    assert table == corruption_accuracy(lambda z: model(z), x, y, FEW, (1, 5), seed=3)
    assert table.accuracy("contrast", 5) < table.clean / 120


def test_means_weigh_families_of_the_benchmark_alike():
    counts = {"gaussian-noise": (80, 60), "fog": (40, 20), "saturate": (0, 0)}
    table = CorruptionTable(tuple(counts), (1, 5), counts, 90, 100, "running")
    assert table.means == {"gaussian-noise": 0.7, "fog": pytest.approx(0.3), "saturate": 0}
    assert table.mean == pytest.approx(0.5) and table.mean_error == pytest.approx(0.5)
    other = CorruptionTable(
        ("fog", "gaussian-noise"), (1, 5), {"fog": (50, 50), "gaussian-noise": (70, 70)}, 90, 100, ""
    )
    assert table.relative_to(table) == pytest.approx(1)
    assert table.relative_to(other) == pytest.approx((1 + 0.7 / 0.5) / 2)
    extra = CorruptionTable(("saturate",), (1, 5), {"saturate": (50, 30)}, 90, 100, "running")
    assert extra.mean == pytest.approx(0.4)
    rows = table.rows()
    assert len(rows) == 7 and rows[0]["family"] == "clean" and rows[0]["accuracy"] == 0.9
    assert (rows[1]["severity"], rows[1]["count"]) == (1, 80) and (rows[1]["low"], rows[1]["high"]) == interval(80, 100)
    for words, call in (
        ("family of this table 'fogg'; nearest: fog", lambda: table.accuracy("fogg", 1)),
        ("measured: 1, 5", lambda: table.accuracy("fog", 2)),
        ("share no family", lambda: table.relative_to(extra)),
        ("different severities", lambda: table.relative_to(CorruptionTable(("fog",), (1,), {"fog": (1,)}, 1, 2, ""))),
        ("no error", lambda: other.relative_to(CorruptionTable(("fog",), (1, 5), {"fog": (9, 9)}, 9, 9, ""))),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_statistics_of_the_batch_adapt_to_a_corruption(trained, bits):
    model, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
    model.body[1].running_mean += 0.5  # statistics that do not fit
    before = bits(model)
    running, batch = (corruption_accuracy(model, x, y, ["contrast"], (5,), by=by) for by in ("running", "batch"))
    assert batch.accuracy("contrast", 5) > running.accuracy("contrast", 5) + 0.1
    assert model.training and bits(model) == before
    assert batch.by == "batch" and batch.rows()[0]["by"] == "batch"


def test_all_families_that_the_channels_allow_by_default(trained):
    model, x, y = trained
    table = corruption_accuracy(model, x[:20], y[:20], severities=(2,))
    assert set(CORRUPTIONS) - set(table.families) == {"saturate"}
    axes = table.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(table.families)
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{100 * table.accuracy(family, 2):.1f}" for family in table.families]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, y: corrupt(x, "gaussian-noize", 1), "nearest: gaussian-noise"),
        (lambda m, x, y: corrupt(x, "fog", 0), "severity: 0 is not allowed; allowed: 1 to 5"),
        (lambda m, x, y: corrupt(x, "fog", True), "severity"),
        (lambda m, x, y: corrupt(x.float(), "fog", 1), "inside the model"),
        (lambda m, x, y: corrupt(x[0], "fog", 1), "takes images"),
        (lambda m, x, y: corrupt(x.repeat(1, 2, 1, 1), "jpeg-compression", 1), "2 channels; allowed: 1 or 3"),
        (lambda m, x, y: corruption_accuracy(m, x, y, ["fogs"]), "nearest: fog"),
        (lambda m, x, y: corruption_accuracy(m, x, y, ["fog"], (6,)), "severity: 6"),
        (lambda m, x, y: corruption_accuracy(m, x, y, ["fog"], by="branch"), "statistics to normalize by"),
        (lambda m, x, y: corruption_accuracy(m, x, y, ["fog"], batch_size=0), "batch_size"),
        (lambda m, x, y: corruption_accuracy(m, x, y[:2], ["fog"]), "one integer label"),
    ],
)
def test_mistakes_are_named(trained, call, words):
    with pytest.raises(UserError, match=words):
        call(*trained)


def test_streams_are_those_of_the_place_in_the_data_set():
    x = torch.full((2, 1, 4, 4), 0.5)
    noise = torch.randn(1, 4, 4, generator=stream(7, "corruption", "gaussian-noise", 11))
    assert torch.allclose(corrupt(x, "gaussian-noise", 3, seed=7, first=10)[1], (x[1] + 0.08 * noise).clamp(0, 1))
