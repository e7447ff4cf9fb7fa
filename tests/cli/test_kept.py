"""`robustlayers verify` on the folder of an evaluation: every changed byte, lost shard and invented row is told."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustlayers import models
from robustlayers.core.files import write_manifest, write_tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole evaluation, with several shards of each attack."""
    from robustlayers.cli.evaluate import evaluate

    here = tmp_path_factory.mktemp("evaluation")
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = (draw.integers(0, 120, (40, 8, 8)) + 27 * labels[:, None, None]).astype(np.uint8)
    np.savez(here / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    model = models.build("small-cnn", seed=2, width=4, channels=1, classes=4)
    write_tensors(here / "w.safetensors", model.state_dict())
    code = evaluate(
        "small-cnn",
        attack=("apgd-ce-5", "square-30", "pgd-2"),
        eps="2/255",
        weights=here / "w.safetensors",
        data=f"npz:{here / 'data.npz'}",
        option=("width=4",),
        corruptions=("fog",),
        batch_size=3,
        out=here / "out",
        threads=1,
    )
    assert code == 0
    assert len(list((here / "out").glob("shards/apgd-ce-5/00-*/*.safetensors"))) > 1
    return here / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def _damaged(folder: Path) -> Path:
    return sorted(folder.glob("shards/apgd-ce-5/00-*/*.safetensors"))[0]


def test_a_whole_evaluation_has_no_fault_and_is_not_touched(call, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = call("verify", folder)
    assert (code, err) == (0, "") and out.endswith("rows compared with them, 0 fault(s)\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_changed_byte_and_every_lost_file_is_told(call, folder: Path) -> None:
    draw = random.Random(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for path in files:
        kept = path.read_bytes()
        place = draw.randrange(len(kept))
        for damaged in (
            kept[:place] + bytes([kept[place] ^ (1 << draw.randrange(8))]) + kept[place + 1 :],
            kept[:place],
            None,
        ):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            code, out, err = call("verify", folder)
            assert (code, err) == (1, ""), (path, out)
            assert path.name in out or path.name == "manifest.json", out
            path.write_bytes(kept)
    assert call("verify", folder)[0] == 0


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_the_manifest_does_not_know_to_be_lost(call, folder: Path, finished: bool) -> None:
    """The manifest is written anew without the shard, so only the images that no shard holds give it away."""
    _damaged(folder).unlink()
    (folder / "manifest.json").unlink()
    if finished:
        write_manifest(folder, {"kind": "evaluation"})
        code, out, _ = call("verify", folder)
        assert code == 1 and "no shard holds 3 of the images that apgd-ce-5 got: " in out
    else:
        code, out, _ = call("verify", folder)
        assert code == 1 and "results without a manifest: run the same command again" in out


def test_rows_that_say_something_else_than_the_shards(call, folder: Path) -> None:
    """An accuracy is improved, and the manifest made to fit."""
    with (folder / "rows.csv").open() as stream:
        rows = list(csv.DictReader(stream))

    def told(rows: list[dict[str, str]], result: bool = True) -> str:
        with (folder / "rows.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if result:
            facts = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**facts, "rows": rows}))
        write_manifest(folder, {"kind": "evaluation"})
        code, out, err = call("verify", folder)
        assert err == "" and code == (0 if out.endswith(" 0 fault(s)\n") else 1)
        return out

    assert told(rows).endswith(" 0 fault(s)\n")
    for metric in ("clean", "pgd-2", "robust"):
        place = next(i for i, row in enumerate(rows) if row["metric"] == metric and not row["class"])
        better = [{**row, "count": str(int(row["count"]) + 1)} if i == place else row for i, row in enumerate(rows)]
        assert f"{metric}: by the shards {rows[place]['count']} of 40 images are right" in told(better)
    of_class = next(i for i, row in enumerate(rows) if row["metric"] == "robust" and row["class"])
    better = [{**row, "count": str(int(row["count"]) + 1)} if i == of_class else row for i, row in enumerate(rows)]
    assert "robust: its classes do not add up" in told(better)
    assert "pgd-9: no shard speaks of it" in told([*rows, {**rows[0], "metric": "pgd-9"}])
    assert "pgd-2: by the shards" in told([row for row in rows if row["metric"] != "pgd-2"])
    assert "differs from the rows in result.json" in told([{**row, "seed": "7"} for row in rows], result=False)


def test_verdicts_that_differ_from_the_shards(call, folder: Path) -> None:
    facts = json.loads((folder / "result.json").read_text())
    for change in ("robust", "broken_by", "turns"):
        other = json.loads(json.dumps(facts))
        if change == "robust":
            other["evaluations"][0]["robust"][0] ^= 1
        elif change == "broken_by":
            other["evaluations"][0]["broken_by"][0] += "x"
        else:
            other["evaluations"][0]["turns"][0]["robust"] += 1
        (folder / "result.json").write_text(json.dumps(other))
        write_manifest(folder, {"kind": "evaluation"})
        code, out, _ = call("verify", folder)
        assert code == 1 and "differ from its shards" in out and "result.json" in out
    (folder / "result.json").write_text("{}")
    write_manifest(folder, {"kind": "evaluation"})
    code, out, _ = call("verify", folder)
    assert code == 1 and "is not what an evaluation writes" in out


def test_an_evaluation_that_was_stopped_is_looked_at_too(call, folder: Path) -> None:
    for name in ("manifest.json", "result.json", "rows.csv"):
        (folder / name).unlink()
    shutil.rmtree(folder / "shards" / "pgd-2")
    code, out, _ = call("verify", folder)
    assert code == 0 and "unfinished, " in out and out.endswith("the same command goes on, 0 fault(s)\n")
    path = _damaged(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, out, _ = call("verify", folder)
    assert code == 1 and f"{path}: content differs from the SHA-256 in its name" in out


def test_a_folder_of_neither_kind(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (line,) = refused("verify", "empty")
    assert line == "empty: no study here: it has no plan.json; and no evaluation: it has no result.json"
