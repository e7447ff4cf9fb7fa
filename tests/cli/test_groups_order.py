"""`robustlayers groups` in execution order: of a study, and of a model that an importable function returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.spare = nn.Linear(4, 2), nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.again = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return self.head(self.again(self.again(self.body(x))).mean((2, 3)))

class Two(Net):
    def forward(self, x, y):
        return super().forward(x + y)

def shifted(by):
    return Net()

def wide(*, width, bias=True, name):
    assert name == "7"
    return nn.Linear(4, width, bias=bias)

def broken():
    raise RuntimeError("no weights\\nhere")

def number():
    return 3

net, seven = Net(), 7
"""


@pytest.fixture(autouse=True)
def _nets(_here: None) -> Iterator[None]:
    Path("mynets").mkdir()
    Path("mynets/__init__.py").touch()
    Path("mynets/small.py").write_text(MODELS)
    Path("mynets/bad.py").write_text("import mynets.small\nimport no_such_package_at_all\n")
    Path("mynets/worse.py").write_text("raise SystemExit(3)\n")
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mynets"]:
        del sys.modules[name]


@pytest.fixture
def run(call: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Run `robustlayers groups` and return (exit code, lines of standard output, lines of standard error)."""

    def lines(*arguments: str) -> tuple[int, list[str], list[str]]:
        code, out, err = call("groups", *arguments)
        return code, [line.rstrip() for line in out.splitlines()], err.splitlines()

    return lines


def column(lines: list[str], name: str) -> list[str]:
    """The cells below the header `name`, whose text is aligned left."""
    (header,) = [line for line in lines if "tensor" in line and "shape" in line]
    start, below = header.index(name), lines[lines.index(header) + 1 :]
    return [line[start:].split("  ")[0] for line in below]


def test_a_factory_is_printed_in_execution_order(run):
    code, out, err = run("mynets.small:Net")
    assert (code, err) == (0, [])
    assert out[0] == "mynets.small:Net: 148 parameters"
    statistics = ["body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"]
    names = ["body.0.weight", "body.1.weight", "body.1.bias", *statistics, "again.weight", "head.weight", "head.bias"]
    assert column(out, "tensor") == [*names, "spare.weight", "spare.bias"]
    assert column(out, "runs") == ["1", *["2"] * 5, "3 (2 times)", "4", "4", "never", "never"]
    assert column(out, "module")[:2] == ["Conv2d", "BatchNorm2d"]
    assert column(out, "kind")[1:6] == ["parameter", "parameter", "buffer", "buffer", "buffer"]
    assert column(out, "shape")[0] == "4x3x3x3"
    assert out[2].endswith("108  72.973%") and out[5].endswith(" 4")  # buffers are no share of the parameters


def test_options_reach_the_factory_with_their_types(run):
    code, out, err = run("mynets.small:wide", "--option", "width=3", "--option", "bias=false", "--option", "name='7'")
    assert (code, err) == (0, [])
    assert out[0] == "mynets.small:wide: 12 parameters"  # no bias, which the text 'false' would have made


def test_each_selector_gets_a_column(run):
    code, out, err = run("mynets.small:Net", "--select", "first(1) | last(1)", "--select", "channels(head, 0.5)")
    assert (code, err) == (0, [])
    assert out[:2] == [
        "first(1) | last(1): 118 parameters (79.730%), 0 buffer entries",
        "channels(head, 0.5): 5 parameters (3.378%), 0 buffer entries",
    ]
    assert column(out, "tensor") == ["body.0.weight", "head.weight", "head.bias"]
    assert [line.split()[-1] for line in out[3:]] == ["108", "4", "1"]
    assert out[3].index("108", 60) < out[4].rindex("4")


def test_one_selector_shows_its_hits_only(run):
    code, out, _ = run("mynets.small:Net", "--select", "body[.][01].[a-w]* & norm")  # no markup of the console
    assert code == 0
    assert out[0].startswith("body[.][01].[a-w]* & norm: 8 parameters")
    assert out[1].split() == ["runs", "tensor", "module", "kind", "shape", "entries", "share", "selected"]
    assert set(column(out, "runs")) == {"2"}


def test_a_model_that_cannot_be_run_is_printed_in_registration_order(run):
    code, out, err = run("mynets.small:Two")
    assert (code, err) == (0, [])
    assert out[1].startswith("in order of registration: Two cannot be run on any guessed input")
    assert column(out, "tensor")[:2] == ["head.weight", "head.bias"]
    assert "runs" not in out[2].split()
    code, out, err = run("mynets.small:Two", "--select", "norm")  # what needs no order still works
    assert code == 0 and len(column(out, "tensor")) == 5
    code, out, err = run("mynets.small:Two", "--select", "first(1)")
    assert (code, out) == (2, []) and len(err) == 1
    assert err[0].startswith("--select: Two cannot be run on any guessed input")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mynets.small:net"], "mynets.small:net is of type Net; allowed: a function that returns an nn.Module"),
        (["mynets.small:seven"], "mynets.small:seven is of type int; allowed: a function that returns an nn.Module"),
        (["mynets.small:number"], "mynets.small:number() returned a value of type int; allowed: an nn.Module"),
        (["mynets.small:broken"], "mynets.small:broken() failed: RuntimeError: no weights here"),
        (["mynets.small:shifted"], "mynets.small:shifted needs by"),
        (["mynets.small:shifted", "--option", "bye=2"], "unknown option of mynets.small:shifted 'bye'; nearest: by; "),
        (["mynets.small:shifted", "--option", "by"], "--option: 'by' is not NAME=VALUE, such as width=16"),
        (["mynets.small:shifted", "--option", "by=[", "--option", "by=2"], "--option by: not valid YAML: a bracket is "),
        (["mynets.small:shifted", "--option", "by=1", "--option", "by=2"], "--option: 'by' is given twice"),
        (["mynets.small:Net", "--option", "by=1"], "mynets.small:Net takes no options"),
        (["mynets.small:numbr"], "unknown function of mynets.small 'numbr'; nearest: number; allowed: Net, Two, "),
        (["mynets.smal:Net"], "there is no module 'mynets.smal' in "),
        (["no_such_nets.small:Net"], "there is no module 'no_such_nets' in "),
        (["mynets.bad:Net"], "mynets.bad cannot be imported: ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        (["mynets.worse:Net"], "mynets.worse cannot be imported: SystemExit: 3"),
        (["mynets/small.py:Net"], "'mynets/small.py:Net' is not MODULE:FUNCTION, such as mypackage.models:resnet"),
        (["nothing"], "nothing: no such file; give a study file, STUDY.yaml, or a function, MODULE:FUNCTION"),
        (["no.yaml"], "no.yaml"),
        (["no.yaml", "--option", "by=1"], "--option: means an argument of a function; no.yaml is a study, which takes "),
        (["mynets.small:Net", "--arm", "norm"], "--arm: means a study's settings; mynets.small:Net is a function"),
        (["mynets.small:Net", "--set", "seeds=2"], "--set: means a study's settings; mynets.small:Net is a function"),
        (["mynets.small:Net", "--select", "nrm"], "--select: unknown selector 'nrm'; nearest: norm"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(message)


def test_every_wrong_selector_is_told_at_once(run):
    code, _, err = run("mynets.small:Net", "--select", "nrm", "--select", "norm", "--select", "first(9)")
    assert code == 2
    assert err[0].startswith("--select: unknown selector 'nrm'")
    assert err[1] == "--select: Net has 4 modules with parameters that run, not 9"


def test_a_study_is_printed_arm_by_arm_with_its_groups(run, base):
    Path("s.yaml").write_text(base)
    code, out, err = run("s.yaml", "--arm", "head")
    assert (code, err) == (0, [])
    assert out[0] == "arm head"
    assert column(out, "tensor")[:3] == ["normalize.mean", "normalize.std", "conv1.weight"]
    assert column(out, "tensor")[-2:] == ["linear.weight", "linear.bias"]
    assert column(out, "adapt") == ["rest: frozen"] * (len(out) - 4) + ["head: adversarial"] * 2
    code, out, err = run("s.yaml")
    assert [line for line in out if line.startswith("arm ")] == ["arm none", "arm norm", "arm head"]


def test_a_study_may_cut_in_execution_order(run, base):
    cut = "phases.adapt.train={'before(\"layer2\")': adversarial, after(layer2): frozen}"
    Path("s.yaml").write_text(base)
    code, out, err = run("s.yaml", "--set", cut, "--arm", "norm")
    assert (code, err) == (0, [])
    late = ["after(layer2): frozen"] * 8
    assert column(out, "adapt") == ['before("layer2"): adversarial'] * (len(out) - 2 - len(late)) + late
