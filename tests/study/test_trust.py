"""A model of one's own: its code runs with `--trust` and never without, and what it is counts for the identity of results."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from robustlayers.cli.main import main
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.semantics import _model_for_checks
from robustlayers.study.store import Store

# Importing it leaves a file behind: the proof that it ran.
MODULE = """\
import os
from pathlib import Path

from torch import nn

Path("ran").mkdir(exist_ok=True)
Path("ran", str(os.getpid())).touch()


def build(classes, channels, width=4, fail=""):
    if fail:
        raise RuntimeError(fail)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )


def number():
    return 4
"""

STUDY = """\
question: Does it run?
name: own
data: {name: "npz:DATA", validation: 0.2}
model: {name: "ownnet:build", width: 6}
threat: {norm: linf, eps: 8/255}
attack: fgsm
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: first, epochs: 1, train: {all: natural}}
  - {name: second, epochs: 1, train: {norm: adversarial, rest: frozen}, start: {rest: reinitialize}}
seeds: 2
evaluate: {attacks: [fgsm], monitor: {attack: fgsm, images: 16}}
"""
# Another process that reads what was found.
READ = """\
from robustlayers.cli.main import main
for command in ("report", "rows", "verify"):
    try:
        main([command, "out"])
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
"""
REFUSED = "own.yaml:4: model.name: ownnet:build is code that would be run; add --trust if you trust it"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder with a module and a study; forget the module before and after."""
    monkeypatch.chdir(tmp_path)
    Path("ownnet.py").write_text(MODULE)
    Path("own.yaml").write_text(STUDY.replace("DATA", str(images)))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("ownnet", None)
    _model_for_checks.cache_clear()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process and return (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def ran() -> int:
    """Return in how many processes the module was imported."""
    return len(list(Path("ran").glob("*")))


@pytest.mark.parametrize(
    "arguments",
    [("run", "own.yaml"), ("plan", "own.yaml"), ("groups", "own.yaml"), ("groups", "own.yaml", "--select", "norm")],
    ids=" ".join,
)
def test_without_trust_nothing_is_imported(call: Call, arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, out, err) == (2, "", REFUSED + "\n")
    assert ran() == 0 and "ownnet" not in sys.modules
    assert sorted(path.name for path in Path().iterdir()) == ["own.yaml", "ownnet.py"]


@pytest.mark.parametrize(
    ("edit", "overrides", "lines"),
    [
        (("model: {name: \"ownnet:build\", width: 6}", "model: {name: small-cnn}"), ["model.name=ownnet:build"],
         ["--set model.name: ownnet:build is code that would be run; add --trust if you trust it"]),
        (("seeds: 2", "factors: {net: {ours: {}, other: {model: {name: small-cnn}}}}\nseeds: 2"), [],
         ["own.yaml:4: model.name: ownnet:build is code that would be run; add --trust if you trust it"]),
        (("name: second, epochs: 1", "name: first, epochs: 1"), [],
         [REFUSED, "own.yaml:10: phases.1.name: two phases are called 'first'"]),
        (("phases:\n", "claims: [{say: a, that: \"clean[x] > 1\"}]\nphases:\n"), [],
         [REFUSED, "own.yaml:8: claims.0.that: column 7: unknown level 'x'"]),
    ],
)  # fmt: skip
def test_other_mistakes_and_other_ways_to_name_it_run_nothing_either(
    call: Call, edit: tuple[str, str], overrides: list[str], lines: list[str]
) -> None:
    text = Path("own.yaml").read_text()
    assert text.count(edit[0]) == 1
    Path("own.yaml").write_text(text.replace(*edit))
    code, out, err = call("run", "own.yaml", *[part for override in overrides for part in ("--set", override)])
    assert (code, out, ran()) == (2, "", 0)
    found = err.splitlines()
    assert len(found) == len(lines) and all(one.startswith(two) for one, two in zip(found, lines, strict=True)), found


def test_in_one_arm_of_several_it_is_told_with_its_arm(call: Call) -> None:
    text = Path("own.yaml").read_text().replace('{name: "ownnet:build", width: 6}', "{name: small-cnn}")
    patch = "factors: {net: {other: {}, ours: {model.name: ownnet:build}}}\nseeds: 2"
    Path("own.yaml").write_text(text.replace("seeds: 2", patch))
    code, _, err = call("plan", "own.yaml")
    assert code == 2 and ran() == 0
    assert err == (
        'own.yaml:11: factors.net.ours."model.name": ownnet:build is code that would be run; add --trust if you trust it\n'
    )


def test_with_trust_it_runs_in_workers_and_its_results_are_read_without_it(call: Call) -> None:
    code, out, err = call("run", "own.yaml", "--trust", "--out", "out", "--workers", "2", "--device", "cpu")
    assert code == 0, err
    assert "report: out/report/report.html" in out
    assert ran() == 3  # this process, and two workers
    plan = read_json(Path("out/plan.json"))
    assert plan["command"].endswith("run own.yaml --trust")
    (arm,) = plan["arms"]
    state = read_tensors(Path("out/phases") / arm["phases"][1]["id"] / "seed-1" / "last.safetensors")
    assert state["0.weight"].shape == (6, 1, 3, 3)
    for path in Path("ran").iterdir():
        path.unlink()
    found = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert ran() == 0


def test_groups_and_plan_take_trust_too(call: Call) -> None:
    assert call("plan", "own.yaml", "--trust", "--no-timing")[0] == 0
    code, out, _ = call("groups", "own.yaml", "--trust")
    assert code == 0 and "BatchNorm2d" in out


def test_its_source_is_part_of_the_identity(tmp_path: Path) -> None:
    def nodes(*overrides: str) -> tuple[str, ...]:
        return make_plan(load_study("own.yaml", overrides, trust=True)).arms[0].nodes

    first = nodes()
    assert nodes() == first and nodes("model.width=6") == first
    assert nodes("model.width=5") != first
    outcome = run_plan(make_plan(load_study("own.yaml", ["seeds=1"], trust=True)), "out", workers=1, threads=1)
    assert outcome.complete and outcome.trained == 2
    Path("ownnet.py").write_text(MODULE + "\n# another version\n")
    changed = nodes()
    assert not set(changed) & set(first)
    again = run_plan(make_plan(load_study("own.yaml", ["seeds=1"], trust=True)), "out", workers=1, threads=1)
    assert again.complete and again.trained == 2
    Path("ownnet.py").write_text(MODULE)
    assert nodes() == first
    assert (
        run_plan(make_plan(load_study("own.yaml", ["seeds=1"], trust=True)), "out", workers=1, threads=1).trained == 0
    )


def test_its_weights_come_from_the_seed() -> None:
    plan = make_plan(load_study("own.yaml", ["phases.first.train={all: natural}"], trust=True))
    assert run_plan(plan, "one", workers=1, threads=1).complete and run_plan(plan, "two", workers=1, threads=1).complete
    states = [
        read_tensors(Store(folder).phase(plan.arms[0].nodes[0], seed) / "last.safetensors")["0.weight"]
        for folder, seed in (("one", 0), ("two", 0), ("one", 1))
    ]
    assert states[0].equal(states[1]) and not states[0].equal(states[2])


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ('{name: "ownet:build"}', "model.name: there is no module 'ownet' in "),
        ('{name: "ownnet:bild"}', "model.name: unknown function of ownnet 'bild'; nearest: build; allowed: "),
        ('{name: "ownnet:build", widht: 3}', "model.widht: unknown option of ownnet:build 'widht'; nearest: width; allowed: "),
        ('{name: "ownnet:build", fail: "no GPU"}',
         "model.name: ownnet:build(channels=1, classes=4, fail='no GPU') failed: RuntimeError: no GPU"),
        ('{name: "ownnet:number"}', "model.name: ownnet:number() returned a value of type int; allowed: an nn.Module"),
        ('{name: "ownnet:"}', "model.name: 'ownnet:' is not MODULE:FUNCTION, such as mypackage.models:resnet"),
        ('{name: "ownnet:MODULE"}', "model.name: unknown function of ownnet 'MODULE'; allowed: "),
    ],
)  # fmt: skip
def test_a_factory_that_does_not_work_is_one_line(model: str, line: str) -> None:
    Path("own.yaml").write_text(Path("own.yaml").read_text().replace('{name: "ownnet:build", width: 6}', model))
    with pytest.raises(UserError) as error:
        load_study("own.yaml", trust=True)
    (fault,) = error.value.faults
    assert str(fault).startswith(f"own.yaml:4: {line}"), str(fault)


def test_a_module_that_fails_is_one_line() -> None:
    Path("ownnet.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError) as error:
        load_study("own.yaml", trust=True)
    (fault,) = error.value.faults
    assert str(fault).startswith("own.yaml:4: model.name: ownnet cannot be imported: ModuleNotFoundError: ")
