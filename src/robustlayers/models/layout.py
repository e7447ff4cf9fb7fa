"""Where the parts of a network are: stem, stages and head as prefixes of module names, and the base class for it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Layout", "Network"]


@dataclass(frozen=True)
class Layout:
    """The parts of a network from input to output, each a tuple of module-name prefixes.

    A prefix stands for the module of that name and all below it. Together with `normalize`, the prefixes cover every
    tensor of `state_dict()` exactly once. The blocks of a stage are the direct children of its first prefix
    (`layer1.0`, `layer1.1`, ...); further prefixes of a stage are single layers, such as the final norm layer of a
    pre-activation network.

    >>> layout = Layout(stem=("conv1", "bn1"), stages=(("layer1",), ("layer2",)), head=("linear",))
    >>> layout.part_of("layer2.0.conv1.weight")
    'stage(2)'
    >>> layout.part_of("layer10.0.conv1.weight") is None
    True
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the prefixes of each part, in order: `stem`, `stage(1)`, ..., `head`."""
        stages = {f"stage({index})": prefixes for index, prefixes in enumerate(self.stages, start=1)}
        return {"stem": self.stem, **stages, "head": self.head}

    def part_of(self, name: str) -> str | None:
        """Return the part that the module or tensor called `name` belongs to, or None (as for `normalize`)."""
        for part, prefixes in self.parts().items():
            if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
                return part
        return None


class Network(nn.Module):
    """The base class of every architecture here: images in [0, 1] in, logits out, and a layout of its parts."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""

    @abstractmethod
    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, stages and head."""
