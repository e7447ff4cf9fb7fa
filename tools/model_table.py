"""Make `docs/models.md`: every architecture, its options, and the share of its parameters that norm layers have.

    python tools/model_table.py [--to FILE] [--check]

Everything in it is computed from the networks themselves, built without memory for their weights. `--check` writes
nothing and exits with 1 where the file is not what it would be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from robustlayers import models
from robustlayers.core.files import write_bytes
from robustlayers.selection import norm_layers

TARGET = Path(__file__).parents[1] / "docs/models.md"

# Rows of the first table: architecture, options that are not the default, what it is known as.
ROWS: list[tuple[str, dict[str, Any], str]] = [
    *(("resnet", {"depth": depth}, f"ResNet-{depth}") for depth in (14, 20, 32, 44, 56, 110)),
    *(("resnet", {"depth": 14, "width": width}, f"ResNet-14, width {width}") for width in (32, 64, 128)),
    *(("resnet", {"depth": depth, "shortcut": "B"}, f"ResNet-{depth}, shortcut B") for depth in (14, 20, 110)),
    ("resnet18", {}, "ResNet-18"),
    ("resnet34", {}, "ResNet-34"),
    ("resnet50", {}, "ResNet-50"),
    *((f"resnet{n}", {"stem": "imagenet", "classes": 1000}, f"ResNet-{n}, ImageNet") for n in (18, 34, 50)),
    *(("preact-resnet", {"depth": depth}, f"PreActResNet-{depth}") for depth in (18, 34)),
    *(("wide-resnet", {"depth": d, "widen": w}, f"WRN-{d}-{w}") for d, w in ((28, 4), (28, 10), (34, 10), (34, 20))),
    ("vgg", {"depth": 11}, "VGG-11-BN"),
    ("vgg", {"depth": 16}, "VGG-16-BN"),
    ("vgg", {"depth": 16, "norm": "none"}, "VGG-16"),
    ("small-cnn", {}, "small CNN"),
    ("mlp", {}, "MLP, 3 hidden layers of 256"),
    *(("nf-resnet", {"depth": depth}, f"NF-ResNet-{depth}") for depth in (18, 26, 50)),
    *(("fixup-resnet", {"depth": depth}, f"Fixup ResNet-{depth}") for depth in (20, 110)),
]

HEAD = """\
# Models

<!-- made by tools/model_table.py; do not edit -->

`model: {name: resnet18, norm: batch}` in a study, `models.build("resnet18", norm="batch")` in Python. Every model has its
input normalization inside, takes images of any number of channels, and knows its stem, stages, blocks and head, so that
`stem`, `stage(2)`, `block(2, 1)` and `head` select the corresponding parts of each.

## How much of a model its norm layers are

Parameters of norm layers (scale and shift) in 100 parameters, for batch norm and 10 classes on three channels unless the
row says otherwise. Running statistics are no parameters. Per block of width w there are about 4 w of them beside 18 w^2
weights of convolutions, so the share falls with the width and hardly depends on the depth.

"""

ABOVE = """
"Under 0.2 %", as is often said, holds for {under} of the {all} models with norm layers above, and not for {names}.
"""

BETWEEN = """
NF-ResNet and Fixup have no norm layers. What does their work is elsewhere: in an NF-ResNet a gain and a bias for each
channel of each convolution, together as many as scale and shift in the ResNet of the same shape; in a Fixup ResNet five
scalars in each block and two more (`type(Shift) | type(Scale)`), which its authors train at a tenth of the learning rate.

ResNet-18, 34 and 50 are models of their own and no depths of `resnet`, since 50 = 6 * 8 + 2 is a depth of that family of
6n+2 layers too. With `stem: imagenet` they are torchvision's networks, tensors called the same, so its weights load (give
its `mean` and `std`). A VGG's stem is its first run of convolutions, before the first pooling; an MLP's is its first hidden
layer.

## Options

"""

TAIL = """
All models: `classes` (10), `channels` (3), `mean` and `std` of the input normalization (0.5, a number or one for each
channel). In a study, `classes` and `channels` come from the data. All but `mlp`: `stem_stride` (1), the stride of the first
convolution; 2 makes a quarter of the pixels. All but `nf-resnet` and `fixup-resnet`: `norm` (`batch`).
"""

COMMON = ("classes", "channels", "mean", "std", "stem_stride", "norm")


def counted(name: str, options: dict[str, Any]) -> tuple[int, int, int]:
    """Return (norm layers, their parameters, all parameters) of a model."""
    with torch.device("meta"):
        model = models.build(name, **options)
    norms = norm_layers(model)
    owned = {id(parameter): parameter for layer in norms.values() for parameter in layer.parameters()}
    return len(norms), sum(p.numel() for p in owned.values()), sum(p.numel() for p in model.parameters())


def shares() -> Iterator[str]:
    """Yield the lines of the first table, and what follows from it."""
    yield "| model | `name` and options | parameters | norm layers | their parameters | share |"
    yield "|---|---|--:|--:|--:|--:|"
    above, normalized = [], 0
    for name, options, known_as in ROWS:
        layers, norm, total = counted(name, options)
        normalized += layers > 0
        if norm / total >= 0.002:
            above.append(known_as)
        written = ", ".join([name, *(f"{key}: {value}" for key, value in options.items())])
        yield f"| {known_as} | `{written}` | {total:,} | {layers} | {norm:,} | {100 * norm / total:.3f} % |"
    yield ABOVE.format(under=normalized - len(above), all=normalized, names="; ".join(above)).rstrip()


def options_table() -> Iterator[str]:
    """Yield the lines of the second table: the options that not every model has."""
    yield "| `name` | option | default | allowed |"
    yield "|---|---|---|---|"
    for name in models.names():
        for key, option in models.options_of(name).items():
            if key not in COMMON:
                yield f"| `{name}` | `{key}` | {option.default} | {option.allowed()} |"


def document() -> str:
    """Return the whole file."""
    return HEAD + "\n".join(shares()) + "\n" + BETWEEN + "\n".join(options_table()) + "\n" + TAIL


def main() -> int:
    """Write the file, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=TARGET, help="the file to write")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    arguments = parser.parse_args()
    content = document().encode()
    if arguments.check:
        current = arguments.to.is_file() and arguments.to.read_bytes() == content
        print(f"{arguments.to}: {'as it should be' if current else 'out of date; run tools/model_table.py'}")
        return 0 if current else 1
    write_bytes(arguments.to, content)
    print(f"{arguments.to}: {len(ROWS)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
