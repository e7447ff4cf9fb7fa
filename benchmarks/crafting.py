"""How much cheaper is the crafting forward? PGD on the plain model in evaluation mode against PGD on the folded one.

Rounds of both follow each other in turn, and the ratio is taken round by round, so that another load on the machine meets
both alike. Prints a Markdown table of medians:

    python benchmarks/crafting.py --threads 1 --rounds 7
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.models import build
from robustlayers.normalization.fold import crafting_forward

CASES: dict[str, tuple[str, dict[str, int], int, tuple[int, int, int]]] = {
    "ResNet-20 w16, 128 x 3x32x32": ("resnet", {"depth": 20, "width": 16}, 128, (3, 32, 32)),
    "ResNet-8 w16 stem stride 2, 128 x 1x28x28": (
        "resnet",
        {"depth": 8, "width": 16, "stem_stride": 2, "channels": 1},
        128,
        (1, 28, 28),
    ),
    "PreAct ResNet-18 w64, 16 x 3x32x32": ("preact-resnet", {"depth": 18, "width": 64}, 16, (3, 32, 32)),
}


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the time of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def measure(
    name: str, rounds: int, steps: int, device: torch.device, layouts: dict[str, bool], clock: Callable[[], float]
) -> list[str]:
    """Return the rows of one network: seconds of plain crafting, and for each layout those of the folded one."""
    family, options, count, shape = CASES[name]
    model = build(family, seed=0, **options).to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, *shape, generator=generator).to(device)
    y = torch.randint(10, (count,), generator=generator).to(device)
    attack = rl.PGD(rl.Linf("8/255"), steps=steps, step_size="2/255")
    forwards = {layout: crafting_forward(model, channels_last=choice) for layout, choice in layouts.items()}

    def craft(forward: Callable[[Tensor], Tensor] | nn.Module) -> Callable[[], Tensor]:
        return lambda: attack(forward, x, y)

    plain: list[float] = []
    folded: dict[str, list[float]] = {layout: [] for layout in layouts}
    refresh: list[float] = []
    for number in range(rounds + 1):
        times = {"": seconds(craft(model), device, clock)}
        for layout, forward in forwards.items():
            refreshed = seconds(forward.refresh, device, clock)
            times[layout] = refreshed + seconds(craft(forward), device, clock)
            if number:
                refresh.append(refreshed)
        if number:  # the first round warms up
            plain.append(times[""])
            for layout in layouts:
                folded[layout].append(times[layout])
    rows = []
    for layout, spent in folded.items():
        ratios = sorted(p / f for p, f in zip(plain, spent, strict=True))
        rows.append(
            f"| {name} | {layout} | {statistics.median(plain):.3f} | {statistics.median(spent):.3f} "
            f"| {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"| {1e3 * statistics.median(refresh):.2f} |"
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layouts", action="store_true", help="measure channels-last too")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    layouts = {"contiguous": False}
    if arguments.layouts:
        layouts["channels-last"] = True
    print(
        f"PGD-{arguments.steps}, {arguments.rounds} rounds, {arguments.threads} thread(s), torch {torch.__version__}, "
        f"{platform.machine()}, {device}, {arguments.clock} clock\n"
    )
    print("| network, batch | layout | plain, s | folded, s | plain / folded | range | refresh, ms |")
    print("|---|---|---|---|---|---|---|")
    for name in CASES:
        for row in measure(name, arguments.rounds, arguments.steps, device, layouts, clock):
            print(row, flush=True)


if __name__ == "__main__":
    main()
