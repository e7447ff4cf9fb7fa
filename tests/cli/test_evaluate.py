"""`robustlayers evaluate`: studies, architectures and functions; tables, rows, and mistakes."""

from __future__ import annotations

import csv
import io
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from robustlayers import models
from robustlayers.attacks import Linf
from robustlayers.core.files import verify_manifest, write_tensors
from robustlayers.evaluation import CORRUPTIONS, corruption_accuracy
from robustlayers.evaluation.autoattack import autoattack_label, standard

STUDY = """\
question: Does it run?
name: tiny
data: {name: "npz:data.npz", validation: 0.2}
model: {name: small-cnn, width: 4}
threat: {norm: linf, eps: 16/255}
attack: pgd-1
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: pretrain, epochs: 1, train: {all: natural}}
  - {name: adapt, epochs: 1, train: {all: adversarial}}
factors:
  arm: {one: {}, wide: {model.width: 6}}
seeds: [3, 4]
evaluate: {attacks: [pgd-1], monitor: {attack: pgd-1, images: 10}}
"""
LABEL = autoattack_label(standard(Linf("8/255"), 5)[0], 0, whole=False).partition(",")[0]


@pytest.fixture
def _data() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 5
    images = (draw.integers(0, 120, (60, 8, 8)) + 27 * labels[:, None, None]).astype(np.uint8)
    np.savez("data.npz", train_images=images, train_labels=labels, test_images=images[:20], test_labels=labels[:20])


@pytest.fixture
def _weights(_data) -> None:
    model = models.build("small-cnn", seed=0, width=4, channels=1, classes=5)
    write_tensors(Path("w.safetensors"), model.state_dict())
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "w.pt")


NAMED = ["small-cnn", "--option", "width=4", "--data", "npz:data.npz"]


def _rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


@pytest.mark.usefixtures("_data")
def test_a_study_and_its_parts(call):
    Path("study.yaml").write_text(STUDY)
    assert call("run", "study.yaml", "--out", "run", "--workers", "1", "--threads", "1")[0] == 0
    plan = json.loads(Path("run/plan.json").read_text())
    arm = plan["arms"][1]
    code, out, err = call("evaluate", "run", "--arm", "wide", "--attack", "pgd-2", "--run-seed", "4", "--out", "a")
    assert code == 0, err
    assert out.startswith(f"tiny, wide, 4, {arm['nodes'][-1]}, best, npz:data.npz; linf 16/255; seed 0\n")
    # The same checkpoint by the folders and the file that hold it.
    places = [
        f"run/results/{arm['run']}/seed-4",
        f"run/phases/{arm['nodes'][-1]}/seed-4",
        f"run/phases/{arm['nodes'][-1]}/seed-4/best.safetensors",
    ]
    for number, place in enumerate(places):
        assert call("evaluate", place, "--attack", "pgd-2", "--out", f"b{number}")[0] == 0
        assert _rows(f"b{number}/rows.csv") == _rows("a/rows.csv")
    code, out, _ = call(
        "evaluate", "run", "--arm", "wide", "--phase", "pretrain", "--attack", "pgd-2", "--checkpoint", "last"
    )
    assert code == 0 and f"wide, 3, {arm['nodes'][0]}, last" in out
    # What the study measured, its rows say too.
    measured = json.loads(Path(f"run/results/{arm['run']}/seed-4/rows.json").read_text())
    clean = next(row for row in measured if row["metric"] == "clean" and row["checkpoint"] == "best")
    assert float(_rows("a/rows.csv")[0]["value"]) == clean["value"]
    for arguments, line in (
        (["run", "--attack", "pgd-2"], "--arm: is missing: there are 2 arms; name one: one, wide"),
        (["run", "--arm", "wid"], "--arm: unknown arm 'wid'; nearest: wide; allowed: one, wide"),
        (["run", "--arm", "one", "--run-seed", "5"], "--run-seed: 5 is not there; allowed: 3, 4"),
        (["run", "--arm", "one", "--phase", "adpt"], "--phase: unknown phase of arm one 'adpt'; nearest: adapt; ..."),
        (["run", "--arm", "one", "--checkpoint", "bst"], "--checkpoint: unknown checkpoint 'bst'; nearest: best, ..."),
        (["run", "--arm", "one", "--weights", "w.pt"], "--weights: means a model without a study; run is ..."),
        (["run/study.yaml"], "run/study.yaml: weights alone make no model; ..."),
    ):
        code, out, err = call("evaluate", *arguments)
        want = line.removesuffix("...")
        assert (code, out) == (2, "") and (err.startswith(want) if want != line else err == line + "\n"), err


@pytest.mark.usefixtures("_weights")
def test_the_table_the_rows_and_what_is_kept(call):
    arguments = [*NAMED, "--weights", "w.safetensors", "--eps", "0.02", "--images", "12", "--out", "out"]
    code, out, err = call("evaluate", *arguments, "--attack", "fgsm", "--attack", "autoattack")
    assert code == 0, err
    label = f"{LABEL}, n=12"
    rows = _rows("out/rows.csv")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    assert (metrics[:2], metrics[-3:]) == (["clean", "fgsm"], [label, "robust", "ece"])
    parts = ["apgd-ce", "apgd-t", *(["fab-t"] if "FAB" in label else []), "square-5000"]
    assert metrics[2:-3] == [f"{label}: {name}" for name in parts]
    every = {row["metric"]: row for row in rows if not row["class"]}
    error = every.pop("ece")
    assert (error["count"], error["low"], error["attack"]) == ("", "", "")
    assert f"calibration error {100 * float(error['value']):.1f} points" in out
    for row in every.values():
        assert (row["total"], row["split"], row["normalization"], row["seed"]) == ("12", "test", "running", "0")
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        counts = [int(part["count"]) for part in rows if part["class"] and part["metric"] == row["metric"]]
        assert len(counts) == 5 and sum(counts) == int(row["count"])
    assert int(every["robust"]["count"]) <= min(int(every["fgsm"]["count"]), int(every[label]["count"]))
    assert every["clean"]["attack"] == every["clean"]["threat"] == "" and "square-5000" in every[label]["attack"]
    assert out.splitlines()[0] == "small-cnn, w.safetensors, npz:data.npz; linf 0.02; seed 0"
    assert ('pip install "robustlayers[autoattack]"' in out) == ("FAB" not in label)
    assert verify_manifest(Path("out"), digests=True) == []
    # Once more: all of it is there; other weights do not fit the folder.
    before = Path("out/rows.csv").read_bytes()
    assert call("evaluate", *arguments, "--attack", "fgsm", "--attack", "autoattack")[0] == 0
    assert Path("out/rows.csv").read_bytes() == before
    code, _, err = call("evaluate", *NAMED, "--option", "bias=true", *arguments[5:], "--attack", "fgsm")
    assert code == 2, err


@pytest.mark.usefixtures("_weights")
def test_corruptions_and_sanity_stand_beside_the_attacks(call, monkeypatch):
    arguments = [*NAMED, "--weights", "w.safetensors", "--eps", "0.02", "--attack", "fgsm", "--out", "out"]
    code, out, err = call("evaluate", *arguments, "--sanity", "--corruptions", "noise", "--corruptions", "spatter")
    assert code == 0, err
    rows = {row["metric"]: row for row in _rows("out/rows.csv") if not row["class"]}
    model = models.build("small-cnn", seed=0, width=4, channels=1, classes=5)
    arrays = np.load("data.npz")
    x, y = torch.from_numpy(arrays["test_images"])[:, None], torch.from_numpy(arrays["test_labels"])
    families = [name for name, one in CORRUPTIONS.items() if one.group == "noise" or name == "spatter"]
    table = corruption_accuracy(model, x, y, families)
    assert len([name for name in rows if name.startswith("corrupted")]) == 1 + 4 + 4 * 5
    for line in table.rows()[1:]:
        row = rows[f"corrupted:{line['family']}:{line['severity']}"]
        assert [float(row[key]) for key in ("value", "low", "high")] == [
            line[key] for key in ("accuracy", "low", "high")
        ]
    assert float(rows["corrupted"]["value"]) == pytest.approx(table.mean) and rows["corrupted"]["low"] == ""
    assert "severity 5" in out and f"{table.mean:.1%}" in out
    assert "sanity on 20 images: " in out and "\neps " in out and "\nsteps " in out
    assert Path("out/sanity-eps.svg").exists() and verify_manifest(Path("out"), digests=True) == []
    flags = rows["clean"]["flags"]
    assert (f"flag: {flags.split('; ')[0]}. " in out) == bool(flags)  # with what it means
    assert call("verify", "out")[0] == 0


@pytest.mark.usefixtures("_weights")
def test_a_function_and_a_state_dict_of_torch(call):
    Path("mine.py").write_text(
        "from robustlayers import models\n"
        "def net(width, channels, classes):\n"
        "    return models.build('small-cnn', seed=9, width=width, channels=channels, classes=classes)\n"
    )
    shared = ["--data", "npz:data.npz", "--eps", "8/255", "--attack", "pgd-3", "--option", "width=4"]
    assert call("evaluate", "small-cnn", *shared, "--weights", "w.safetensors", "--out", "a")[0] == 0
    assert call("evaluate", "mine:net", *shared, "--weights", "w.pt", "--out", "b")[0] == 0
    ours, theirs = _rows("a/rows.csv"), _rows("b/rows.csv")
    for row in (*ours, *theirs):
        del row["model"], row["weights"]
    assert ours == theirs


@pytest.mark.usefixtures("_weights")
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["resnt", "--eps", "0.1"], ["MODEL: unknown model 'resnt'; nearest: resnet, ..."]),
        (["no/such/folder"], ["MODEL: unknown model 'no/such/folder'..."]),
        (["small-cnn"], ["--data: is missing: ..."]),
        ([*NAMED], ["--weights: is missing: small-cnn has no weights without a file"]),
        ([*NAMED, "--weights", "x.pt"], ["x.pt: no such file"]),
        ([*NAMED, "--weights", "w.pt"], ["--eps: is missing: how far may a pixel move? write 8/255"]),
        ([*NAMED, "--weights", "w.pt", "--eps", "8/x"], ["--eps: eps: '8/x' is not a number; ..."]),
        ([*NAMED, "--weights", "w.pt", "--eps", "1", "--norm", "l3"], ["--norm: unknown norm of a threat 'l3'; ..."]),
        ([*NAMED, "--weights", "w.pt", "--images", "21"], ["--images: 21 is not allowed; allowed: 1 to 20"]),
        ([*NAMED, "--weights", "w.pt", "--arm", "a"], ["--arm: means a part of a study; small-cnn is a model's name"]),
        ([*NAMED, "--option", "width"], ["--option: 'width' is not NAME=VALUE, such as depth=20"]),
        (
            [*NAMED, "--weights", "w.pt", "--eps", "1", "--corruptions", "fogg"],
            ["--corruptions: unknown corruption 'fogg'; nearest: fog; ..."],
        ),
        (
            [*NAMED, "--weights", "w.pt", "--eps", "1", "--corruptions", "saturate"],
            ["--corruptions: saturate: not for images with 1 channel(s); allowed: 3"],
        ),
        (
            [*NAMED, "--weights", "w.pt", "--eps", "0", "--sanity"],
            ["--eps: 0 leaves nothing for --sanity to try; allowed: more than 0"],
        ),
        ([*NAMED, "--rename", "a"], ["--rename: 'a' is not OLD=NEW, ..."]),
        ([*NAMED, "--batch-size", "0"], ["--batch-size: 0 is not allowed; allowed: at least 1"]),
        ([*NAMED, "--out", "w.pt"], ["--out: is a file; name a folder"]),
        (
            [*NAMED, "--weights", "w.pt", "--eps", "1", "--attack", "pdg-2", "--attack", "autoatack"],
            ["--attack: unknown attack 'pdg'; nearest: pgd...", "--attack: unknown attack 'autoatack'..."],
        ),
        (
            [*NAMED, "--weights", "w.pt", "--eps", "1", "--attack", "pgd-0"],
            ["--attack: steps: 0 is not allowed; allowed: a whole number, 1 or more; ..."],
        ),
        (["mine_not:net", "--data", "npz:data.npz"], ["there is no module 'mine_not' in ..."]),
        ([*NAMED, "--weights", "w.pt", "--rename", "conv9=a"], ["w.pt: mapping: no tensor is called 'conv9'..."]),
    ],
)
def test_a_mistake_is_told_before_anything_runs(refused, agree, arguments, lines):
    agree(refused("evaluate", *arguments), lines)


@pytest.mark.usefixtures("_weights")
def test_stopped_without_a_folder_it_says_that_nothing_is_kept(call, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("robustlayers.evaluation.cascade"), "cascade", stop)
    arguments = ["evaluate", *NAMED, "--weights", "w.pt", "--eps", "1", "--attack", "fgsm"]
    assert call(*arguments) == (130, "", "stopped; nothing is kept without --out DIR\n")
    assert call(*arguments, "--out", "kept") == (130, "", "stopped; the same command goes on from here\n")


@pytest.mark.usefixtures("_weights")
def test_an_input_normalization_that_the_file_lacks_is_told(call):
    tensors = models.build("small-cnn", seed=0, width=4, channels=1, classes=5).state_dict()
    gone = [name for name in tensors if name.rpartition(".")[2] in ("mean", "std", "num_batches_tracked")]
    assert {"normalize.mean", "normalize.std"} < set(gone)
    write_tensors(Path("bare.safetensors"), {name: value for name, value in tensors.items() if name not in gone})
    plain = [*NAMED, "--eps", "0.02", "--images", "4", "--attack", "fgsm"]
    note = "bare.safetensors: has no {}; the model's own are used; give{}\n"
    for options, names, advice in (
        ((), "normalize.mean, normalize.std", " --option mean=[...] --option std=[...]"),
        (("--option", "mean=[0.3]"), "normalize.std", " --option std=[...]"),
    ):
        code, _, err = call("evaluate", *plain, *options, "--weights", "bare.safetensors")
        assert code == 0 and err.count("has no") == 1 and note.format(names, advice) in err
    both = ["--option", "mean=[0.3]", "--option", "std=[0.2]"]
    for arguments in (["--weights", "w.safetensors"], ["--weights", "bare.safetensors", *both]):
        code, _, err = call("evaluate", *plain, *arguments)
        assert code == 0 and "has no" not in err
