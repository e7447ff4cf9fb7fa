"""Measuring one trained run for one seed: the test set, read once for each checkpoint, and a few pictures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks import APGD, PGD, Gaussian, Square, TargetedAPGD
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json, write_tensors
from robustlayers.core.random import stream
from robustlayers.data import Images, to_float
from robustlayers.evaluation import (
    Moment,
    Outcome,
    autoattack,
    beyond_final,
    calibration,
    flags,
    per_class,
    sanity,
    worst_case,
)
from robustlayers.evaluation.branches import branches
from robustlayers.evaluation.flags import black_box, collapse
from robustlayers.normalization import inference
from robustlayers.normalization.report import study_rows
from robustlayers.study.extras import SANITY_IMAGES, corruption_rows, sanity_rows
from robustlayers.study.finals import AutoAttack, Measured
from robustlayers.study.plan import PhaseNode
from robustlayers.study.schema import Recipe
from robustlayers.study.semantics import (
    NamedAttack,
    build_attack,
    build_model,
    build_threat,
    data_of,
    measured_attacks,
)
from robustlayers.study.steering import measured_as, policy_of
from robustlayers.study.store import Store
from robustlayers.study.work import Report

__all__ = ["measure_run"]

_FLAGGED = 100  # test images that the flags look at
_LOOKED_AT = 128  # validation images that the norm layers are looked at with
_PICTURES = 8
_SHARDS = ".shards"  # what AutoAttack has found so far, until all of it stands in the rows


def measure_run(
    store: Store, run: str, nodes: list[PhaseNode], recipe: Recipe, seed: int, device: torch.device, report: Report
) -> None:
    """Measure a trained run on the test set, each checkpoint once, and craft a few pictures, into the store.

    Killed at any moment it starts anew, but for AutoAttack, which goes on from its last shard: the draws depend on the seed
    only, so the numbers are the same.
    """
    folder = store.result(run, seed)
    began = time.perf_counter()
    dataset, _, validation, test = data_of(recipe.data)
    test = test.to(device)
    looked_at = validation.first(min(_LOOKED_AT, len(validation))).to(device) if len(validation) else None
    attacks = measured_attacks(recipe)
    plain = {name: attack for name, attack in attacks.items() if not isinstance(attack, AutoAttack)}
    trained = store.phase(nodes[-1].id, seed)
    curve = read_json(trained / "curve.json")
    epochs = {"best": curve["best_epoch"], "last": curve["points"][-1]["epoch"]}
    points = {point["epoch"]: point for point in curve["points"]}
    model = build_model(recipe.model, dataset, seed).to(device)
    rows: list[dict[str, Any]] = []
    seen: dict[int, list[dict[str, Any]]] = {}
    norms: dict[int, list[dict[str, Any]]] = {}
    pictures: dict[str, Tensor] = {}
    threat = build_threat(recipe.threat)
    forward, text = measured_as(model, policy_of(nodes))

    def progress(name: str, done: int, of: int) -> None:
        report("batch", {"what": name, "done": done, "of": of})

    for checkpoint in recipe.evaluate.checkpoints:
        epoch = epochs[checkpoint]
        if epoch not in seen:  # best and last may be one and the same epoch
            model.load_state_dict(read_tensors(trained / f"{checkpoint}.safetensors"))
            verdicts = worst_case(
                forward, test.images, test.labels, plain, recipe.evaluate.batch_size, seed=seed, progress=progress
            )
            weights = trained / f"{checkpoint}.safetensors"
            finals = _finals(forward, test, attacks, folder / _SHARDS, weights, seed, report)
            for name, outcome in finals.items():
                verdicts[name] = verdicts["clean"] & outcome.robust
                verdicts["robust"] &= outcome.robust
            notes = flags(forward, test.images[:_FLAGGED], test.labels[:_FLAGGED], threat)
            extras = corruption_rows(forward, test, recipe.evaluate.corruptions, recipe.evaluate.batch_size, progress)
            if recipe.evaluate.sanity:
                some = test.first(min(SANITY_IMAGES, len(test)))
                checked = sanity(forward, some.images, some.labels, threat, seed=seed, progress=progress)
                notes += [text for text in checked.flags if text not in notes]
                extras += sanity_rows(checked)
            notes += _flags_of_verdicts(verdicts, attacks, finals)
            held_out = min(recipe.evaluate.monitor.images, len(validation))
            notes += _flags_of_training(nodes[-1], [p for p in curve["points"] if p["epoch"] <= epoch], held_out)
            seen[epoch] = _test_rows(verdicts, attacks, finals, "; ".join(notes)) + _curve_rows(recipe, points[epoch])
            seen[epoch] += _class_rows(verdicts, test.labels.cpu(), attacks)
            seen[epoch].append(_calibration_row(forward, test, recipe.evaluate.batch_size))
            seen[epoch] += extras
            if recipe.evaluate.branches:
                seen[epoch] += _branch_rows(model, test, plain, recipe, seed)
            if looked_at is not None:
                monitor = build_attack(recipe.evaluate.monitor.attack, recipe.threat)
                norms[epoch] = study_rows(
                    model,
                    looked_at.images,
                    looked_at.labels,
                    monitor,
                    noise=Gaussian(build_threat(recipe.threat)),
                    seed=seed,
                )
            pictures = pictures or _pictures(model, test, len(dataset.classes), attacks, finals, seed)
        rows += [{"checkpoint": checkpoint, "epoch": epoch, "normalization": text, **row} for row in seen[epoch]]
    write_json(folder / "rows.json", rows)
    layers = [
        {"checkpoint": checkpoint, "epoch": epochs[checkpoint], **row}
        for checkpoint in recipe.evaluate.checkpoints
        for row in norms.get(epochs[checkpoint], ())
    ]
    write_json(folder / "norms.json", layers)
    write_tensors(folder / "pictures.safetensors", pictures)
    write_json(folder / "time.json", {"seconds": time.perf_counter() - began})
    shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    store.finish(folder, kind="result", id=run, seed=seed)
    report("measured", {row["metric"]: row["value"] for row in seen[epochs[recipe.evaluate.checkpoints[0]]]})


def _finals(
    forward: Any, test: Images, attacks: Mapping[str, Measured], folder: Path, weights: Path, seed: int, report: Report
) -> dict[str, Outcome]:
    """Return what each AutoAttack found, by the name of its rows; what a kill would lose lies in shards."""
    found = {}
    for name, attack in attacks.items():
        if isinstance(attack, AutoAttack):

            def tell(moment: Moment, name: str = name) -> None:
                report("batch", {"what": f"{name}: {moment.attack}", "done": moment.done, "of": moment.of})

            found[name] = autoattack(
                forward,
                test.images,
                test.labels,
                threat=attack.threat,
                directory=folder / file_digest(weights)[:16] / name,
                steps=attack.steps,
                targets=attack.targets,
                queries=attack.queries,
                whole=attack.whole,
                seed=seed,
                progress=tell,
            )
    return found


def _flags_of_verdicts(
    verdicts: Mapping[str, Tensor], attacks: Mapping[str, Measured], finals: Mapping[str, Outcome]
) -> list[str]:
    """Return the flags that attacks raise beside each other."""
    notes = [text for name in finals for text in beyond_final({n: verdicts[n] for n in attacks}, name)]
    notes += [note for outcome in finals.values() for note in outcome.notes if note.startswith("judged once more")]
    black = {name: verdicts[name] for name, attack in attacks.items() if isinstance(attack, Square)}
    white = {name: verdicts[name] for name, attack in attacks.items() if isinstance(attack, (PGD, APGD, TargetedAPGD))}
    return notes + (black_box(white, black) if black and white else [])


def _flags_of_training(node: PhaseNode, curve: Sequence[Mapping[str, Any]], images: int) -> list[str]:
    """Return the flags that the learning curve of a phase raises which trains on adversarial images."""
    if not (node.adversarial and node.phase.kind == "train" and images):
        return []
    columns = {key: [point[key] for point in curve] for key in ("epoch", "validation_clean", "validation_robust")}
    return collapse(columns["epoch"], columns["validation_clean"], columns["validation_robust"], images)


def _test_rows(
    verdicts: Mapping[str, Tensor], attacks: Mapping[str, Measured], finals: Mapping[str, Outcome], notes: str
) -> list[dict[str, Any]]:
    """Return clean and robust accuracy, that under each attack, and after each part of AutoAttack."""
    texts = {"clean": "", **{name: attack.describe() for name, attack in attacks.items()}}
    for name, outcome in finals.items():
        texts[name] = f"{outcome.label}: {attacks[name].describe()}"
        verdicts, right = dict(verdicts), verdicts["clean"]
        for turn in outcome.table:
            right = right & torch.tensor([broken != turn.attack for broken in outcome.broken_by])
            verdicts[f"{name}:{turn.attack}"], texts[f"{name}:{turn.attack}"] = right, turn.text
    texts["robust"] = "worst case of " + ", ".join(attacks)
    return [
        {
            "metric": metric,
            "value": int(verdicts[metric].sum()) / len(verdicts[metric]),
            "count": int(verdicts[metric].sum()),
            "total": len(verdicts[metric]),
            "split": "test",
            "attack": text,
            "flags": notes,
        }
        for metric, text in texts.items()
    ]


def _class_rows(
    verdicts: Mapping[str, Tensor], labels: Tensor, attacks: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """Return the accuracy of the class that stands worst, clean and under all attacks."""
    rows = []
    for metric, text in (("clean", ""), ("robust", "worst case of " + ", ".join(attacks))):
        worst = min(per_class({metric: verdicts[metric]}, labels), key=lambda one: one.accuracy)
        row = {"value": worst.accuracy, "count": worst.count, "total": worst.total, "split": "test", "attack": text}
        rows.append({"metric": f"{metric}_lowest_class", **row})
    return rows


def _calibration_row(forward: Any, test: Images, batch_size: int) -> dict[str, Any]:
    found = calibration(forward, test.images, test.labels, None, batch_size)
    return {"metric": "ece", "value": found.ece, "split": "test"}


def _branch_rows(
    model: nn.Module, test: Images, attacks: Mapping[str, NamedAttack], recipe: Recipe, seed: int
) -> list[dict[str, Any]]:
    """Return the accuracy of each branch, clean and under what each attack crafted on each branch."""
    if not any(getattr(module, "branches", ()) for module in model.modules()):
        return []
    rows: list[dict[str, Any]] = []
    for name, attack in attacks.items():
        table = branches(model, test.images, test.labels, attack, recipe.evaluate.batch_size, seed=seed)
        for line in table.rows():
            crafted, measured = line["crafted_on"], line["measured_on"]
            if crafted or name == next(iter(attacks)):
                rows.append(
                    {
                        "metric": f"{name}@{crafted}>{measured}" if crafted else f"clean@{measured}",
                        "value": line["accuracy"],
                        "count": line["count"],
                        "total": line["total"],
                        "split": "test",
                        "attack": attack.describe() if crafted else "",
                        "normalization": f"running, branch {measured}",
                    }
                )
    return rows


def _curve_rows(recipe: Recipe, point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies on train and validation after the checkpoint's epoch, as the monitor saw them."""
    attack = build_attack(recipe.evaluate.monitor.attack, recipe.threat).describe()
    return [
        {
            "metric": f"{split}_{kind}",
            "value": point[f"{split}_{kind}"],
            "split": split,
            "attack": attack if kind == "robust" else "",
        }
        for split in ("train", "validation")
        for kind in ("clean", "robust")
        if point[f"{split}_{kind}"] is not None
    ]


def _pictures(
    model: nn.Module,
    test: Images,
    classes: int,
    attacks: Mapping[str, Measured],
    finals: Mapping[str, Outcome],
    seed: int,
) -> dict[str, Tensor]:
    """Return the first test image of each of the first classes, with what the first attack makes of it."""
    places = [(test.labels == label).nonzero().flatten() for label in range(classes)]
    chosen = [int(place[0]) for place in places if len(place)][:_PICTURES]
    some = test.take(chosen)
    x = to_float(some.images)
    name, attack = next(iter(attacks.items()))
    with inference(model):
        if isinstance(attack, AutoAttack):
            x_adv = finals[name].x_adv[chosen].to(x)
        else:
            x_adv = attack(model, x, some.labels, generator=stream(seed, "pictures"))
        with torch.no_grad():
            natural, adversarial = model(x).argmax(1), model(x_adv).argmax(1)
    return {
        "natural": x,
        "labels": some.labels,
        "adversarial": x_adv,
        "predicted_natural": natural,
        "predicted_adversarial": adversarial,
    }
