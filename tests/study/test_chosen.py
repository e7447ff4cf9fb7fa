"""What `crafting: auto` stands for is told by the run, kept with the phase, and stands in the report with its seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustlayers.cli.main import main
from robustlayers.core.files import read_json
from robustlayers.study.collect import collect
from robustlayers.study.store import Store

STUDY = """\
question: What does auto stand for?
data: {name: fashion-mnist-mini, train_images: 64, test_images: 20, validation: 0.25}
model: {name: small-cnn, width: 4}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
training: {crafting: auto}
phases: [{name: whole, epochs: 1, train: {all: adversarial}}]
factors: {signal: {adversarial: {}, natural: {phases.whole.train: {all: natural}}}}
seeds: 1
evaluate: {attacks: [pgd-1], monitor: {attack: pgd-1, images: 10}}
"""


def test_it_is_told_kept_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(STUDY)
    with pytest.raises(SystemExit, match="0"):
        main(["run", "s.yaml", "--out", "out", "--workers", "1", "--threads", "1"])
    told = [line for line in capsys.readouterr().out.splitlines() if ": crafts in " in line]
    ledgers = {path: read_json(path) for path in Path("out").glob("phases/*/seed-0/ledger.json")}
    (path,) = (path for path, ledger in ledgers.items() if "crafting" in ledger)
    assert told == [f"adversarial, seed 0, whole: crafts in {ledgers[path]['crafting']}"]

    name = ledgers[path]["crafting"].partition(":")[0]
    assert name.startswith(("fp32", "bf16"))
    lines = {arm.name: arm.phases[0] for arm in collect(Store("out")).arms}
    assert lines["adversarial"].crafted_in == {name: [0]} and not lines["natural"].crafted_in
    with pytest.raises(SystemExit, match="0"):
        main(["report", "out"])
    assert Path("out/report/report.md").read_text().count(f"Crafting, auto: {name} (seed 0)") == 1
