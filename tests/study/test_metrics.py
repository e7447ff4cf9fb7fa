"""The metrics of claims: exactly the rows that a study has, and for any other the setting that would measure it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.core.errors import UserError
from robustlayers.report import write
from robustlayers.study.claim_syntax import parse
from robustlayers.study.collect import collect, collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.metrics import NUMBERS, measured_metrics, unmeasured
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.store import Store

STUDY = """\
question: Measured what?
name: claimed
data: {name: "npz:DATA", validation: 0.2, test_images: 10}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: adapt, epochs: 1, train: {all: {natural: 0.5, adversarial: 0.5}}}
factors:
  norm:
    batch: {}
    group: {model.norm: group}
    dual:
      model.norm: dual
      phases.adapt.normalization: {clean: {branch: main}, adversarial: {branch: auxiliary}}
seeds: 1
evaluate:
  attacks: [pgd-2, {name: autoattack, steps: 5, targets: 2, queries: 20}]
  checkpoints: [last]
  branches: true
  sanity: true
  corruptions: {families: [fog, noise], severities: [1, 5], images: 8}
  monitor: {attack: fgsm, images: 16}
"""
CASCADE = "apgd-ce-5-apgd-t-5-2-targets-fab-t-5-2-targets-square-20"
CLAIMS = [
    "corrupted[batch] > 0.2",
    "corrupted:fog:5[dual] < corrupted:fog:1[dual] + 2 * corrupted:shot-noise[group]",
    "ece[dual] - ece[batch] < 0.9",
    "robust_lowest_class[dual] > clean_lowest_class[dual] - 1",
    "'sanity:eps=8/255'[norm=dual] < sanity:clean[batch]",
    "'sanity:steps=32'[dual] < sanity:pgd-margin-20[dual]",
    "'pgd-2@main>auxiliary'[dual] >= clean@main[dual]",
    "train_robust[batch] - validation_clean[batch] < 2",
    "norm_kl_mean_noise[batch] > norm_dead_share[group]",
    "norm_dead_channels[batch] < 0.5",  # none is, so that the count would pass for a share
]


@pytest.fixture(scope="module")
def ran(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with all that a study can measure, in a folder `out` beside its file."""
    place = tmp_path_factory.mktemp("claimed")
    claims = "".join(f'  - {{say: claim {number}, that: "{text}"}}\n' for number, text in enumerate(CLAIMS))
    (place / "claimed.yaml").write_text(STUDY.replace("DATA", str(images)) + "claims:\n" + claims)
    outcome = run_plan(make_plan(load_study(place / "claimed.yaml")), place / "out", workers=1, threads=1)
    assert outcome.complete, outcome.failed
    return place


def test_the_metrics_are_the_rows(ran: Path) -> None:
    """But for the threshold of dead channels, which is no measurement."""
    for arm in load_study(ran / "claimed.yaml").arms:
        rows = [row for row in collect_rows(Store(ran / "out")) if row.arm == arm.name and not row.phase]
        expected = [row.metric for row in rows if row.seed == 0 and row.metric != "norm_dead_threshold"]
        found = measured_metrics(arm.recipe)
        assert sorted(found) == sorted(expected), arm.name
        assert all(0 <= row.value <= 1 for row in rows if row.metric in set(found) - set(NUMBERS))


def test_a_claim_about_any_of_them_is_judged_by_its_rows(ran: Path) -> None:
    values = {(row.arm, row.metric, row.seed): row.value for row in collect_rows(Store(ran / "out")) if not row.phase}
    summary = collect(Store(ran / "out"))
    assert [claim.that for claim in summary.claims] == CLAIMS
    for claim in summary.claims:
        difference = parse(claim.that).difference
        for seed, found in zip(claim.seeds, claim.differences, strict=True):
            terms = [(f, values[term.parts[0].level, term.metric, seed]) for f, term in difference.terms]
            assert found == pytest.approx(difference.constant + sum(f * value for f, value in terms), abs=1e-12)
        assert len(claim.differences) == 1
        counts = any(term.metric in NUMBERS for _, term in difference.terms)
        assert (" points" in claim.reason) == (not counts), claim.reason


def test_they_stand_in_the_report(ran: Path) -> None:
    page = write(collect(Store(ran / "out")), ran / "report")
    with (ran / "report" / "claims.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["that"] for line in lines] == CLAIMS
    assert all(line["difference"] for line in lines)
    for number in range(len(CLAIMS)):
        assert f"claim {number}" in page.read_text() and f"claim {number}" in page.with_suffix(".md").read_text()


PLAIN = """\
question: Measured what?
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
phases: [{name: adapt, epochs: 1, train: {all: natural}}]
factors: {norm: {batch: {}, group: {model.norm: group}, dual: {model.norm: dual}, all: {data.validation: 0}}}
evaluate: {attacks: [ATTACKS], checkpoints: [last]MORE}
claims: [{say: it is so, that: "CLAIM"}]
"""
BRANCHES = ", branches: true"


@pytest.fixture
def told(images: Path, tmp_path: Path) -> Callable[..., str]:
    """What is said about the claim that a metric is above 0 in an arm, without what is allowed; nothing if it may be."""

    def tell(metric: str, arm: str = "batch", more: str = "", attacks: str = "pgd-2") -> str:
        text = PLAIN.replace("DATA", str(images)).replace("ATTACKS", attacks).replace("MORE", more)
        (tmp_path / "s.yaml").write_text(text.replace("CLAIM", f"{metric}[{arm}] > 0"))
        try:
            load_study(tmp_path / "s.yaml")
        except UserError as error:
            (line,) = str(error).splitlines()
            start = f"{tmp_path / 's.yaml'}:8: claims.0.that: column 1: "
            assert (
                line.startswith(start) and "; allowed: " in line and ", backward_passes, " in line.replace(": b", ", b")
            )
            return line.removeprefix(start).partition("; allowed")[0]
        return ""

    return tell


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("corrupted", "evaluate: {corruptions: all} would measure it"),
        ("corrupted:fog", "evaluate: {corruptions: [fog]} would measure it"),
        ("corrupted:fog:3", "evaluate: {corruptions: [fog]} would measure it"),
        ("corrupted:saturate", "saturate is not for images with 1 channel(s)"),
        ("sanity:pgd-20", "evaluate: {sanity: true} would measure it"),
        ("'sanity:eps=8/255'", "evaluate: {sanity: true} would measure it"),
        ("clean@main", "evaluate: {branches: true} would measure it, of a model whose norm layers have branches"),
        ("pgd-20", "evaluate: {attacks: [..., pgd-20]} would measure it"),
        ("autoattack", "evaluate: {attacks: [..., autoattack]} would measure it, on all test images"),
        ("autoattack:fab-t", "evaluate: {attacks: [..., autoattack]} would measure it, on all test images"),
        ("relative_l2", "it is of a phase and a group, and a claim names an arm only"),
    ],
)
def test_a_metric_that_is_not_measured_names_the_setting(told: Callable[..., str], metric: str, hint: str) -> None:
    assert told(metric) == f"metric {metric.strip(chr(39))!r} is not measured; {hint}"


@pytest.mark.parametrize(
    ("metric", "near"),
    [
        ("corupted", ""),
        ("corrupted:fogg", ""),
        ("corrupted:fog:6", ""),
        ("sanity:eps=1/255", ""),
        ("cleen", "; nearest: clean"),
        ("pgdd-2", "; nearest: pgd-2"),
        ("pgd-2:fab-t", "; nearest: pgd-2"),
        ("norm_dead", "; nearest: norm_dead_share, norm_dead_channels"),
        ("valid_clean", "; nearest: validation_clean, train_clean, clean"),
    ],
)
def test_a_metric_that_no_study_has_is_unknown(told: Callable[..., str], metric: str, near: str) -> None:
    said = told(f"'{metric}'")
    assert said == f"unknown metric {metric!r}" if not near else said.startswith(f"unknown metric {metric!r}{near}")


def test_with_the_setting_it_may_be_claimed(told: Callable[..., str]) -> None:
    corruptions = ", corruptions: {families: [fog, noise], severities: [1, 3]}"
    for metric in ("corrupted", "corrupted:fog", "corrupted:impulse-noise:3"):
        assert told(metric, more=corruptions) == ""
    assert told("corrupted:snow", more=corruptions) == (
        "metric 'corrupted:snow' is not measured; snow among evaluate.corruptions would measure it"
    )
    assert told("corrupted:fog:2", more=corruptions) == (
        "metric 'corrupted:fog:2' is not measured; 2 among evaluate.corruptions.severities would measure it"
    )
    assert told("'sanity:eps=0.5'", more=", sanity: true") == told("ece") == told("validation_robust") == ""
    assert "nearest: 'sanity:eps=8/255'" in told("'sanity:eps=9/255'", more=", sanity: true")
    assert told("'sanity:eps'", more=", sanity: true").endswith("quote a name that holds > or =")
    assert told("pgd-20", attacks="pgd-2, pgd-20") == ""
    short = "{name: autoattack, steps: 5, targets: 2, queries: 20}"
    assert told(CASCADE, attacks=short) == told(f"{CASCADE}:square-20", attacks=short) == ""
    assert told("autoattack:fab-t", attacks=short) == (
        "metric 'autoattack:fab-t' is not measured; the name is for the standard on all test images, "
        f"and here it is {CASCADE}"
    )
    assert told("autoattack:fab-t", attacks="autoattack") == told("autoattack", attacks="autoattack") == ""


def test_what_only_some_arms_measure_is_claimed_of_them(told: Callable[..., str]) -> None:
    assert told("clean@auxiliary", "dual", BRANCHES) == told("'pgd-2@main>auxiliary'", "dual", BRANCHES) == ""
    assert told("clean@auxiliary", "batch", BRANCHES) == (
        "metric 'clean@auxiliary' is not measured; the norm layers of the model have no branches"
    )
    assert told("clean@second", "dual", BRANCHES).startswith("unknown metric 'clean@second'; nearest: ")
    assert told("pgd-2@main", "dual", BRANCHES).endswith("quote a name that holds > or =")
    assert told("norm_kl_mean_clean") == told("norm_dead_share", "group") == ""
    assert told("norm_kl_mean_clean", "group") == (
        "metric 'norm_kl_mean_clean' is not measured; the model has no norm layers with such tensors"
    )
    assert told("validation_clean", "all") == (
        "metric 'validation_clean' is not measured; it is of validation images, and data: {validation: 0} leaves none"
    )


def test_many_of_a_kind_are_one_pattern_in_what_is_allowed(ran: Path) -> None:
    arm = load_study(ran / "claimed.yaml").arms[2]
    said = unmeasured("?", arm.recipe, measured_metrics(arm.recipe)).partition("allowed: ")[2].split(", ")
    assert len(said) == len(set(said)) < 45
    assert {"clean@BRANCH", "'pgd-2@CRAFTED>MEASURED'", "'sanity:eps=EPS'", "corrupted:FAMILY:SEVERITY"} <= set(said)
    assert {"ece", "sanity:pgd-20", "pgd-2", "norm_dead_share"} <= set(said)


def test_a_claim_is_judged_beside_a_mistake_elsewhere(images: Path, tmp_path: Path) -> None:
    """Without running anything of a model that is not trusted."""
    text = PLAIN.replace("DATA", str(images)).replace("ATTACKS", "pgd-2").replace("MORE", BRANCHES)
    text = text.replace("name: small-cnn", 'name: "nowhere:net"').replace("CLAIM", "clean@main[dual] > robst[batch]")
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "--trust" in lines[0] and "column 20: unknown metric 'robst'" in lines[1]
