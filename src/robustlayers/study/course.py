"""How far a measurement is: its parts in their order, weighed by the passes that they cost, so that time left can be told."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from robustlayers.evaluation import Progress

__all__ = ["Course", "turn_of_sanity"]

Part = tuple[str, str]
"""Of what, and what is measured there: ("best", "sanity")."""


class Course:
    """Parts one after another, and the share of all that is done: it never falls, nor goes beyond 1.

    Args:
        tell: called as `tell(what, done, of, share)`; `share` in [0, 1] is of all parts.
        sizes: part -> passes of single images that it costs, in the order in which they are done.
    """

    def __init__(self, tell: Callable[[str, int, int, float], None], sizes: Mapping[Part, float]) -> None:
        self._tell, self._sizes = tell, dict(sizes)
        self._all = max(1.0, sum(self._sizes.values()))
        self.share = 0.0

    def part(self, of: str, name: str, weigh: Callable[[str], float] | None = None, *, prefix: str = "") -> Progress:
        """Begin a part, and return what is to be called while it is done; what stands before it is over.

        `weigh`: the passes behind each text that will be told of; without it there is one, and it is the whole part.
        `prefix`: of these texts when they are told on.
        """
        places = list(self._sizes)
        before = sum(self._sizes[part] for part in places[: places.index((of, name))])
        size = self._sizes[of, name]
        reached: dict[str, float] = {}

        def progress(what: str, done: int, total: int) -> None:
            weight = size if weigh is None else weigh(what)
            reached[what] = max(reached.get(what, 0.0), weight * min(1.0, done / max(1, total)))
            share = (before + min(size, sum(reached.values()))) / self._all
            self.share = max(self.share, min(1.0, share))
            self._tell(f"{of}, {prefix}{what}" if of else prefix + what, done, total, self.share)

        return progress


def turn_of_sanity(name: str) -> int:
    """Return the passes that an image costs in one of the attacks of `sanity`, from the name that it tells.

    >>> [turn_of_sanity(name) for name in ("clean", "pgd-margin-20", "pgd-40 at 0.5", "square-1000", "fgsm")]
    [1, 41, 81, 1001, 3]
    """
    number = re.search(r"-(\d+)", name)
    if number is None:
        return 1 if name == "clean" else 3
    return 1 + int(number[1]) * (1 if name.startswith("square") else 2)
