"""A study that takes seconds: 80 images of 8x8 pixels in four classes, a narrow net, two phases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustlayers.study.collect import collect_rows
from robustlayers.study.definition import Study, load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import Outcome, run_plan
from robustlayers.study.store import Store

TEXT = """\
question: Do norm layers alone gain robustness?
name: tiny
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: pretrain, epochs: 1, train: {all: natural}}
  - {name: adapt, epochs: 2, train: {norm: adversarial, rest: frozen}}
factors:
  group:
    none: {phases.adapt.epochs: 0}
    norm: {}
    all: {phases.adapt.train: {all: adversarial}}
seeds: 2
evaluate:
  attacks: [pgd-2]
  monitor: {attack: pgd-1, images: 16}
claims:
  - {say: norm layers gain, that: "robust[group=norm] > robust[group=none]"}
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz file: in class k, quadrant k of the image is bright, under noise."""
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 24)):
        labels = np.arange(count) % 4
        pixels = draw.integers(0, 120, (count, 8, 8))
        for index, label in enumerate(labels):
            row, column = divmod(int(label), 2)
            pixels[index, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 90
        arrays |= {f"{part}_images": pixels.astype(np.uint8), f"{part}_labels": labels}
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def text(images: Path) -> str:
    """The study as it is written."""
    return TEXT.replace("DATA", str(images))


@pytest.fixture
def write(text: str, tmp_path: Path) -> Callable[..., Path]:
    """Write the study, each (old, new) text replaced, and return the file."""

    def save(*edits: tuple[str, str], name: str = "tiny.yaml") -> Path:
        changed = text
        for old, new in edits:
            assert changed.count(old) == 1, f"{old!r} stands {changed.count(old)} times in the study"
            changed = changed.replace(old, new)
        (tmp_path / name).write_text(changed)
        return tmp_path / name

    return save


@pytest.fixture
def study(write: Callable[..., Path]) -> Callable[..., Study]:
    """Load the study with overrides."""
    return lambda *overrides: load_study(write(), overrides)


@pytest.fixture
def plan(study: Callable[..., Study]) -> Callable[..., Plan]:
    """Plan the study with overrides."""
    return lambda *overrides: make_plan(study(*overrides))


@pytest.fixture
def run(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the study with overrides in this process, with one thread, into `out` unless told otherwise."""

    def go(*overrides: str, out: Path | None = None, workers: int = 1, **more: Any) -> Outcome:
        return run_plan(plan(*overrides), out or tmp_path / "out", workers=workers, threads=1, **more)

    return go


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Read the SHA-256 of every weight file, and the rows, of a study's folder: what must never depend on how it ran."""

    def read(folder: Path) -> dict[str, str]:
        found = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.glob("phases/*/seed-*/*.safetensors"))
            if "damaged" not in path.parent.name
        }
        return found | {"rows": "\n".join(str(row) for row in collect_rows(Store(folder)))}

    return read


@pytest.fixture(scope="session")
def finished(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, run once; tests only read it, or copy it."""
    place = tmp_path_factory.mktemp("finished")
    (place / "tiny.yaml").write_text(text)
    outcome = run_plan(make_plan(load_study(place / "tiny.yaml")), place / "out", workers=1, threads=1)
    assert outcome.complete and not outcome.diverged and (outcome.trained, outcome.measured) == (6, 6)
    return place / "out"
