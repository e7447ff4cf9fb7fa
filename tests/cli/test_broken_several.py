"""Several mistakes at once, mistakes in overrides and arguments, and files that are missing, foreign or cut off."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Edited = Callable[..., str]
Refused = Callable[..., list[str]]

NORM = "      norm: adversarial\n"
MODEL = "{name: small-cnn, width: 8}"
CLAIM = "robust[group=norm] > robust[group=none]"
NONE = "{phases.adapt.epochs: 0}"
NO_STEPS = "steps: 0 is not allowed; allowed: a whole number, 1 or more; noise is a point without steps"
WIDHT = "8: model.widht: unknown option of model small-cnn 'widht'; nearest: width; "
WIDHT += "allowed: ..."
SEED = "unknown key 'seed'; nearest: seeds; allowed: ..."

SEVERAL = {
    "text and meaning": (
        [("seeds: 2", "seed: 2"), ("eps: 8/255", "eps: 8/0"), ("width: 8}", "widht: 8}"), ("[best, last]", "[lst]")],
        [
            WIDHT,
            "9: threat.eps: '8/0' divides by zero",
            f"29: seed: {SEED}",
            "32: evaluate.checkpoints.0: unknown value 'lst'; nearest: last, best; allowed: best, last",
        ],
    ),
    "a wrong signal hides no other": (
        [(NORM, "      norm: 1\n"), ("width: 8}", "widht: 8}"), ("{all: natural}", "{al: natural}")],
        [WIDHT, "21: phases.1.train.norm: 1 is not allowed; allowed: text or a mapping"],
    ),
    "a misspelt epochs hides no other": (
        [
            ("    epochs: 1\n    train: {all: natural}", "    epoch: 1\n    train: {all: natrual}"),
            (NORM, "      nrom: adversarial\n"),
        ],
        [
            "16: phases.0.epoch: unknown key 'epoch'; nearest: epochs; allowed: ...",
            "17: phases.0.train.all: unknown signal 'natrual'; nearest: natural; allowed: ...",
            "21: phases.1.train.nrom: unknown selector 'nrom'; nearest: norm",
        ],
    ),
    "groups, seeds and claims": (
        [(NORM, "      nrom: adversarial\n"), ("seeds: 2", "seeds: [1, 1]"), (CLAIM, "robst[norm] > 0.1")],
        [
            "21: phases.1.train.nrom: unknown selector 'nrom'; nearest: norm",
            "29: seeds: a seed stands there twice",
            "36: claims.0.that: column 1: unknown metric 'robst'; nearest: robust, train_robust; allowed: ...",
        ],
    ),
    "two groups of one phase": (
        [(NORM, "      nrom: adversarial\n      had: natural\n")],
        [
            "21: phases.1.train.nrom: unknown selector 'nrom'; nearest: norm",
            "22: phases.1.train.had: unknown selector 'had'; nearest: head",
        ],
    ),
    "several in one patch": (
        [(NONE, "{seeds: 5, modle.width: 3, model.width: x, attack.steps: -2, threat.eps: 9}")],
        [
            "25: factors.group.none.seeds: 'seeds' is the same for all arms; allowed: ...",
            """25: factors.group.none."modle.width": unknown key 'modle'; nearest: model; """
            "allowed: ...",
            """25: factors.group.none."threat.eps": 9 is not allowed; allowed: at most 1, in pixel units of [0, 1]; """
            "write 8/255",
            """25: factors.group.none."attack.steps": -2 is not allowed; allowed: a whole number, 0 or more""",
            """25: factors.group.none."model.width": 'x' is not a whole number; allowed: at least 1""",
        ],
    ),
    "one that only an arm with another model has": (
        [(NONE, "{model: {name: preact-resnet, depth: 18}}"), (NORM, "      bn1: adversarial\n")],
        ["21: phases.1.train.bn1: unknown selector 'bn1'; nearest: bn, conv1 (in arm 'none')"],
    ),
    "rest for two groups": (
        [("question: Do", "groups: {others: rest}\nquestion: Do"), (NORM, "      others: adversarial\n")],
        ["23: phases.1.train.rest: 'rest' is given to 2 groups: others, rest"],
    ),
    "a named group that does not exist in the model": (
        [("question: Do", "groups: {mine: nrom}\nquestion: Do"), (NORM, "      mine: adversarial\n")],
        ["22: phases.1.train.mine: unknown selector 'nrom'; nearest: norm"],
    ),
    "a group's name with a dot": (
        [("question: Do", "groups: {a.b: norm}\nquestion: Do")],
        ['1: groups."a.b": a name must not be empty nor contain dots, quotes or line breaks'],
    ),
    "arms of one name": (
        [
            (
                "seeds: 2",
                "  f:\n    'x, y': {}\n    x: {model.width: 2}\n  g:\n    z: {}\n    'y, z': {seeds: 1}\nseeds: 2",
            ),
            (f'    that: "{CLAIM}"', "    that: robust[none, x, z] > 0.1"),
            ("    norm: {}\n    head:\n      phases.adapt.train: {head: adversarial, rest: frozen}\n", ""),
        ],
        [
            "23: factors: two arms would be called 'none, x, y, z'; rename a level",
            """31: factors.g."y, z".seeds: 'seeds' is the same for all arms; """.replace('"', "") + "allowed: ...",
        ],
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_all_mistakes_are_told_at_once_in_the_order_of_lines(
    name: str, edited: Edited, refused: Refused, agree: Callable[..., None]
) -> None:
    edits, expected = SEVERAL[name]
    Path("s.yaml").write_text(edited(*edits))
    agree(refused("run", "s.yaml", "--out", "out"), [f"s.yaml:{line}" for line in expected])


def test_a_level_with_nothing_after_its_colon_changes_nothing(
    edited: Edited, call: Callable[..., tuple[int, str, str]]
) -> None:
    Path("s.yaml").write_text(edited(("    norm: {}", "    norm:")))
    code, out, err = call("plan", "s.yaml", "--no-timing")
    assert (code, err) == (0, "") and "norm" in out


OVERRIDES = {
    "unknown key": (["seed=3"], [f"--set seed: {SEED}"]),
    "unknown phase": (
        ["phases.adpat.epochs=3"],
        ["--set phases.adpat.epochs: unknown item of phases 'adpat'; nearest: adapt; allowed: adapt, pretrain"],
    ),
    "unknown position": (
        ["phases.7.epochs=1"],
        ["--set phases.7.epochs: phases has no item 7: it has 2 items, counted from 0"],
    ),
    "unknown field": (
        ["threat.epss=3/255"],
        ["--set threat.epss: unknown key 'epss'; nearest: eps; allowed: eps, norm"],
    ),
    "number": (["threat.eps=3/0"], ["--set threat.eps: '3/0' divides by zero"]),
    "type": (
        ["phases.adapt.epochs=many"],
        ["--set phases.adapt.epochs: 'many' is not allowed; allowed: a whole number"],
    ),
    "model": (["model.width=wide"], ["--set model.width: 'wide' is not a whole number; allowed: at least 1"]),
    "selector inside": (
        ["phases.adapt.train={nrom: adversarial, rest: frozen}"],
        ["--set phases.adapt.train.nrom: unknown selector 'nrom'; nearest: norm"],
    ),
    "item of a list": (
        ["evaluate.attacks=[pgd-0x]"],
        ["--set evaluate.attacks.0: attack 'pgd-0x' is not understood; examples: ..."],
    ),
    "no steps": (["attack=pgd-0"], [f"--set attack: {NO_STEPS}"]),
    "no steps of the monitor": (
        ["evaluate.monitor.attack={name: pgd, steps: 0}"],
        [f"--set evaluate.monitor.attack.steps: {NO_STEPS.removeprefix('steps: ')}"],
    ),
    "no steps in one of several": (
        ["evaluate.attacks=[fgsm+pgd-0x2]"],
        [f"--set evaluate.attacks.0: {NO_STEPS}"],
    ),
    "no assignment": (["seeds"], ["--set: 'seeds' is not path=value, such as seeds=5"]),
    "below a number": (["seeds.x=1"], ["--set seeds.x: seeds is 2, not a mapping: it has no 'x'"]),
    "empty part": (["threat..eps=1"], ["--set: path 'threat..eps' has an empty part; write a.b.c"]),
    "level": (["factors.group.none=7"], ["--set factors.group.none: 7 is not allowed; allowed: a mapping"]),
    "claim": (
        ["claims=[{say: x, that: y}]"],
        ["--set claims.0.that: column 2: expected one of > < >= <=, found the end"],
    ),
    "half a mapping": (["threat={norm: linf"], ["--set threat: not valid YAML: a bracket is opened and never closed"]),
    "several": (
        ["seed=3", "threat.eps=x", "phases.zzz.epochs=1"],
        [
            "--set phases.zzz.epochs: unknown item of phases 'zzz'; allowed: adapt, pretrain",
            "--set threat.eps: 'x' is not a number; write 0.03 or 8/255",
            f"--set seed: {SEED}",
        ],
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_mistake_in_an_override_is_told_at_the_override(
    name: str, base: str, refused: Refused, agree: Callable[..., None]
) -> None:
    overrides, expected = OVERRIDES[name]
    Path("s.yaml").write_text(base)
    agree(refused("run", "s.yaml", *(part for item in overrides for part in ("--set", item))), expected)


def test_an_override_repairs_a_mistake_of_the_file(edited: Edited, call: Callable[..., tuple[int, str, str]]) -> None:
    Path("s.yaml").write_text(edited(("eps: 8/255", "eps: 8")))
    assert call("groups", "s.yaml", "--set", "threat.eps=8/255")[0] == 0


ARGUMENTS = {
    "no worker": (["s.yaml", "--workers", "0"], "--workers: 0 is not allowed; allowed: at least 1"),
    "minus one thread": (["s.yaml", "--threads", "-1"], "--threads: -1 is not allowed; allowed: at least 1"),
    "unknown device": (
        ["s.yaml", "--device", "gpu"],
        "device: unknown device 'gpu'; allowed: auto, cpu, cuda, cuda:N, mps",
    ),
    "a file for a folder": (["s.yaml", "--out", "s.yaml"], "--out: s.yaml is a file; name a folder"),
    "a folder in a file": (["s.yaml", "--out", "s.yaml/x"], "s.yaml/x: cannot be written into: Not a directory"),
    "missing file": (["sl.yaml"], "sl.yaml: no such file; nearest: s.yaml, folder.yaml"),
    "missing folder": (["nowhere/s.yaml"], "nowhere/s.yaml: no such file"),
    "a folder for a file": (["folder.yaml"], "folder.yaml: is a folder, not a YAML file"),
    "binary file": (["binary.bin"], "binary.bin:1: is not UTF-8 text: byte 0xff"),
    "nothing": (["empty.txt"], "empty.txt: is empty"),
    "only a comment": (["comment.txt"], "comment.txt: is empty"),
    "a list": (["list.txt"], "list.txt:2: the top level must be a mapping (key: value), not a list"),
    "one word": (["word.txt"], "word.txt:1: the top level must be a mapping (key: value), not a single value"),
    "two documents": (["two.txt"], "two.txt:2: a second document begins here; a file holds one"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_mistake_in_an_argument_or_its_file(name: str, base: str, refused: Refused) -> None:
    arguments, expected = ARGUMENTS[name]
    contents = {"list.txt": b"# a\n- b\n", "word.txt": b"robust\n", "empty.txt": b"", "comment.txt": b"# later\n"}
    contents |= {"s.yaml": base.encode(), "binary.bin": b"\x00\x01\xff\xfe", "two.txt": b"a: 1\n---\nb: 2\n"}
    for file, content in contents.items():
        Path(file).write_bytes(content)
    Path("folder.yaml").mkdir()
    assert refused("run", *arguments) == [expected]


def test_a_device_that_is_not_here(base: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("s.yaml").write_text(base)
    expected = ["device: 'cuda' was asked for, but torch sees no CUDA device here"]
    assert refused("run", "s.yaml", "--device", "cuda") == expected


def _npz(folder: Path) -> Path:
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez(folder / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return folder / "d.npz"


def _parquet(folder: Path) -> Path:
    table = pa.table({"image": [{"bytes": b"\x89PNG"}] * 20, "label": [0, 1] * 10})
    for part in ("train", "test"):
        pq.write_table(table, folder / f"{part}.parquet")
    return folder / "train.parquet"


def _idx(folder: Path) -> Path:
    for part, count in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4I", 0x0803, count, 8, 8) + np.random.default_rng(0).bytes(count * 64)
        labels = struct.pack(">2I", 0x0801, count) + bytes(index % 2 for index in range(count))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder / "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (_npz, "npz:d.npz", "d.npz: not a whole .npz archive (damaged, truncated or another format)"),
        (_parquet, "parquet:.", "train.parquet: not a whole Parquet file ("),
        (_idx, "idx:.", "train-images-idx3-ubyte.gz: damaged or truncated ("),
    ],
)
def test_a_data_file_that_was_cut_off(
    make: Callable[[Path], Path], name: str, message: str, tmp_path: Path, edited: Edited, refused: Refused
) -> None:
    path = make(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    Path("s.yaml").write_text(edited(("name: fashion-mnist-mini", f"name: {name}")))
    (line,) = refused("run", "s.yaml", "--out", "out")
    assert line.startswith(f"s.yaml:4: data.name: {message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parquet:nowhere", "nowhere: no such folder"),
        ("idx:nowhere", "nowhere: no such folder"),
        ("idx:.", ".: neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz is here"),
        ("parquet:.", ".: no train*.parquet here or in its subfolder data"),
        ("npz:nowhere.npz", "nowhere.npz: no such file"),
        ("'npz:'", "data set 'npz:': nothing after the colon; write npz:FILE"),
    ],
)
def test_data_that_is_not_there(name: str, message: str, edited: Edited, refused: Refused) -> None:
    Path("s.yaml").write_text(edited(("name: fashion-mnist-mini", f"name: {name}")))
    assert refused("run", "s.yaml", "--out", "out") == [f"s.yaml:4: data.name: {message}"]


def test_fashion_mnist_that_is_not_there_says_how_to_get_it(
    edited: Edited, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("robustlayers.data.fashion._DEBIAN", tmp_path / "no")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no"))
    monkeypatch.delenv("ROBUSTLAYERS_DATA", raising=False)
    monkeypatch.setattr(
        "robustlayers.study.semantics.load_data", __import__("robustlayers.data", fromlist=["load"]).load
    )
    Path("s.yaml").write_text(edited(("name: fashion-mnist-mini", "name: fashion-mnist")))
    (line,) = refused("run", "s.yaml", "--out", "out")
    assert line.startswith(
        "s.yaml:4: data.name: fashion-mnist: its four files are not here; get them with `robustlayers"
    )


@pytest.mark.parametrize("command", ["plan", "groups", "run"])
def test_every_command_that_reads_a_study_refuses_alike(command: str, edited: Edited, refused: Refused) -> None:
    Path("s.yaml").write_text(edited(("eps: 8/255", "eps: -1")))
    assert refused(command, "s.yaml") == ["s.yaml:9: threat.eps: -1 is not allowed; allowed: more than 0"]


@pytest.mark.parametrize("command", ["rows", "report", "verify"])
def test_every_command_that_reads_results_refuses_a_folder_without_them(command: str, refused: Refused) -> None:
    (line,) = refused(command, "nowhere")
    assert line.startswith("nowhere: no study here: it has no plan.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--arm", "nrom"], "--arm: unknown arm 'nrom'; nearest: norm, none; allowed: head, none, norm"),
        (["--select", "nrom"], "--select: unknown selector 'nrom'; nearest: norm"),
        (["--select", "norm&"], "--select: selector 'norm&': something is missing at column 6"),
        (["--select", "norm & conv"], "--select: selector 'norm & conv' picks nothing from SmallCNN"),
    ],
)
def test_groups_refuses_what_the_model_does_not_have(
    arguments: list[str], expected: str, base: str, refused: Refused
) -> None:
    Path("s.yaml").write_text(base)
    assert refused("groups", "s.yaml", *arguments) == [expected]


@pytest.mark.parametrize(
    "arguments", [["rn", "s.yaml"], ["run"], ["run", "s.yaml", "--sett", "a=1"], ["data", "lst"], []]
)
def test_a_command_that_does_not_exist_is_code_2(
    arguments: list[str], call: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert err and "Traceback" not in err


def test_fetching_needs_a_known_name(refused: Refused) -> None:
    assert refused("data", "fetch") == ["data fetch: name the data set, as in: robustlayers data fetch fashion-mnist"]
    assert refused("data", "fetch", "nowhere") == ["unknown data set to fetch 'nowhere'; allowed: fashion-mnist"]
