"""Adversarial training on a GPU: images per second of crafting and of whole epochs, and the share of the matrix rate.

PGD-10 on PreActResNet-18 and WideResNet-28-10, random images of 3x32x32 on the device, next to loops in the manner of
torchattacks and MAIR in the same run. The matrix rate is measured, as the best of square bf16 products; an image's
operations are counted by `torch.utils.flop_counter`, crafting as forward and backward for the input, the update as
forward and both backwards. An epoch is 50,000 images; its seconds are from `--batches` batches in each round, and with
`--whole` a whole epoch of ours, cropping and flipping on the device included, is run and timed as well:

    python benchmarks/gpu.py --device cuda --write
    python benchmarks/gpu.py --device cuda --networks PreActResNet-18 --batch 512 --whole
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

import measuring
import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import robustlayers as rl
from robustlayers.data import Augment, to_float
from robustlayers.models import build

EPS, STEP, EPOCH = 8 / 255, 2 / 255, 50_000
NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "PreActResNet-18": ("preact-resnet", {"depth": 18, "width": 64}),
    "WideResNet-28-10": ("wide-resnet", {"depth": 28, "widen": 10}),
    "ResNet-8": ("resnet", {"depth": 8, "width": 8}),  # to try the script out
}


def matrix_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Return the largest measured rate of bf16 matrix products, in operations per second."""
    best = 0.0
    for side in (512,) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        repeats, spent = 1, 0.0
        while spent < seconds / 4:
            repeats *= 2
            _wait(device)
            began = time.perf_counter()
            for _ in range(repeats):
                torch.matmul(a, b)
            _wait(device)
            spent = time.perf_counter() - began
        best = max(best, 2 * side**3 * repeats / spent)
    return best


def operations(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the operations of one image: forward, and forward with the backward for the input alone."""
    counts = []
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for backward in (False, True):
        image = x[:2].clone().requires_grad_(backward)
        with FlopCounterMode(display=False) as counter:
            logits = frozen(image)
            if backward:
                logits.sum().backward()  # the counter does not see through autograd.grad
        counts.append(counter.get_total_flops() / 2)
    return counts[0], counts[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- contenders -----------------------------------------------------------------------------------------------------


def crafters(model: nn.Module, steps: int, *, compiled: bool) -> dict[str, measuring.Craft]:
    """Return ours and the loop by hand, on one model in evaluation mode."""
    attack = rl.PGD(rl.Linf(EPS), steps=steps, step_size=STEP, keep="last")

    def ours(precision: str) -> measuring.Craft:
        forward = rl.crafting_forward(model, precision=precision)
        run = torch.compile(forward) if compiled else forward

        def craft(x: Tensor, y: Tensor) -> Tensor:
            forward.refresh()
            return attack(run, x, y)

        return craft

    theirs = partial(peers.torchattacks_style_pgd, model, eps=EPS, step_size=STEP, steps=steps)
    found: dict[str, measuring.Craft] = {"torchattacks-style": lambda x, y: theirs(x, y)}
    for precision in ("fp32", "bf16"):
        found[f"ours, {precision}{', compiled' if compiled else ''}"] = ours(precision)
    return found


def steps_of(model: nn.Module, steps: int) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Return steps of training, each of a copy of the model."""
    found: dict[str, Callable[[Tensor, Tensor], object]] = {}
    for name, loop in (("torchattacks-style", peers.torchattacks_style_step), ("MAIR-style", peers.mair_style_step)):
        own = copy.deepcopy(model)
        run = partial(loop, own, _sgd(own), eps=EPS, step_size=STEP, steps=steps)
        found[name] = lambda x, y, run=run: run(x, y)
    for precision in ("fp32", "bf16"):
        own = copy.deepcopy(model)
        found[f"ours, {precision}"] = rl.PartialStep(
            own,
            rl.Partition(own, {"all": "all"}),
            {"all": "adversarial"},
            optimizer=_sgd(own),
            attack=rl.PGD(rl.Linf(EPS), steps=steps, step_size=STEP, keep="last"),
            crafting=precision,
            precision=precision,
        )
    return found


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def epoch(step: Callable[[Tensor, Tensor], object], images: Tensor, labels: Tensor, batch: int) -> None:
    """Train for one epoch on bytes that lie on the device, cropped and flipped there; nothing waits for the device."""
    generator = torch.Generator(images.device).manual_seed(0)
    augment = Augment(crop=4, flip=True)
    order = torch.randperm(len(images), generator=generator, device=images.device)
    for places in order.split(batch):
        step(to_float(augment.apply(images[places], generator)), labels[places])


# -- measuring ------------------------------------------------------------------------------------------------------


def compare(
    runs: dict[str, Callable[[Tensor, Tensor], object]],
    x: Tensor,
    y: Tensor,
    arguments,
    per_image: float,
    rate: float,
) -> list[list[object]]:
    """Return rows: images per second, against the first, share of the matrix rate, and seconds of an epoch."""

    def several(run: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return lambda: [run(x, y) for _ in range(arguments.batches)]

    spent = measuring.interleaved(
        {name: several(run) for name, run in runs.items()}, arguments.rounds, device=torch.device(arguments.device)
    )
    first = next(iter(spent))
    rows = []
    for name, seconds in spent.items():
        speeds = measuring.spread([len(x) * arguments.batches / each for each in seconds])
        share = speeds.median * per_image / rate
        ratio = measuring.ratio(spent[first], seconds).text()
        rows.append([name, speeds.text(0), ratio, f"{share:.0%}", f"{EPOCH / speeds.median:.1f}"])
    return rows


def measure(name: str, batch: int, arguments, rate: float) -> list[list[object]]:
    """Return the rows of one network and batch size."""
    device = torch.device(arguments.device)
    family, settings = NETWORKS[name]
    task = measuring.synthetic(name, family, settings, batch, device)
    forward, crafting = operations(build(family, seed=0, **settings), task.x.cpu())
    per_image = crafting * arguments.steps
    crafts = crafters(task.model, arguments.steps, compiled=arguments.compile)
    for label, craft in crafts.items():
        measuring.check(label, craft(task.x, task.y), task.x, EPS)
    rows = [["crafting", *row] for row in compare(dict(crafts), task.x, task.y, arguments, per_image, rate)]
    steps = steps_of(task.model, arguments.steps)
    with_update = per_image + 3 * forward
    rows += [["training", *row] for row in compare(steps, task.x, task.y, arguments, with_update, rate)]
    if arguments.whole:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (arguments.epoch_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (len(images),), generator=generator).to(device)
        label, step = list(steps.items())[-1]
        _wait(device)
        began = time.perf_counter()
        epoch(step, images.to(device), labels, batch)
        _wait(device)
        seconds = time.perf_counter() - began
        share = len(images) * with_update / seconds / rate
        rows.append(["whole epoch", label, f"{len(images) / seconds:.0f}", "", f"{share:.0%}", f"{seconds:.1f}"])
    return [[name, batch, *row] for row in rows]


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--batches", type=int, default=4, help="batches of each contender in a round")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS)[:2])
    parser.add_argument("--compile", action="store_true", help="torch.compile our crafting forward")
    parser.add_argument("--whole", action="store_true", help="run a whole epoch of ours too")
    parser.add_argument("--epoch-images", type=int, default=EPOCH)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for all alike
    torch.backends.cudnn.benchmark = True
    head = measuring.machine(arguments)
    rate = matrix_rate(torch.device(arguments.device))
    print(f"{head}; bf16 matrix products: {rate / 1e12:.3g} TFLOP/s", flush=True)
    rows = []
    for name in arguments.networks:
        for batch in arguments.batch:
            for row in measure(name, batch, arguments, rate):
                rows.append(row)
                print(row, flush=True)
    columns = ["network", "batch", "what", "of", "images/s (quartiles)", "times as fast (quartiles)"]
    speed = measuring.table([*columns, "share of the matrix rate", f"s for {EPOCH:,} images"], rows)
    text = f"PGD-{arguments.steps}. {head}; bf16 matrix products: {rate / 1e12:.3g} TFLOP/s.\n\n{speed}"
    measuring.publish("gpu", text, write=arguments.write)


if __name__ == "__main__":
    main()
