"""The made-up study, and its report written once for all tests that only read it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from robustlayers import report
from robustlayers.study.summary import Summary


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"report_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    return _load("fake")


@pytest.fixture(scope="session")
def html() -> ModuleType:
    return _load("html_tables")


@pytest.fixture(scope="session")
def summary(fake: ModuleType) -> Summary:
    """Six arms, three seeds, one of them diverged."""
    return fake.make_summary(diverged=("random", 1))


@pytest.fixture(scope="session")
def folder(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(summary, tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="session")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")
