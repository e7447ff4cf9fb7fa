"""Measuring one trained run for one seed: the test set, read once for each checkpoint, and a few pictures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks import APGD, PGD, Gaussian, Square, TargetedAPGD
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json, write_tensors
from robustlayers.core.random import stream
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.data import Images, to_float
from robustlayers.evaluation import (
    Moment,
    Outcome,
    Progress,
    beyond_final,
    calibration,
    flags,
    per_class,
    sanity,
    worst_case,
)
from robustlayers.evaluation._views import branches_of
from robustlayers.evaluation.autoattack import autoattack_label
from robustlayers.evaluation.branches import branches
from robustlayers.evaluation.cascade import cascade
from robustlayers.evaluation.flags import black_box, collapse
from robustlayers.normalization import inference
from robustlayers.normalization.layers import seed_draws
from robustlayers.normalization.report import study_rows
from robustlayers.study.cost import measuring_parts
from robustlayers.study.course import Course, turn_of_sanity
from robustlayers.study.extras import SANITY_IMAGES, corruption_rows, sanity_rows
from robustlayers.study.finals import AutoAttack, Measured
from robustlayers.study.local import apart
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


@dataclass(frozen=True)
class _Subject:
    """A run as it is measured: its net, how images go through it, the test set, and how far measuring is."""

    model: nn.Module
    forward: nn.Module | Callable[[Tensor], Tensor]
    test: Images
    attacks: Mapping[str, Measured]
    recipe: Recipe
    seed: int
    pictured: Sequence[int]  # places of the images of which pictures are kept
    course: Course

    @property
    def plain(self) -> dict[str, NamedAttack]:
        """The attacks but AutoAttack."""
        return {name: attack for name, attack in self.attacks.items() if not isinstance(attack, AutoAttack)}


def measure_run(
    store: Store,
    run: str,
    nodes: list[PhaseNode],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    report: Report,
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Measure a trained run on the test set, each checkpoint once, and craft a few pictures, into the store.

    Killed at any moment it starts anew, but for AutoAttack, which goes on from its last shard: the draws depend on the seed
    only, so the numbers are the same. Of several processes, which call this with the same arguments, all attack, each its
    batches, to the verdicts of one process; the main one does the rest and writes the result, and what it fails of there is
    raised as `Apart`.
    """
    folder = store.result(run, seed)
    began = time.perf_counter()
    dataset, _, validation, test = data_of(recipe.data)
    test = test.to(device)
    looked_at = validation.first(min(_LOOKED_AT, len(validation))).to(device) if len(validation) else None
    trained = store.phase(nodes[-1].id, seed)
    curve = read_json(trained / "curve.json")
    epochs = {"best": curve["best_epoch"], "last": curve["points"][-1]["epoch"]}
    points = {point["epoch"]: point for point in curve["points"]}
    weights: dict[int, Path] = {}  # best and last may be one and the same epoch
    for checkpoint in recipe.evaluate.checkpoints:
        weights.setdefault(epochs[checkpoint], trained / f"{checkpoint}.safetensors")
    model = build_model(recipe.model, dataset, seed).to(device)
    forward, text = measured_as(model, policy_of(nodes))
    if not isinstance(forward, nn.Module) and seed_draws(model, seed):
        if not ranks.main:
            return
        ranks = ALONE  # what random norm layers draw inside a function depends on all batches before
    course = _course([path.stem for path in weights.values()], recipe, report)
    pictured = _pictured(test, len(dataset.classes))
    one = _Subject(model, forward, test, measured_attacks(recipe), recipe, seed, pictured, course)
    attacked: dict[int, tuple[dict[str, Tensor], dict[str, Outcome]]] = {}
    for epoch, path in weights.items():
        model.load_state_dict(read_tensors(path))
        attacked[epoch] = _attacked(one, path.stem, folder / _SHARDS / file_digest(path)[:16], ranks)
    if not ranks.main:
        return
    with apart():
        seen: dict[int, list[dict[str, Any]]] = {}
        norms: dict[int, list[dict[str, Any]]] = {}
        pictures: dict[str, Tensor] = {}
        for epoch, path in weights.items():
            model.load_state_dict(read_tensors(path))
            seed_draws(model, seed, "measure")  # whichever batches this process has attacked last
            verdicts, finals = attacked[epoch]
            held_out = min(recipe.evaluate.monitor.images, len(validation))
            notes = _flags_of_training(nodes[-1], [p for p in curve["points"] if p["epoch"] <= epoch], held_out)
            seen[epoch] = _rows(one, path.stem, verdicts, finals, notes, points[epoch])
            course.part(path.stem, "besides")("norm layers", 0, 1)
            if looked_at is not None:
                monitor = build_attack(recipe.evaluate.monitor.attack, recipe.threat)
                noise = Gaussian(build_threat(recipe.threat))
                norms[epoch] = study_rows(model, looked_at.images, looked_at.labels, monitor, noise=noise, seed=seed)
            pictures = pictures or _pictures(one, finals)
        rows = [
            {"checkpoint": checkpoint, "epoch": epochs[checkpoint], "normalization": text, **row}
            for checkpoint in recipe.evaluate.checkpoints
            for row in seen[epochs[checkpoint]]
        ]
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


def _course(names: Sequence[str], recipe: Recipe, report: Report) -> Course:
    """Return how far measuring is: the attacks on all checkpoints, by name, then what is measured beside them."""
    passes = {part.name: part.passes for part in measuring_parts(recipe)}
    attacks = measured_attacks(recipe)
    finals = [name for name, attack in attacks.items() if isinstance(attack, AutoAttack)]
    attacking = {"attacks": sum(passes[name] for name in attacks if name not in finals)}
    attacking |= {name: passes[name] for name in finals}
    beside = {name: passes.get(name, 0.0) for name in ("flags", "corruptions", "sanity", "branches", "besides")}

    def tell(what: str, done: int, of: int, share: float) -> None:
        report("batch", {"what": what, "done": done, "of": of, "share": share})

    sizes = {(name, part): size for some in (attacking, beside) for name in names for part, size in some.items()}
    return Course(tell, sizes)


def _attacked(one: _Subject, name: str, shards: Path, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Outcome]]:
    """Return the verdicts under all attacks, and what each AutoAttack found, with adversarial images for the pictures only.

    `name`: of the checkpoint; what a kill of AutoAttack would lose lies in `shards`.
    """
    test, n = one.test, len(one.test)
    passes = {"clean": 0.0} | {key: _passes(attack, n) for key, attack in one.plain.items()}
    verdicts = worst_case(
        one.forward,
        test.images,
        test.labels,
        one.plain,
        one.recipe.evaluate.batch_size,
        seed=one.seed,
        progress=one.course.part(name, "attacks", passes.__getitem__),
        ranks=ranks,
    )
    finals: dict[str, Outcome] = {}
    for key, attack in one.attacks.items():
        if isinstance(attack, AutoAttack):
            turns = attack.attacks
            passes = {turn: _passes(turns[turn], n) for turn in turns}
            progress = one.course.part(name, key, passes.__getitem__)

            def tell(moment: Moment, progress: Progress = progress) -> None:
                progress(moment.attack, moment.done + int(moment.begun), moment.of)

            found = cascade(
                one.forward,
                test.images,
                test.labels,
                turns,
                directory=shards / key,
                seed=one.seed,
                progress=tell,
                label=autoattack_label(turns, n, whole=attack.whole),
                ranks=ranks,
            )
            finals[key] = replace(found, x_adv=found.x_adv[list(one.pictured)])
            verdicts[key] = verdicts["clean"] & found.robust
            verdicts["robust"] &= found.robust
    return verdicts, finals


def _rows(
    one: _Subject,
    name: str,
    verdicts: Mapping[str, Tensor],
    finals: Mapping[str, Outcome],
    notes: list[str],
    point: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return all rows of a checkpoint; `notes`: flags that are known, `point`: of the learning curve."""
    test, config, threat = one.test, one.recipe.evaluate, build_threat(one.recipe.threat)
    one.course.part(name, "flags")("flags", 0, 1)
    raised = flags(one.forward, test.images[:_FLAGGED], test.labels[:_FLAGGED], threat)
    each = float(min(config.corruptions.images or len(test), len(test)))
    progress = one.course.part(name, "corruptions", lambda what: each)
    extras = corruption_rows(one.forward, test, config.corruptions, config.batch_size, progress)
    if config.sanity:
        some = test.first(min(SANITY_IMAGES, len(test)))
        progress = one.course.part(name, "sanity", lambda what: len(some) * turn_of_sanity(what), prefix="sanity: ")
        checked = sanity(one.forward, some.images, some.labels, threat, seed=one.seed, progress=progress)
        raised += [text for text in checked.flags if text not in raised]
        extras += sanity_rows(checked)
    branched = _branch_rows(one, name) if config.branches else []
    raised += _flags_of_verdicts(verdicts, one.attacks, finals) + notes
    rows = _test_rows(verdicts, one.attacks, finals, "; ".join(raised)) + _curve_rows(one.recipe, point)
    rows += _class_rows(verdicts, test.labels.cpu(), one.attacks)
    rows.append(_calibration_row(one, one.course.part(name, "besides")))
    return rows + extras + branched


def _passes(attack: NamedAttack, images: int) -> float:
    """Return the most passes that an attack on so many images takes, the verdicts included."""
    return float(images * (1 + attack.forward_passes + attack.backward_passes))


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


def _calibration_row(one: _Subject, progress: Progress) -> dict[str, Any]:
    images, labels = one.test.images, one.test.labels
    found = calibration(one.forward, images, labels, None, one.recipe.evaluate.batch_size, progress=progress)
    return {"metric": "ece", "value": found.ece, "split": "test"}


def _branch_rows(one: _Subject, name: str) -> list[dict[str, Any]]:
    """Return the accuracy of each branch, clean and under what each attack crafted on each branch."""
    rows: list[dict[str, Any]] = []
    known = branches_of(one.model)
    size, test = one.recipe.evaluate.batch_size, one.test
    passes = {key: _passes(attack, len(test)) + len(test) * len(known) for key, attack in one.plain.items()}
    progress = one.course.part(name, "branches", lambda what: passes[what.partition(" on ")[0]], prefix="branches: ")
    for place, (key, attack) in enumerate(one.plain.items() if known else ()):

        def tell(branch: str, done: int, of: int, key: str = key) -> None:
            progress(f"{key} on {branch}", done, of)

        table = branches(one.model, test.images, test.labels, attack, size, seed=one.seed, progress=tell)
        for line in table.rows():
            crafted, measured = line["crafted_on"], line["measured_on"]
            if crafted or not place:
                rows.append(
                    {
                        "metric": f"{key}@{crafted}>{measured}" if crafted else f"clean@{measured}",
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


def _pictured(test: Images, classes: int) -> list[int]:
    """Return the place of the first test image of each of the first classes."""
    places = [(test.labels == label).nonzero().flatten() for label in range(classes)]
    return [int(place[0]) for place in places if len(place)][:_PICTURES]


def _pictures(one: _Subject, finals: Mapping[str, Outcome]) -> dict[str, Tensor]:
    """Return a few test images, with what the first attack makes of them."""
    model, some = one.model, one.test.take(list(one.pictured))
    x = to_float(some.images)
    name, attack = next(iter(one.attacks.items()))
    with inference(model):
        if isinstance(attack, AutoAttack):
            x_adv = finals[name].x_adv.to(x)
        else:
            x_adv = attack(model, x, some.labels, generator=stream(one.seed, "pictures"))
        with torch.no_grad():
            natural, adversarial = model(x).argmax(1), model(x_adv).argmax(1)
    return {
        "natural": x,
        "labels": some.labels,
        "adversarial": x_adv,
        "predicted_natural": natural,
        "predicted_adversarial": adversarial,
    }
