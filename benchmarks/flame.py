"""Where does a step of adversarial training spend its time? Shares by kind of operation, and a flame graph.

One step of PGD and update on the pretrained ResNet-20 is recorded by `torch.profiler`; operations count with the time that
is their own, without that of the operations they call. What lies between operations is Python and autograd's engine.
The graph shows the calls from the bottom up, the same ones side by side put together, as wide as they take long:

    python benchmarks/flame.py --crafting auto --write
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import measuring
import torch
from torch.profiler import ProfilerActivity, profile

import robustlayers as rl
from robustlayers.core.files import write_text

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize")
KINDS = {  # by the beginning of an operation's name, the first that fits
    "convolution, forward": ("aten::mkldnn_convolution", "aten::convolution", "aten::_convolution", "aten::conv"),
    "convolution, backward": ("aten::convolution_backward", "ConvolutionBackward"),
    "normalization": ("aten::native_batch_norm", "aten::batch_norm", "aten::_batch_norm", "NativeBatchNorm", "aten::addcmul"),
    "ReLU": ("aten::relu", "aten::clamp_min", "aten::threshold_backward", "Relu"),
    "the head and the loss": ("aten::addmm", "aten::mm", "aten::linear", "aten::mean", "aten::_log_softmax", "aten::nll"),
    "additions of branches and gradients": ("aten::add",),
    "allocation, copies, layout": (
        "aten::empty", "aten::copy_", "aten::fill_", "aten::clone", "aten::_to_copy", "aten::to", "aten::resize_",
        "aten::as_strided", "aten::slice", "aten::zero", "aten::contiguous", "aten::pad", "aten::constant_pad",
    ),
    "steps of the attack": ("aten::sign", "aten::clamp", "aten::mul", "aten::sub", "aten::aminmax", "aten::uniform"),
    "optimizer": ("aten::_foreach", "Optimizer"),
}  # fmt: skip


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    name = name.removeprefix("autograd::engine::evaluate_function: ")
    for kind, beginnings in KINDS.items():
        # The longest fitting beginning would be safer, but only convolution has one within another.
        if name.startswith(beginnings) and not (kind == "convolution, forward" and "backward" in name):
            return kind
    return "everything else"


@dataclass
class Frame:
    """A call path with its time, and the paths that go on from it."""

    microseconds: float = 0.0
    within: dict[str, Frame] = field(default_factory=lambda: defaultdict(Frame))

    def add(self, events: Iterable[Any]) -> None:
        for event in events:
            frame = self.within[event.name]
            frame.microseconds += event.cpu_time_total
            frame.add(event.cpu_children)


def svg(root: Frame, width: int = 1200, height: int = 16) -> str:
    """Return the flame graph; frames below a pixel are left out."""
    shapes: list[str] = []
    deepest = 0

    def draw(frame: Frame, left: float, level: int) -> None:
        nonlocal deepest
        for name, inner in sorted(frame.within.items()):
            wide = inner.microseconds / root.microseconds * width
            if wide >= 1:
                deepest = max(deepest, level)
                hue = 30 + sum(map(ord, kind_of(name))) % 180
                short = name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")
                text = f'<text x="{left + 3:.1f}" y="{12 - level * height}">{escape(short[: int(wide / 6.5)])}</text>'
                share = f"{inner.microseconds / 1e3:.1f} ms, {inner.microseconds / root.microseconds:.1%}"
                title = f"<title>{escape(name)}: {share}</title>"
                place = f'x="{left:.1f}" y="{-level * height}" width="{wide:.1f}" height="{height - 1}"'
                box = f'<rect {place} fill="hsl({hue} 60% 75%)"/>'
                shapes.append(f"<g>{title}{box}{text if wide > 20 else ''}</g>")
                draw(inner, left, level + 1)
            left += wide

    draw(root, 0.0, 0)
    top = -deepest * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {width} {height - top}" '
        f'font-family="monospace" font-size="10">\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def main() -> None:
    """Record, print and draw."""
    parser = measuring.options(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--crafting", choices=("fp32", "bf16", "auto"), default="auto")
    parser.add_argument("--svg", type=Path, default=measuring.PAGE.parent / "flame.svg", help="written with --write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = measuring.pretrained(arguments.data, arguments.images, torch.device(arguments.device))
    model = task.model.requires_grad_(True)
    step = rl.PartialStep(
        model,
        rl.Partition(model, {"all": "all"}),
        {"all": "adversarial"},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.001),
        attack=rl.PGD(rl.Linf("8/255"), steps=arguments.steps, step_size="2/255", keep="last"),
        crafting=arguments.crafting,
    )
    step(task.x, task.y)
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(task.x, task.y)
    seconds = time.perf_counter() - began
    events = recorded.events() or []
    own: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    waits = 0
    root = Frame()
    for event in events:
        own[kind_of(event.name)] += event.self_cpu_time_total
        calls[kind_of(event.name)] += 1
        waits += event.name in WAITS
    root.add(event for event in events if event.cpu_parent is None)
    root.microseconds = sum(frame.microseconds for frame in root.within.values())
    own["between operations"] = max(0.0, 1e6 * seconds - sum(own.values()))
    total = sum(own.values())
    rows = [
        [kind, f"{spent / total:.1%}", f"{spent / 1e3:.0f}", calls[kind] or ""]
        for kind, spent in sorted(own.items(), key=lambda item: -item[1])
    ]
    chosen = f" ({step.choice.name})" if step.choice else ""
    text = (
        f"One step, PGD-{arguments.steps} and update, {task}, crafting {arguments.crafting}{chosen}, under the profiler. "
        f"{measuring.machine(arguments)}\n\n{measuring.table(['kind', 'share', 'ms', 'operations'], rows)}\n\n"
        f"Waits for a value on the host in the whole step: {waits}."
    )
    if arguments.write:
        write_text(arguments.svg, svg(root))
        text += f"\n\n![Flame graph of one step]({arguments.svg.name})"
    measuring.publish("flame", text, write=arguments.write)


if __name__ == "__main__":
    main()
