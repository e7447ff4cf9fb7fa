"""Is our AutoAttack as strong as the reference, and faster? Both on the same images, a few at a time in turn.

The reference is pyautoattack (`pip install -r benchmarks/requirements.txt`), on the plain model, in its own default batch
size. Parts of the images go through ours and theirs one after the other, so that another load on the machine meets both
alike; who goes first alternates. Prints a Markdown table, a line for each attack and eps:

    python benchmarks/autoattack.py --data parquet:cifar10-jpeg --weights resnet20.safetensors --images 500
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.attacks import APGD, TargetedAPGD
from robustlayers.data import load, to_float
from robustlayers.evaluation.autoattack import standard
from robustlayers.evaluation.cascade import cascade
from robustlayers.models import build, load_weights

THEIRS = {
    "apgd-ce": ["apgd-ce"],
    "apgd-t": ["apgd-t"],
    "autoattack": ["apgd-ce", "apgd-t", "fab-t", "square"],
}


def ours(model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: rl.Threat) -> tuple[int, int, str]:
    """Return images right without and under an attack, and what each part of it broke."""
    attacks: dict[str, Any] = {"apgd-ce": APGD(threat, early_exit=True), "apgd-t": TargetedAPGD(threat)}
    attacks = standard(threat)[0] if attack == "autoattack" else {attack: attacks[attack]}
    found = cascade(model, x, y, attacks)
    parts = " + ".join(f"{turn.seconds:.0f}" for turn in found.table)
    return int(found.clean.sum()), int(found.robust.sum()), parts


def theirs(model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: rl.Threat) -> tuple[int, int, str]:
    """Return the same of the reference, in the budgets of its standard version."""
    from pyautoattack import AutoAttack  # pyright: ignore[reportMissingImports]

    reference = AutoAttack(model, eps=threat.eps, norm="Linf", seed=0, version="standard")
    reference.attacks_to_run, reference.version = THEIRS[attack], "custom"
    result = reference.run_standard_evaluation(x, y, batch_size=250)
    x_adv = result[0] if isinstance(result, tuple) else result
    with torch.no_grad():
        clean, robust = (int((model(images).argmax(1) == y).sum()) for images in (x, x_adv))
    return clean, robust, ""


@dataclass
class Side:
    """What one implementation has found and taken so far."""

    run: Callable[..., tuple[int, int, str]]
    clean: int = 0
    robust: int = 0
    seconds: float = 0.0


def compare(
    model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: rl.Threat, part: int, clock: Callable[[], float]
) -> str:
    """Run both in turn over all images and return a row of the table."""
    sides = [Side(ours), Side(theirs)]
    for number, (images, labels) in enumerate(zip(x.split(part), y.split(part), strict=True)):
        for side in sides if number % 2 == 0 else sides[::-1]:
            began = clock()
            clean, robust, note = side.run(model, images, labels, attack, threat)
            side.seconds += clock() - began
            side.clean += clean
            side.robust += robust
            name = side.run.__name__
            print(
                f"<!-- {attack} {threat} {name}: {robust} of {len(labels)}, {clock() - began:.1f} s {note} -->",
                flush=True,
            )
    mine, other = sides
    n = len(y)
    return (
        f"| {attack} | {threat} | {n} | {mine.clean / n:.1%} | {mine.robust} ({mine.robust / n:.2%}) "
        f"| {other.robust} ({other.robust / n:.2%}) | {mine.seconds:.0f} | {other.seconds:.0f} "
        f"| {other.seconds / mine.seconds:.2f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="data set of 32x32 images in 10 classes, as in `robustlayers data`"
    )
    parser.add_argument("--weights", required=True, type=Path, help="safetensors of a CIFAR ResNet-20")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--part", type=int, default=100, help="images that go through one side before the other's turn")
    parser.add_argument("--eps", nargs="+", default=["0.5/255", "1/255"])
    parser.add_argument("--attacks", nargs="+", choices=sorted(THEIRS), default=["apgd-ce", "apgd-t", "autoattack"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build("resnet", seed=0, depth=20, shortcut="A", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    load_weights(model, arguments.weights)
    model.eval()
    test = load(arguments.data).test.first(arguments.images)
    x, y = to_float(test.images), test.labels
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    loads = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"ResNet-20, {len(y)} test images, {arguments.threads} thread(s), torch {torch.__version__}, "
        f"{platform.machine()}, {arguments.clock} clock{loads}\n"
    )
    rows = [
        compare(model, x, y, attack, rl.Linf(eps), arguments.part, clock)
        for eps in arguments.eps
        for attack in arguments.attacks
    ]
    print("\n| attack | threat | n | clean | ours robust | reference robust | ours, s | reference, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
