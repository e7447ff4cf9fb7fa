"""A made-up study with believable numbers, in the variants that a report has to survive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from robustlayers.study import claims
from robustlayers.study.definition import FACTS
from robustlayers.study.summary import (
    Arm,
    ClaimResult,
    CurvePoint,
    GroupLine,
    LedgerLine,
    PhaseLine,
    Pictures,
    Row,
    Summary,
)

TEST_IMAGES = 2000
TRAIN_IMAGES = 9000
EPS = 12 / 255
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ATTACKS = ("pgd-20", "apgd-ce")

# Mean clean and robust accuracy after the last phase, and what that phase trains.
ARMS: dict[str, tuple[float, float, Callable[[str], bool] | None]] = {
    "none": (0.893, 0.004, None),
    "norm": (0.781, 0.412, lambda name: "bn" in name),
    "head": (0.842, 0.061, lambda name: name.startswith("linear")),
    "random": (0.806, 0.317, lambda name: "conv" in name),  # scattered entries: as many as the norm layers have
    "all": (0.769, 0.587, lambda name: True),
    "all-but-norm": (0.774, 0.561, lambda name: "bn" not in name),
}


def tensors(channels: int) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, shape, and whether it is a buffer, of every tensor of a small residual net."""
    found: list[tuple[str, tuple[int, ...], bool]] = []

    def norm(name: str, width: int) -> None:
        found.extend((f"{name}.{part}", (width,), False) for part in ("weight", "bias"))
        found.extend((f"{name}.{part}", (width,), True) for part in ("running_mean", "running_var"))
        found.append((f"{name}.num_batches_tracked", (), True))

    found.append(("conv1.weight", (16, channels, 3, 3), False))
    norm("bn1", 16)
    before = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        block = f"layer{stage}.0"
        found.append((f"{block}.conv1.weight", (width, before, 3, 3), False))
        norm(f"{block}.bn1", width)
        found.append((f"{block}.conv2.weight", (width, width, 3, 3), False))
        norm(f"{block}.bn2", width)
        before = width
    found.append(("linear.weight", (10, 64), False))
    found.append(("linear.bias", (10,), False))
    return found


def entries(chosen: Sequence[tuple[str, tuple[int, ...], bool]], buffers: bool) -> int:
    return sum(math.prod(shape) for _, shape, buffer in chosen if buffer == buffers)


def on_grid(value: float) -> float:
    """An accuracy that `TEST_IMAGES` images can have."""
    return min(max(round(value * TEST_IMAGES), 0), TEST_IMAGES) / TEST_IMAGES


def accuracies(clean: float, robust: float, draw: np.random.Generator) -> dict[str, float]:
    shift = draw.normal(0, 0.006)
    strongest = on_grid(robust + draw.normal(0, 0.008) + shift)
    apgd = on_grid(strongest + draw.uniform(0, 0.001))
    return {
        "clean": on_grid(clean + draw.normal(0, 0.005)),
        "robust": min(strongest, apgd),
        "pgd-20": on_grid(strongest + draw.uniform(0.004, 0.011)),
        "apgd-ce": apgd,
    }


def curve(clean: float, robust: float, trained: bool, seed: int, stop: int | None = None) -> list[CurvePoint]:
    """The first phase depends on the seed alone, since arms share it."""
    points: list[CurvePoint] = []
    draw = np.random.default_rng(seed)
    shift = draw.normal(0, 0.012, 2)

    def add(phase: str, phase_clean: float, phase_robust: float, loss: float) -> None:
        wobble = draw.normal(0, 0.006, 4)
        robust_here = phase_robust > 0.01
        points.append(
            CurvePoint(
                epoch=len(points) + 1,
                phase=phase,
                train_clean=float(np.clip(phase_clean * 1.03 + wobble[0] + shift[0], 0, 1)),
                train_robust=float(np.clip(phase_robust * 1.08 + (wobble[1] + shift[1]) * robust_here, 0, 1)),
                validation_clean=float(np.clip(phase_clean + wobble[2] + shift[0], 0, 1)),
                validation_robust=float(np.clip(phase_robust + (wobble[3] + shift[1]) * robust_here, 0, 1)),
                train_loss=loss,
                seconds=6.5 if phase == "pretrain" else 38.0,
            )
        )

    for epoch in range(1, 11):
        add("pretrain", 0.893 - 0.25 * math.exp(-epoch / 2.5), 0.004 + 0.03 * math.exp(-epoch), 0.9 / epoch)
    for epoch in range(1, 6 if trained else 1):
        reach = 1 - math.exp(-epoch / 1.3)
        add("adapt", clean + (0.893 - clean) * 0.2 * (1 - reach) - 0.04 * (1 - reach), robust * reach, 1.2)
    return points[:stop]


def phases(keep: Callable[[str], bool] | None, arms: int, channels: int, scattered: bool) -> list[PhaseLine]:
    every = tensors(channels)
    total = entries(every, buffers=False)

    def group(
        name: str, signal: str, chosen: Sequence[tuple[str, tuple[int, ...], bool]], share: float = 1.0
    ) -> GroupLine:
        parameters = round(sum(math.prod(shape) for _, shape, buffer in chosen if not buffer) * share)
        return GroupLine(
            name=name,
            signal=signal,
            start="keep",
            tensors=[(tensor, "x".join(map(str, shape)) or "scalar", share) for tensor, shape, _ in chosen],
            parameters=parameters,
            buffers=entries(chosen, buffers=True),
            share=parameters / total,
        )

    lines = [
        PhaseLine(
            name="pretrain",
            epochs=10,
            attack="",
            optimizer="sgd lr=0.1 momentum=0.9 weight_decay=5e-4, cosine",
            normalization="batch statistics, running statistics updated",
            groups=[group("all", "natural", every)],
            forward_passes=10 * TRAIN_IMAGES,
            backward_passes=10 * TRAIN_IMAGES,
            shared_with=arms,
        )
    ]
    if keep is not None:
        trained = [entry for entry in every if keep(entry[0])]
        frozen = [entry for entry in every if not keep(entry[0])]
        share = 480 / entries(trained, buffers=False) if scattered else 1.0
        groups = [group("trained", "adversarial", trained, share)]
        if scattered:
            groups.append(replace(group("rest", "frozen", every), parameters=total - 480, share=1 - 480 / total))
        elif frozen:
            groups.append(group("rest", "frozen", frozen))
        lines.append(
            PhaseLine(
                name="adapt",
                epochs=5,
                attack="pgd-7, linf 12/255, step 3/255, random start",
                optimizer="sgd lr=0.01 momentum=0.9, cosine",
                normalization="trained: batch statistics; frozen: running statistics, no update",
                groups=groups,
                forward_passes=5 * 8 * TRAIN_IMAGES,
                backward_passes=5 * 8 * TRAIN_IMAGES,
                shared_with=1,
            )
        )
    return lines


def ledger(lines: Sequence[PhaseLine], seeds: Sequence[int], draw: np.random.Generator) -> list[LedgerLine]:
    found = []
    for seed in seeds:
        for phase in lines:
            for group in phase.groups:
                moved = group.signal != "frozen"
                found.append(
                    LedgerLine(
                        seed=seed,
                        phase=phase.name,
                        group=group.name,
                        signal=group.signal,
                        parameters=group.parameters,
                        buffers=group.buffers,
                        moved_parameters=group.parameters if moved else 0,
                        moved_buffers=group.buffers if moved else 0,
                        relative_l2=float(draw.uniform(0.2, 0.4)) if moved else 0.0,
                        largest=float(draw.uniform(0.5, 1.2)) if moved else 0.0,
                        kept=True,
                    )
                )
    return found


def build_arm(
    name: str,
    levels: dict[str, str],
    clean: float,
    robust: float,
    keep: Callable[[str], bool] | None,
    seeds: Sequence[int],
    *,
    arms: int,
    channels: int,
    diverged: int | None,
    curves: bool,
) -> Arm:
    draw = np.random.default_rng(sum(map(ord, name)) + 7 * len(name))
    lines = phases(keep, arms, channels, scattered="random" in name)
    whole = [seed for seed in seeds if seed != diverged]
    best = {seed: accuracies(clean, robust, draw) for seed in whole}
    last = {seed: accuracies(clean + 0.004, max(robust - 0.012, 0.002), draw) for seed in whole}
    epochs = sum(line.epochs for line in lines)
    trained = sum(group.parameters for group in lines[-1].groups if group.signal != "frozen") if keep else 0
    status = dict.fromkeys(seeds, "finished")
    reasons = {}
    if diverged is not None:
        status[diverged] = "diverged"
        reasons[diverged] = "loss is NaN in phase adapt, epoch 12, step 31"
    return Arm(
        name=name,
        levels=levels,
        run=f"{sum(map(ord, name)) * 2654435761 % 2**64:016x}",
        status=status,
        reasons=reasons,
        trained_parameters=trained,
        trained_share=trained / entries(tensors(channels), buffers=False),
        forward_passes=sum(line.forward_passes for line in lines),
        backward_passes=sum(line.backward_passes for line in lines),
        seconds={seed: 65.0 + (190.0 if keep else 0.0) + 3.7 * seed for seed in whole},
        results={
            checkpoint: {metric: {seed: found[seed][metric] for seed in whole} for metric in next(iter(found.values()))}
            if whole
            else {}
            for checkpoint, found in (("best", best), ("last", last))
        },
        best_epoch={seed: epochs - seed % 3 for seed in whole},
        phases=lines,
        curves={
            seed: curve(clean, robust, keep is not None, seed, stop=12 if seed == diverged else None) for seed in seeds
        }
        if curves
        else {},
        ledger=ledger(lines, whole, draw),
    )


CLAIMS = (
    ("BatchNorm alone gains robustness", "robust[group=norm] > robust[group=none]"),
    ("it gains more than as many random weights", "robust[group=norm] > robust[group=random]"),
    ("leaving BatchNorm out costs robustness", "robust[group=all-but-norm] < robust[group=all]"),
    ("BatchNorm alone keeps more clean accuracy than the head alone", "clean[group=norm] > clean[group=head]"),
    ("BatchNorm alone trains fewer parameters", "trained_parameters[group=norm] < trained_parameters[group=all]"),
)


def judge(arms: Sequence[Arm], checkpoints: Sequence[str], factors: Mapping[str, Sequence[str]]) -> list[ClaimResult]:
    """The claims of which every arm is there, judged as in a real study."""
    names = [arm.name for arm in arms]
    wanted = [
        (say, that) for say, that in CLAIMS if all(f"group={name}]" not in that or name in names for name in ARMS)
    ]

    def lookup(metric: str, levels: dict[str, str], checkpoint: str) -> dict[int, float]:
        arm = next(arm for arm in arms if arm.levels == levels)
        if metric == "trained_parameters":
            return dict.fromkeys(arm.results[checkpoint].get("clean", {}), float(arm.trained_parameters))
        return dict(arm.results[checkpoint].get(metric, {}))

    metrics = ["clean", "robust", *ATTACKS, "trained_parameters"]
    bound = [(say, claims.parse(that).bind(factors, metrics, checkpoints)) for say, that in wanted]
    return claims.judge(bound, lookup, checkpoints, facts=FACTS)


def garments(channels: int, side: int) -> np.ndarray:
    """Eight simple shapes in the manner of small product pictures: float32 [8, channels, side, side]."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1) * 2 - 1
    body = (np.abs(x) < 0.45) & (np.abs(y) < 0.85)
    sleeves = (np.abs(y + 0.55) < 0.28) & (np.abs(x) < 0.9)
    legs = (np.abs(np.abs(x) - 0.28) < 0.17) & (y > -0.5) | ((np.abs(x) < 0.45) & (y < -0.3) & (y > -0.9))
    dress = (np.abs(x) < 0.22 + 0.3 * (y + 0.9) / 1.8) & (np.abs(y) < 0.9)
    shoe = ((y > 0.05) & (y < 0.5) & (x > -0.9) & (x < 0.9 - 0.5 * (0.5 - y))) | (
        (x < -0.25) & (x > -0.9) & (y > -0.4) & (y < 0.5)
    )
    boot = shoe | ((x < -0.2) & (x > -0.85) & (y > -0.9) & (y < 0.5))
    handle = np.abs(np.hypot(x, y + 0.3) - 0.5) < 0.09
    bag = ((np.abs(x) < 0.8) & (y > -0.2) & (y < 0.75)) | (handle & (y < -0.1))
    shapes = [body | sleeves, legs, body | (sleeves & (y > -0.8)), dress, shoe, bag, boot, body]
    draw = np.random.default_rng(5)
    pictures = []
    for index, shape in enumerate(shapes):
        shade = 0.55 + 0.3 * np.sin(3 * x + index) * np.cos(4 * y - index) + draw.normal(0, 0.04, x.shape)
        grey = np.where(shape, np.clip(shade, 0.15, 1), 0.0)
        if channels == 1:
            pictures.append(grey[None])
            continue
        tint = draw.uniform(0.4, 1.0, (3, 1, 1))
        ground = draw.uniform(0.2, 0.8, (3, 1, 1)) * (0.8 + 0.2 * y)
        pictures.append(np.where(shape, grey * tint, ground))
    return np.clip(np.stack(pictures), 0, 1).astype(np.float32)


def make_pictures(arms: Sequence[Arm], channels: int) -> Pictures:
    natural = garments(channels, 28 if channels == 1 else 32)
    labels = ["T-shirt", "Trouser", "Pullover", "Dress", "Sneaker", "Bag", "Ankle boot", "Shirt"]
    adversarial, plain, fooled = {}, {}, {}
    for index, arm in enumerate(arms):
        draw = np.random.default_rng(100 + index)
        coarse = draw.normal(0, 1, (*natural.shape[:2], natural.shape[2] // 4, natural.shape[3] // 4))
        rough = np.kron(coarse, np.ones((1, 1, 4, 4))) + 0.5 * draw.normal(0, 1, natural.shape)
        moved = np.clip(natural + (EPS * np.clip(1.5 * rough, -1, 1)).astype(np.float32), 0, 1)
        adversarial[arm.name] = moved.astype(np.float32)
        robust = next(iter(arm.results["best"].get("robust", {0: 0.0}).values()))
        plain[arm.name] = [label if draw.random() < 0.85 else "Coat" for label in labels]
        fooled[arm.name] = [
            label if draw.random() < robust else CLASSES[(CLASSES.index(label) + 2) % 10] for label in labels
        ]
    return Pictures(natural, labels, adversarial, plain, fooled, "pgd-20, linf 12/255, step 1.5/255, 1 restart")


def make_rows(study: str, arms: Sequence[Arm], texts: dict[str, str]) -> list[Row]:
    rows = []
    for arm in arms:
        for checkpoint, metrics in arm.results.items():
            for metric, values in metrics.items():
                for seed, value in values.items():
                    epochs = sum(phase.epochs for phase in arm.phases)
                    rows.append(
                        Row(
                            study=study,
                            arm=arm.name,
                            levels=arm.levels,
                            run=arm.run,
                            seed=seed,
                            checkpoint=checkpoint,
                            metric=metric,
                            value=value,
                            count=round(value * TEST_IMAGES),
                            total=TEST_IMAGES,
                            split="test",
                            attack=texts.get(metric, ""),
                            normalization="running",
                            epoch=arm.best_epoch[seed] if checkpoint == "best" else epochs,
                        )
                    )
        rows.extend(
            Row(study, arm.name, arm.levels, arm.run, seed, "", "trained_share", arm.trained_share)
            for seed in arm.seconds
        )
    return rows


def make_summary(
    *,
    arms: Sequence[str] = tuple(ARMS),
    seeds: Sequence[int] = (0, 1, 2),
    diverged: tuple[str, int] | None = None,
    factors: int = 1,
    channels: int = 1,
    with_pictures: bool = True,
    with_claims: bool = True,
    with_curves: bool = True,
    checkpoints: Sequence[str] = ("best", "last"),
) -> Summary:
    """Return a study: `diverged` names an arm and one of its seeds; with two factors every arm comes in two widths."""
    count = len(arms) * factors
    built: list[Arm] = []
    for name in arms:
        clean, robust, keep = ARMS[name]
        for width in ("narrow", "wide")[:factors]:
            whole = name if factors == 1 else f"{name}, {width}"
            levels = {"group": name} if factors == 1 else {"group": name, "width": width}
            bonus = 0.02 if width == "wide" else 0.0
            built.append(
                build_arm(
                    whole,
                    levels,
                    clean + bonus,
                    robust + bonus,
                    keep,
                    seeds,
                    arms=count,
                    channels=channels,
                    diverged=diverged[1] if diverged and diverged[0] == whole else None,
                    curves=with_curves,
                )
            )
    built = [replace(arm, results={checkpoint: arm.results[checkpoint] for checkpoint in checkpoints}) for arm in built]
    named: dict[str, Sequence[str]] = (
        {"group": tuple(arms)} if factors == 1 else {"group": tuple(arms), "width": ("narrow", "wide")}
    )
    judged = judge(built, checkpoints, named) if with_claims and factors == 1 else []
    texts = {
        "pgd-20": "pgd, linf 12/255, 20 steps of 1.5/255, 1 restart, cross-entropy",
        "apgd-ce": "apgd, linf 12/255, 50 steps, 1 restart, cross-entropy",
    }
    every = tensors(channels)
    size = "28x28x1" if channels == 1 else "32x32x3"
    notes = ["The validation images come from the same source as the training images."]
    if diverged:
        notes.append(f"{diverged[0]}: seed {diverged[1]} diverged and is left out of every mean of that arm.")
    return Summary(
        name="bn-adapt",
        question="How much robustness can the BatchNorm layers alone take on, and what does it cost in clean accuracy?",
        command="robustlayers run studies/bn-adapt.yaml",
        data=f"fashion-mnist-mini: {TRAIN_IMAGES} train, 1000 validation, {TEST_IMAGES} test images, {size}, 10 classes",
        test_images=TEST_IMAGES,
        model="resnet depth=8 width=16 norm=batch",
        model_parameters=entries(every, buffers=False),
        norm_parameters=entries([entry for entry in every if "bn" in entry[0]], buffers=False),
        threat="linf 12/255",
        training_attack="pgd-7, linf 12/255, step 3/255, random start",
        attacks=ATTACKS,
        attack_texts=texts,
        checkpoints=tuple(checkpoints),
        selection="best: the epoch of the last phase with the highest robust accuracy (pgd-10) on validation.",
        seeds=tuple(seeds),
        factors=named,
        arms=built,
        claims=judged,
        rows=make_rows("bn-adapt", built, texts),
        versions={"python": "3.11.2", "robustlayers": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
        machine="x86_64 CPU, Linux, 2 torch thread(s)",
        recipe_yaml="question: How much robustness can the BatchNorm layers alone take on?\n"
        "data: {name: fashion-mnist-mini, validation: 1000}\n"
        "threat: {norm: linf, eps: 12/255}\nphases:\n"
        "  - {name: pretrain, epochs: 10, train: {all: natural}}\n"
        "  - {name: adapt, epochs: 5, train: {norm: adversarial, rest: frozen}}\n",
        notes=notes,
        pictures=make_pictures(built, channels) if with_pictures else None,
    )
