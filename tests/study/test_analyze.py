"""Looking inside the nets of a study: what is planned, kept, skipped where it is there, and read back."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import analysis
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors, verify_manifest, write_json, write_tensors
from robustlayers.selection import Inventory, resolve
from robustlayers.study import _inside_training
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.analyze import Asked, Job, plan_analyses, run_analyses
from robustlayers.study.analyzed import collect_analyses, kept_analyses, number_text, rows_of_analysis
from robustlayers.study.collect import collect
from robustlayers.study.definition import load_study
from robustlayers.study.semantics import build_model, data_of
from robustlayers.study.store import Store

USUAL = [name for name, one in ANALYSES.items() if not one.trains and not one.together]
QUICK = Asked(what=["overfitting", "signal"], arms=["norm"], images=12)


def look(store: Store, asked: Asked, watch: Any = None) -> list[Job]:
    planned = plan_analyses(store, asked)
    run_analyses(store, planned.left, watch or (lambda job, share, what: None), device="cpu")
    return [*planned.left, *planned.done]


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    """A copy of the finished study: two seeds, arms none, norm, all."""
    shutil.copytree(finished, tmp_path / "out")
    return Store(tmp_path / "out")


@pytest.fixture(scope="module")
def seen(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The finished study with every analysis of one arm, alone and against another."""
    place = tmp_path_factory.mktemp("seen") / "out"
    shutil.copytree(finished, place)
    look(Store(place), Asked(arms=["norm"], against="none", images=12))
    return Store(place)


def table(store: Store, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(rows_of_analysis(store, name))))


def trained(store: Store, arm: str, checkpoint: str = "best") -> tuple[nn.Module, Any]:
    recipe = next(one.recipe for one in load_study(store.root / "study.yaml").arms if one.name == arm)
    node = next(one["nodes"][-1] for one in read_json(store.plan)["arms"] if one["name"] == arm)
    dataset, _, validation, _ = data_of(recipe.data)
    model = build_model(recipe.model, dataset, 0)
    model.load_state_dict(read_tensors(store.phase(node, 0) / f"{checkpoint}.safetensors"))
    return model, validation


def test_every_analysis_keeps_a_whole_result_that_reads_back(seen: Store) -> None:
    found = collect_analyses(seen, read_json(seen.plan))
    looked = {(one.analysis, bool(one.against)) for one in found}
    assert looked == {
        (one.name, pair)
        for one in ANALYSES.values()
        for pair in (False, True)
        if (one.alone, one.between)[pair] and not one.trains
    }
    for one in found:
        folder = seen.root / "analyses" / one.analysis / one.identity
        assert verify_manifest(folder, digests=True) == []
        assert (one.arm, one.seed, one.checkpoint) == ("norm", 0, "best") and one.rows and one.numbers
        for key, result in ANALYSES[one.analysis].load(one.payload, one.arrays).items():
            if one.analysis != "norms":
                assert result.plot().figure is not None, key


def test_the_result_objects_come_back_as_they_were(seen: Store) -> None:
    """The figure is drawn from what was kept: it must say what the rows say."""
    for one in collect_analyses(seen, read_json(seen.plan)):
        back = ANALYSES[one.analysis].load(one.payload, one.arrays)
        if one.analysis == "transplant":
            kept = [row for row in one.rows if row["statistics"] == "re-estimated"]
            again = back["re-estimated"].rows()
            assert [row["robust_accuracy"] for row in again] == [row["robust_accuracy"] for row in kept]
        if one.analysis == "criticality":
            drops = {
                (row["source"], row["group"]): row["clean_accuracy_drop"]
                for row in one.rows
                if row["part"] == "replaced"
            }
            sources = [found for found in back.values() if isinstance(found, analysis.Criticality)]
            assert {(r.source, r.group): r.clean_accuracy_drop for c in sources for r in c.results} == drops
        if one.analysis == "cka" and not one.against:
            pairs = [row["similarity"] for row in one.rows if row["part"] == "clean"]
            assert np.allclose(back["clean"].values.flatten(), np.array(pairs, float), atol=1e-6, equal_nan=True)


def test_the_rows_are_those_of_the_plain_function_on_the_checkpoint(seen: Store) -> None:
    model, validation = trained(seen, "norm")
    plain = analysis.cka(model, validation.first(12).images.float() / 255)
    rows = [row for row in table(seen, "cka") if row["part"] == "clean" and not row["against"]]
    assert [row["layer"] for row in rows] == [row["layer"] for row in plain.rows()]
    assert np.allclose([float(row["similarity"]) for row in rows], plain.values.flatten(), atol=1e-6)
    assert {(row["arm"], row["factor:group"], row["split"], row["images"]) for row in rows} == {
        ("norm", "norm", "validation", "12")
    }


def test_no_test_image_is_ever_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen by an analysis is chosen on held-out images."""
    real = _inside_training.study_rows

    def spy(model: Any, images: torch.Tensor, *rest: Any, **more: Any) -> Any:
        _, validation = trained(store, "norm")
        assert torch.equal(images, validation.first(12).images)
        return real(model, images, *rest, **more)

    monkeypatch.setattr(_inside_training, "study_rows", spy)
    look(store, Asked(what=["norms"], arms=["norm"], images=12))


def test_a_repeated_command_does_nothing(seen: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in (seen.root / "analyses").rglob("*.json")}
    planned = plan_analyses(seen, Asked(arms=["norm"], against="none", images=12))
    assert not planned.left and len(planned.done) == len(USUAL) + 2  # cka and interpolation are alone and between
    assert any("transfer: is of two arms or more, and there is only norm" in note for note in planned.notes)
    run_analyses(seen, planned.left, lambda job, share, what: None)
    assert {path: path.stat().st_mtime_ns for path in (seen.root / "analyses").rglob("*.json")} == before


def test_what_was_killed_goes_on_with_what_is_missing(store: Store) -> None:
    class Killed(Exception):
        pass

    def kill(job: Job, share: float, what: str) -> None:
        if job.analysis.name == "signal" and what != "loading":
            raise Killed

    with pytest.raises(Killed):
        look(store, QUICK, kill)
    assert [job.analysis.name for job in plan_analyses(store, QUICK).left] == ["signal"]
    look(store, QUICK)
    assert not plan_analyses(store, QUICK).left


def test_a_damaged_result_is_set_aside_and_made_again(store: Store) -> None:
    job = next(job for job in look(store, QUICK) if job.analysis.name == "signal")
    whole = (job.folder / "rows.csv").read_bytes()
    (job.folder / "rows.csv").write_bytes(whole[:-5])
    look(store, QUICK)
    assert (job.folder / "rows.csv").read_bytes() == whole
    assert job.folder.with_name(f"{job.folder.name}.damaged-1").exists()
    assert len(kept_analyses(store, read_json(store.plan))) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"images": 14},
        {"attack": "pgd-2"},
        {"select": "conv"},
        {"checkpoint": "last"},
        {"seeds": [1]},
        {"arms": ["all"]},
    ],
)
def test_all_that_decides_a_result_is_in_its_name(store: Store, change: dict[str, Any]) -> None:
    one = {job.identity for job in look(store, Asked(what=["signal"], arms=["norm"], images=12))}
    two = plan_analyses(store, Asked(**{"what": ["signal"], "arms": ["norm"], "images": 12, **change})).left
    assert two and not one & {job.identity for job in two}


def test_other_weights_of_the_same_phase_are_another_result(store: Store) -> None:
    (job,) = look(store, Asked(what=["overfitting"], arms=["norm"]))
    path = store.phase(job.subject.node, 0) / "best.safetensors"
    state = read_tensors(path)
    write_tensors(path, {name: tensor + 1 for name, tensor in state.items()})
    store.finish(path.parent)
    (other,) = plan_analyses(store, Asked(what=["overfitting"], arms=["norm"])).left
    assert other.identity != job.identity


def test_earlier_states_count_for_what_uses_them(store: Store) -> None:
    asked = Asked(what=["criticality", "norms", "cka", "signal"], arms=["norm"], images=12)
    before = {job.analysis.name: job.identity for job in plan_analyses(store, asked).left}
    node = next(one["nodes"][0] for one in read_json(store.plan)["arms"] if one["name"] == "norm")
    path = store.phase(node, 0) / "last.safetensors"
    write_tensors(path, {name: tensor + 1 for name, tensor in read_tensors(path).items()})
    store.finish(path.parent)
    after = {job.analysis.name: job.identity for job in plan_analyses(store, asked).left}
    assert {name for name in before if before[name] != after[name]} == {"cka", "criticality", "norms"}


def test_settings_that_an_analysis_does_not_use_do_not_repeat_it(store: Store) -> None:
    look(store, Asked(what=["overfitting"], arms=["norm"], images=12))
    assert not plan_analyses(
        store, Asked(what=["overfitting"], arms=["norm"], images=14, attack="pgd-9", select="conv")
    ).left


def test_a_layer_that_was_ruined_is_found(store: Store) -> None:
    """The best checkpoint gets a first convolution drawn at random: rewinding it is what wins accuracy back."""
    node = next(one["nodes"][-1] for one in read_json(store.plan)["arms"] if one["name"] == "norm")
    path = store.phase(node, 0) / "best.safetensors"
    state = read_tensors(path)
    name = next(name for name, tensor in state.items() if tensor.dim() == 4)
    state[name] = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))
    write_tensors(path, state)
    store.finish(path.parent)
    look(store, Asked(what=["criticality"], arms=["norm"], images=16))
    rows = [row for row in table(store, "criticality") if row.get("source") == "end of pretrain"]
    assert name.removesuffix(".weight") in {row["group"] for row in rows}  # it moved; frozen convolutions are left out
    assert {row["group"] for row in rows} < {row["group"] for row in table(store, "criticality")}
    worst = min(rows, key=lambda row: float(row["clean_loss_rise"]))
    assert worst["group"] == name.removesuffix(".weight") and float(worst["clean_loss_rise"]) < 0


def test_scores_feed_a_selector(seen: Store) -> None:
    model, _ = trained(seen, "norm")
    (folder,) = (
        folder for folder, record in kept_analyses(seen, read_json(seen.plan)) if record["analysis"] == "criticality"
    )
    for name in ("scores-worst-case", "scores-random"):
        picked = resolve(Inventory(model), f'top("{folder / name}.csv", count=1)')
        assert len(picked.parts) >= 1


def test_the_summary_holds_the_nets_of_the_present_plan_only(seen: Store, tmp_path: Path) -> None:
    shutil.copytree(seen.root, tmp_path / "out")
    store = Store(tmp_path / "out")
    assert len(collect(store).analyses) == len(USUAL) + 2
    plan = read_json(store.plan)
    for arm in plan["arms"]:
        if arm["name"] == "none":
            arm["nodes"][-1] = "0" * 16  # trained otherwise since
    write_json(store.plan, plan)
    assert {one.against for one in collect_analyses(store, plan)} == {""}


def test_the_report_shows_of_one_setting_the_most_images(store: Store) -> None:
    for images in (14, 12):
        look(store, Asked(what=["signal"], arms=["norm"], images=images))
    assert [one.images for one in collect_analyses(store, read_json(store.plan))] == [14]
    assert {row["images"] for row in table(store, "signal")} == {"12", "14"}


def test_progress_reaches_the_end_and_never_goes_back(store: Store) -> None:
    shares: dict[str, list[float]] = {}
    look(
        store,
        Asked(arms=["norm"], against="none", images=12),
        lambda job, share, what: shares.setdefault(job.text + job.identity, []).append(share),
    )
    for name, found in shares.items():
        assert found == sorted(found) and found[-1] == 1.0 and 0 <= found[0] < 1, name
        assert len(found) > 2, name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(what=["ckа", "cka"]), "--what: unknown analysis"),
        (Asked(what=["critical"]), "nearest: criticality"),
        (Asked(arms=["nrm"]), "--arm: unknown arm 'nrm'; nearest: norm"),
        (Asked(against="al"), "--against: unknown arm 'al'; nearest: all"),
        (Asked(seeds=[7]), "--seeds: 7 is not there; allowed: 0, 1"),
        (Asked(checkpoint="worst"), "--checkpoint: unknown checkpoint 'worst'"),
        (Asked(images=3), "--images: 3 is not allowed; allowed: 10 or more"),
        (Asked(what=["transplant"]), "--against: is missing: transplant is of two nets"),
        (Asked(what=["transplant"], arms=["all"], against="all"), "--against: all is the only arm looked at"),
        (Asked(what=["cka"], select="cnv"), "--select: unknown"),
        (Asked(what=["signal"], attack="pgdd-3"), "--attack: unknown attack"),
    ],
)
def test_a_mistake_is_one_line(finished: Path, asked: Asked, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_analyses(Store(finished), asked)
    assert message in str(caught.value) and len(caught.value.faults) == 1
    assert not (finished / "analyses").exists()


def test_missing_results_are_told(store: Store, tmp_path: Path) -> None:
    node = next(one["nodes"][-1] for one in read_json(store.plan)["arms"] if one["name"] == "all")
    (store.phase(node, 0) / "manifest.json").unlink()
    with pytest.raises(UserError, match="arm all has no whole result of phase adapt for seed 0; run the study first"):
        plan_analyses(store, Asked(arms=["all"]))
    planned = plan_analyses(store, Asked(what=["overfitting"]))
    assert any("arm all" in note for note in planned.notes) and {job.subject.arm for job in planned.left} == {
        "none",
        "norm",
    }
    with pytest.raises(UserError, match="no study here"):
        plan_analyses(Store(tmp_path / "nowhere"), Asked())


def test_a_net_without_norm_layers(run: Callable[..., Any], tmp_path: Path) -> None:
    edits = [
        "model.norm=none",
        "seeds=1",
        "factors.group={a: {}}",
        "phases.adapt.train={all: adversarial}",
        "claims=[]",
    ]
    run(*edits, out=tmp_path / "bare")
    store = Store(tmp_path / "bare")
    with pytest.raises(UserError, match="--what: norms: the net of arm a has no norm layer"):
        plan_analyses(store, Asked(what=["norms"]))
    planned = plan_analyses(store, Asked())
    assert any("no norm layer" in note for note in planned.notes)
    assert "norms" not in {job.analysis.name for job in planned.left}
    look(store, Asked(what=["signal"], images=12))
    assert {row["part"] for row in table(store, "signal")} == {"ratio", "channels", "excess"}


def test_numbers_are_written_as_people_read_them() -> None:
    def text(value: Any, unit: str) -> str:
        return number_text({"value": value, "unit": unit})

    assert [text(0.5, "%"), text(-0.021, "points"), text(1.2345, "nats"), text(None, "%")] == [
        "50.0%",
        "−2.1 points",
        "1.23 nats",
        "–",
    ]
