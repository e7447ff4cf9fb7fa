"""The table of models in the documents: as committed, made by its tool, with shares that the literature knows."""

import importlib.util
import re
from pathlib import Path

import pytest

from robustlayers import models

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/model_table.py"
pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="tools/ is not part of this copy")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("model_table", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tool):
    return tool.document()


def test_the_committed_table_is_what_the_tool_makes(text):
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == text, "run tools/model_table.py"


@pytest.mark.parametrize(
    ("model", "share"),
    [
        ("ResNet-18", "0.086"),
        ("ResNet-34", "0.080"),
        ("ResNet-50, ImageNet", "0.208"),
        ("PreActResNet-18", "0.070"),
        ("VGG-16-BN", "0.057"),
        ("VGG-16", "0.000"),
        ("WRN-28-4", "0.123"),
        ("WRN-28-10", "0.049"),
        ("WRN-34-10", "0.049"),
        ("WRN-34-20", "0.024"),
        ("ResNet-14, shortcut B", "0.639"),
        ("ResNet-110, shortcut B", "0.479"),
    ],
)
def test_shares_are_those_of_the_literature(text, model, share):
    (line,) = re.findall(rf"^\| {re.escape(model)} \|.*$", text, re.MULTILINE)
    assert line.endswith(f"| {share} % |")


def test_every_model_and_every_option_of_its_own_is_listed(tool, text):
    assert {name for name, _, _ in tool.ROWS} == set(models.names())
    common = set(tool.COMMON)
    listed = set(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|", text, re.MULTILINE))
    assert listed == {(name, key) for name in models.names() for key in set(models.options_of(name)) - common}


def test_what_the_text_says_of_common_options_is_so():
    lacking = {
        key: {name for name in models.names() if key not in models.options_of(name)} for key in ("norm", "stem_stride")
    }
    assert lacking == {"norm": {"nf-resnet", "fixup-resnet"}, "stem_stride": {"mlp"}}
    for name in models.names():
        assert {"classes", "channels", "mean", "std"} <= set(models.options_of(name))


def test_an_outdated_file_is_found(tool, text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "models.md"
    path.write_text(text.replace("11,173,962", "11,173,963"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["model_table.py", "--to", str(path), "--check"])
    assert tool.main() == 1
    monkeypatch.setattr("sys.argv", ["model_table.py", "--to", str(path)])
    assert tool.main() == 0
    assert path.read_text(encoding="utf-8") == text
    assert "out of date" in capsys.readouterr().out
