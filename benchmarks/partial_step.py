"""What does a step cost in which only a part of the network learns? Seconds against the full step, and gradients computed.

Steps of all parts follow each other in turn. Gradients are counted as torch computes them: `convolution_backward` and the
backward passes of norm layers say by their output mask whether they make a gradient of the input, the weight, or both:

    python benchmarks/partial_step.py --threads 2 --write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import measuring
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustlayers as rl
from robustlayers.models import build
from robustlayers.selection import Partition
from robustlayers.training import PartialStep

CASES: dict[str, tuple[str, dict[str, int], int, tuple[int, int, int]]] = {
    "ResNet-20 w16, 128 x 3x32x32": ("resnet", {"depth": 20, "width": 16}, 128, (3, 32, 32)),
    "PreAct ResNet-18 w16, 64 x 3x32x32": ("preact-resnet", {"depth": 18, "width": 16}, 64, (3, 32, 32)),
}
PARTS = {
    "everything": "all",
    "BatchNorm": "norm",
    "last stage and head": "",
    "head": "head",
    "statistics": "norm.statistics",
}
LAST = {"resnet": "stage(3) | head", "preact-resnet": "stage(4) | head"}


class Counts(NamedTuple):
    """What the backward passes of convolutions, linear and norm layers computed."""

    weights: int  # gradients of a weight or a scale
    inputs: int  # gradients of a layer's input


class Backwards(TorchDispatchMode):
    """Counts the gradients that backward passes of layers compute while it is active, crafting included.

    Linear layers have no backward operation of their own: theirs are matrix products `mm`, told apart by their shapes (the
    forward pass comes as `addmm`). So a batch of inputs or outputs must not have the shape of a weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.linear = {shape for m in model.modules() if isinstance(m, nn.Linear) for shape in _both(m)}
        self.weights = self.inputs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        if "output_mask" in names:
            place = names.index("output_mask")
            mask = args[place] if place < len(args) else (kwargs or {})["output_mask"]
            self.inputs += bool(mask[0])
            self.weights += bool(mask[1])
        elif func is torch.ops.aten.mm.default:
            weight = tuple(result.shape) in self.linear
            self.weights += weight
            self.inputs += not weight
        return result


def _both(layer: nn.Linear) -> tuple[tuple[int, int], tuple[int, int]]:
    return (layer.out_features, layer.in_features), (layer.in_features, layer.out_features)


def count(model: nn.Module, run: Callable[[], object]) -> Counts:
    """Return what the backward passes of one call computed."""
    mode = Backwards(model)
    with mode:
        run()
    return Counts(mode.weights, mode.inputs)


def make_step(model: nn.Module, part: str, objective: str, steps: int) -> PartialStep:
    """Return a step in which a part learns from an objective and the rest is frozen; statistics with their layers."""
    groups = {"part": part} if part == "all" else {"part": part, "others": "rest"}
    return PartialStep(
        model,
        Partition(model, groups),
        {group: objective if group == "part" else "frozen" for group in groups},
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-6),
        attack=rl.PGD(rl.Linf("8/255"), steps=steps, step_size="2/255", keep="last"),
    )


def measure(
    name: str, objective: str, steps: int, rounds: int, clock: Callable[[], float], device: torch.device
) -> list[list[object]]:
    """Return the rows of one network and objective."""
    family, options, size, shape = CASES[name]
    model = build(family, seed=0, **options).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, *shape, generator=generator).to(device)
    y = torch.randint(10, (size,), generator=generator).to(device)

    def once(part: str) -> Callable[[], object]:
        step = make_step(model, PARTS[part] or LAST[family], objective, steps)
        return lambda: step(x, y)

    runs = {part: once(part) for part in PARTS}
    spent = measuring.interleaved(runs, rounds, clock, device)
    rows: list[list[object]] = []
    for part, run in runs.items():
        share = measuring.ratio(spent[part], spent["everything"])
        rows.append([name, objective, part, measuring.spread(spent[part]).text(3), share.text(), *count(model, run)])
    return rows


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of PGD, where the objective is adversarial")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, clock = torch.device(arguments.device), measuring.clock_of(arguments)
    head = measuring.machine(arguments)
    print(head, flush=True)
    rows = []
    for name in CASES:
        for objective in ("natural", "adversarial"):
            rows += measure(name, objective, arguments.steps, arguments.rounds, clock, device)
            print(rows[-1], flush=True)
    columns = ["network, batch", "objective", "what learns", "s (quartiles)", "of everything (quartiles)"]
    text = measuring.table([*columns, "weight gradients", "input gradients"], rows)
    measuring.publish("partial step", f"adversarial: PGD-{arguments.steps}. {head}\n\n{text}", write=arguments.write)


if __name__ == "__main__":
    main()
