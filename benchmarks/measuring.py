"""What the benchmarks share: interleaved rounds, medians with quartiles, checks that contenders do the same, tables.

In each round every contender runs once, in an order that rotates, and ratios are taken round by round: another load on
the machine meets all alike.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.data import load, to_float
from robustlayers.models import build, load_weights

__all__ = [
    "Spread",
    "Task",
    "agree",
    "check",
    "clock_of",
    "half_broken",
    "interleaved",
    "machine",
    "options",
    "pretrained",
    "publish",
    "ratio",
    "robust",
    "spread",
    "synthetic",
    "table",
]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
Craft = Callable[[Tensor, Tensor], Tensor]
"""Images and labels -> adversarial images."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; the quartiles of fewer than two values are the value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Return how many times as fast the second is as the first, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Return each contender's seconds in each round, after a round that warms up and is not counted.

    In round r the order begins with contender r, so none always follows the same one after a pause.
    """
    names = list(contenders)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait(device)
            began = clock()
            contenders[name]()
            _wait(device)
            if number:
                spent[name].append(clock() - began)
    return spent


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# -- what contenders must have in common ----------------------------------------------------------------------------


def check(name: str, x_adv: Tensor, x: Tensor, eps: float) -> None:
    """Raise `ValueError` unless an attack stayed in ball and box, and used the ball up to a thousandth of eps."""
    size = (x_adv.double() - x.double()).abs().max().item()
    low, high = x_adv.min().item(), x_adv.max().item()
    if not (0.999 * eps <= size <= eps + 1e-6 and low >= 0 and high <= 1):
        raise ValueError(f"{name}: linf distance {size:.6g} for eps {eps:.6g}, values from {low:.4g} to {high:.4g}")


def robust(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """Return which images the plain model, in evaluation mode and its own precision, still gets right."""
    with torch.no_grad(), rl.inference(model):
        return model(x_adv).argmax(1) == y


def agree(name: str, mine: Tensor, other: str, theirs: Tensor) -> None:
    """Raise `ValueError` unless two attacks broke equally many of the same images, within three standard errors.

    Of images that only one of two equally strong attacks breaks, each is as likely to be either's (McNemar 1947).
    """
    only_mine, only_theirs = int((~mine & theirs).sum()), int((mine & ~theirs).sum())
    if abs(only_mine - only_theirs) > 3 * (only_mine + only_theirs) ** 0.5:
        raise ValueError(
            f"not equally strong: {only_mine} images are broken by {name} alone, {only_theirs} by {other} alone"
        )


def half_broken(model: nn.Module, x: Tensor, y: Tensor, steps: int = 5) -> float:
    """Return an eps at which PGD leaves about half of the images that are right, found by bisection in log eps."""
    forward = rl.crafting_forward(model)
    right = int(robust(model, x, y).sum())
    low, high = 1e-6, 16 / 255
    eps = (low * high) ** 0.5
    for _ in range(10):
        left = int(robust(model, rl.PGD(rl.Linf(eps), steps=steps, keep="last")(forward, x, y), y).sum())
        if 0.4 * right <= left <= 0.6 * right:
            break
        low, high = (eps, high) if left > right / 2 else (low, eps)
        eps = (low * high) ** 0.5
    return eps


# -- subjects -------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A model in evaluation mode, and images with labels for it."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        n, c, h, w = self.x.shape
        return f"{self.name}, {n} x {c}x{h}x{w}"


def pretrained(data: Path, count: int, device: torch.device) -> Task:
    """Return the pretrained CIFAR ResNet-20 and the first test images of `cifar10-jpeg`."""
    if not (data / "pretrained" / "resnet20.safetensors").exists():
        raise SystemExit(f"{data}: holds no pretrained/resnet20.safetensors; name the folder by --data")
    model = build("resnet", seed=0, depth=20, shortcut="A", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    load_weights(model, data / "pretrained" / "resnet20.safetensors")
    test = load(f"parquet:{data / 'cifar10-jpeg'}").test.first(count)
    return Task("ResNet-20", model.eval().to(device), to_float(test.images).to(device), test.labels.to(device))


def synthetic(
    name: str,
    family: str,
    settings: Mapping[str, int],
    count: int,
    device: torch.device,
    shape: Sequence[int] = (3, 32, 32),
) -> Task:
    """Return a new network with statistics of its own, and random images labeled by its predictions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, *shape, generator=generator).to(device)
    model = build(family, seed=0, **settings).to(device)
    with torch.no_grad():
        model.train()
        model(x)
        model.eval()
        y = model(x).argmax(1)
    return Task(name, model, x, y)


# -- the command line and what is written ----------------------------------------------------------------------------


def options(text: str | None, *, threads: int = 1) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks can be told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.parent.name}/{PAGE.name}")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROBUSTLAYERS_DATA", PAGE.parent.parent.parent / "shared" / "data")),
        help="folder with pretrained/ and cifar10-jpeg/",
    )
    return parser


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    """Return the clock that was asked for; processor time of several threads would be no duration."""
    if arguments.clock == "cpu" and (arguments.threads > 1 or arguments.device != "cpu"):
        raise SystemExit("--clock cpu: measures one thread on the CPU; allowed: with --threads 1 and --device cpu")
    return time.process_time if arguments.clock == "cpu" else time.perf_counter


def machine(arguments: argparse.Namespace) -> str:
    """Return one line about when, on what, and with which settings a table was made."""
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    load_average = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{datetime.date.today().isoformat()}, {where}, {arguments.threads} thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {arguments.rounds} rounds, {arguments.clock} clock{load_average}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(name: str, text: str, *, write: bool, page: Path = PAGE) -> None:
    """Print a section and, if wanted, put it between the marks `<!-- name -->` and `<!-- end name -->` of the page."""
    print(f"\n{text}", flush=True)
    if not write:
        return
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closing, after = rest.partition(end)
    if not (mark and closing):
        raise SystemExit(f"{page}: holds no lines {begin} and {end} to write between")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
