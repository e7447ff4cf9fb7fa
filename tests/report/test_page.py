"""The page: holds everything, loads nothing, shows what the user wrote as text, and comes out the same every time."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from dataclasses import replace
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from robustlayers import report

HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(1)> | $x^2$ {{ 7*7 }} id="a" #0072b2 https://evil.example 日本'


def test_files(summary, folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {"tradeoff-best.svg", "tradeoff-last.svg", "pictures.png"}
    figures |= {f"curves-{arm.name}.svg" for arm in summary.arms}
    wanted = {"report.html", "report.md", "rows.csv", "claims.csv"}
    wanted |= {f"figures/{name}" for name in figures} | {f"figures/{name[:-3]}csv" for name in figures}
    assert names == wanted


def test_loads_nothing(html, page):
    links = re.compile(r"https?:|//|@import", re.IGNORECASE)
    for tag, attributes in html.Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert (value or "").startswith(("data:image/png;base64,", "#")), (tag, name, value)
            elif value and name != "content":
                assert not links.search(value), (tag, name, value)
            assert not re.search(r"url\((?!#)", value or "")
    assert "http" not in page.replace("http-equiv", "")


def test_runs_only_its_own_script(page):
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in page


def test_ids_are_unique_and_links_lead_somewhere(html, page):
    tags = html.Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for _, attributes in tags if "href" in attributes}
    targets |= {f"#{name}" for _, attributes in tags for name in re.findall(r"url\(#([^)]+)\)", str(attributes))}
    assert targets
    assert targets <= {f"#{name}" for name in ids}


def test_tags_are_closed_and_images_have_words(html, page):
    parsed = html.Page(page)  # asserts the nesting while it reads
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg" and "role" in attributes:
            assert attributes["aria-label"]


def test_figures_follow_the_scheme_of_the_reader(page):
    drawings = re.findall(r'<svg viewBox="[^"]+" class="drawing".*?\n</svg>', page, re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not re.search(r"(fill|stroke): ?#", drawing)
        assert "DejaVu" not in drawing
    for name in set(re.findall(r"var\((--[\w-]+)\)", page)) - {"--count"}:
        assert re.search(rf"{name}: ?[^;]+;", page), name


def test_the_same_summary_gives_the_same_bytes(summary, folder, tmp_path):
    report.write(summary, tmp_path)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path.name


def test_answer_comes_first(html, page):
    words = " ".join(" ".join(html.Page(page).words).split())
    order = ["Study report", "bn-adapt", "The answer", "Of 5 claims, 2 are supported", "Read with care", "Results"]
    order += ["Trade-off", "Learning curves", "What the attack does", "Arm by arm", "Threats to validity"]
    places = [words.index(text, words.index("Study report")) for text in order[:1] + order[1:]]
    assert places[0] < places[1] < places[2] < places[3] < places[4]
    body = page[page.index("<main>") :]
    sections = ["answer", "results", "tradeoff", "curves", "pictures", "arms", "claims", "validity", "repeat"]
    assert re.findall(r'<section id="(\w+)"', body) == sections


def test_a_diverged_seed_is_seen(html, page):
    words = " ".join(" ".join(html.Page(page).words).split())
    reason = "seed 1 diverged (loss is NaN in phase adapt, epoch 12, step 31); its means are over 2 of 3 seeds."
    assert f"Arm “random”: {reason}" in words
    assert "n = 2 of 3" in words
    assert "robust 30.5% (95% CI 17.5 to 43.5, n = 2)" in words


def test_words_of_the_user_stay_words(fake, html, tmp_path):
    plain = fake.make_summary(arms=("norm", "all"), diverged=("norm", 1))
    arm = plain.arms[0]
    group = replace(
        arm.phases[1].groups[0], name=HOSTILE, signal=HOSTILE, start=HOSTILE, tensors=[(HOSTILE, HOSTILE, 0.5)]
    )
    phase = replace(
        arm.phases[1], name=HOSTILE, groups=[group], optimizer=HOSTILE, attack=HOSTILE, normalization=HOSTILE
    )
    ledger = [replace(line, phase=HOSTILE, group=HOSTILE) for line in arm.ledger]
    bad = replace(
        arm, name=HOSTILE, levels={HOSTILE: HOSTILE}, reasons={1: HOSTILE}, phases=[arm.phases[0], phase], ledger=ledger
    )
    pictures = plain.pictures
    pictures = replace(
        pictures,
        labels=[HOSTILE] * 8,
        attack=HOSTILE,
        adversarial={HOSTILE: pictures.adversarial["norm"]},
        predicted_natural={HOSTILE: [HOSTILE] * 8},
        predicted_adversarial={HOSTILE: ["x"] * 8},
    )
    claim = replace(plain.claims[0], say=HOSTILE, that=HOSTILE, reason=HOSTILE, verdict="supported")
    summary = replace(
        plain, arms=[bad, plain.arms[1]], pictures=pictures, name=HOSTILE, question=HOSTILE, command=HOSTILE, data=HOSTILE,
        model=HOSTILE, threat=HOSTILE, attacks=[HOSTILE, "robust"], attack_texts={HOSTILE: HOSTILE}, selection=HOSTILE,
        machine=HOSTILE, versions={HOSTILE: HOSTILE}, recipe_yaml=HOSTILE + "\n```\n</code>", notes=[HOSTILE],
        factors={HOSTILE: [HOSTILE]}, claims=[claim], training_attack=HOSTILE,
        rows=[replace(plain.rows[0], arm=HOSTILE, flags=HOSTILE, levels={HOSTILE: HOSTILE})],
    )  # fmt: skip
    path = report.write(summary, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "{{ 7*7 }}" in text
    parsed = html.Page(text)
    for _, attributes in parsed.tags:
        assert "onerror" not in attributes
        for name in ("src", "href"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:image/png;base64,", "#"))
    flat = " ".join(" ".join(parsed.words).split())
    assert flat.count(HOSTILE) > 25
    drawn = 0
    for figure in (tmp_path / "figures").glob("*.svg"):
        words = [node.text or "" for node in ElementTree.parse(figure).iter()]
        drawn += any(word.startswith("<script>alert(1)") for word in words)
    assert drawn == 3  # both trade-offs and the curves of the arm


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"seeds": (0,)}, []),
        ({"arms": ("norm",), "seeds": (7,)}, ["claims"]),
        ({"with_pictures": False}, ["pictures"]),
        ({"with_claims": False}, ["claims"]),
        ({"with_curves": False}, ["curves"]),
        ({"factors": 2, "channels": 3}, ["claims"]),
        ({"checkpoints": ("best",)}, []),
        ({"arms": (), "with_pictures": False}, ["claims", "pictures", "curves", "tradeoff"]),
    ],
    ids=["one seed", "one arm", "no pictures", "no claims", "no curves", "two factors, RGB", "best only", "nothing"],
)
def test_variants(fake, html, tmp_path, changes, without):
    few = {} if {"arms", "factors"} & set(changes) else {"arms": ("none", "norm")}
    summary = fake.make_summary(**few, **changes)
    text = report.write(summary, tmp_path).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)"', text)
    every = ["answer", "results", "tradeoff", "curves", "pictures", "arms", "claims", "validity", "repeat"]
    assert sections == [name for name in every if name not in without]
    html.Page(text)
    for name in without:
        assert f'href="#{name}"' not in text
    assert (tmp_path / "claims.csv").exists() == ("claims" not in without)
    if len(summary.seeds) == 1:
        assert "There is one seed only" in text
        assert "±" not in "".join(row for grid in html.Page(text).grids for cells in grid.rows[1:] for row in cells)


def test_a_study_without_a_finished_run(fake, tmp_path):
    plain = fake.make_summary(arms=("none", "norm"), with_pictures=False, with_curves=False)
    arms = [
        replace(arm, status=dict.fromkeys(range(3), "missing"), results={}, seconds={}, ledger=[], best_epoch={})
        for arm in plain.arms
    ]
    claims = [
        replace(c, verdict="undecided", reason="no finished seeds", seeds=[], differences=[], mean=None, low=None,
                high=None, p=None, p_adjusted=None)
        for c in plain.claims
    ]  # fmt: skip
    text = report.write(replace(plain, arms=arms, claims=claims, rows=[]), tmp_path).read_text(encoding="utf-8")
    assert "No run has finished, so there is nothing to answer with yet." in text
    assert "seed 0 missing, seed 1 missing and seed 2 missing; it has no numbers to show." in text
    assert "No finished seeds." in text


def test_images_are_the_pictures(summary, html, page):
    shown = [str(attributes["src"]) for tag, attributes in html.Page(page).tags if tag == "img"]
    assert len(shown) == 8 + 6 * 8 * 2
    first = np.asarray(Image.open(BytesIO(b64decode(shown[0].partition(",")[2]))))
    assert np.array_equal(first, np.round(255 * summary.pictures.natural[0, 0]).astype(np.uint8))


def test_importing_the_report_is_light():
    code = "import sys, robustlayers.report; print([m for m in ('torch', 'matplotlib', 'scipy', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
