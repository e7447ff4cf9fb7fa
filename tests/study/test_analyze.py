"""Looking inside the nets of a study: what is planned, kept, skipped when it is there, and read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from robustlayers import analysis
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors, write_json
from robustlayers.selection import Inventory, resolve
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.analyze import Asked, Job, plan_analyses, run_analyses
from robustlayers.study.analyzed import collect_analyses, csv_of, kept_analyses, number_text, rows_of_analysis
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.semantics import build_attack, build_model, data_of
from robustlayers.study.store import Store


@pytest.fixture(scope="module")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny study, trained for one seed of two."""
    from tests_study_text import TEXT  # type: ignore[import-not-found]

    folder = tmp_path_factory.mktemp("analyze")
    path = folder / "tiny.yaml"
    path.write_text(TEXT.replace("DATA", str(images)), encoding="utf-8")
    run_plan(make_plan(load_study(path, ["seeds=1"])), folder / "run", workers=1, threads=1, device="cpu")
    return Store(folder / "run")
