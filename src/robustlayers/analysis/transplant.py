"""Transplants: groups of one net put into another, and back, to see which of them carries robustness or accuracy.

If a natural net with the first layers of a robust one becomes robust, robustness sits in these layers. Weights, scale and
shift, and running statistics are groups of their own: `PARTS`, or `{"stem": "stem - norm", "its norm": "stem & norm"}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new, ink_on
from robustlayers.analysis._ground import KEPT, Bench, Group, Groups, bind_groups, finite_row, put_back
from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation import Progress
from robustlayers.training import copy_entries, snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PARTS", "TransplantRow", "Transplants", "transplant"]

PARTS = {"weights": "~norm", "affine": "norm.affine", "statistics": "norm.statistics"}
"""Groups by kind of tensor: weights of convolutions and linear layers, scales and shifts, running statistics."""

NOTHING, EVERYTHING = "nothing", "everything"


@dataclass(frozen=True)
class TransplantRow:
    """The host with one group of the donor; accuracies in [0, 1], losses in nats, robust ones None without an attack.

    The groups `nothing` and `everything` are the host and the donor themselves.
    """

    host: str
    donor: str
    group: str
    statistics: str
    parameters: int
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float | None
    robust_loss: float | None


@dataclass(frozen=True)
class Transplants:
    """The matrix of qualities: both nets as hosts, each with one group of the other.

    How to read it: read a column down from `nothing`, the host itself, to `everything`, the donor. A group whose row is
    near the donor's carries what sets the nets apart; a row at chance is a group that fits its own net only.
    """

    names: tuple[str, str]
    results: tuple[TransplantRow, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each host, group and treatment of statistics; what is not finite is None."""
        return [finite_row(asdict(row)) for row in self.results]

    def row(self, host: str, group: str, statistics: str = KEPT) -> TransplantRow:
        """Return one row; unknown names are a `UserError`."""
        for what, value in (("host", host), ("group", group), ("statistics", statistics)):
            allowed = {getattr(row, what) for row in self.results}
            if value not in allowed:
                raise UserError(one_of(what, value, allowed))
        return next(row for row in self.results if (row.host, row.group, row.statistics) == (host, group, statistics))

    def plot(self, axes: Axes | None = None, *, statistics: str = KEPT) -> Axes:
        """Draw the accuracies in percent as a table of shades: a row for each group, a column for each host and kind."""
        groups = list(dict.fromkeys(row.group for row in self.results))
        kinds = ["clean_accuracy"]
        if all(row.robust_accuracy is not None for row in self.results):
            kinds.append("robust_accuracy")
        columns = [(host, kind) for host in self.names for kind in kinds]
        cells = [[100 * getattr(self.row(host, group, statistics), kind) for host, kind in columns] for group in groups]
        axes = axes_or_new(axes, 1.8 + 0.95 * len(columns), 1.2 + 0.26 * len(groups))
        axes.imshow(cells, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for place, row in enumerate(cells):
            for column, value in enumerate(row):
                ink = ink_on(value / 100)
                axes.text(column, place, f"{value:.1f}", ha="center", va="center", color=ink, fontsize="small")
        axes.set_xticks(range(len(columns)), [kind.removesuffix("_accuracy") for _, kind in columns])
        middles = [place * len(kinds) + (len(kinds) - 1) / 2 for place in range(len(self.names))]
        axes.set_xticks([middle + 1e-3 for middle in middles], [f"\nin {name}" for name in self.names], minor=True)
        axes.tick_params(axis="x", which="minor", length=0)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylabel("group from the other net")
        axes.set_title("accuracy, %", fontsize="medium")
        return axes


def transplant(
    one: nn.Module,
    other: nn.Module,
    groups: Groups,
    x: Tensor,
    y: Tensor,
    *,
    names: Sequence[str] = ("one", "other"),
    attack: Attack | None = None,
    recalibrate_on: Tensor | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Transplants:
    """Return the clean and robust quality of each net with each group of the other, and of both nets themselves.

    Args:
        one: a net, such as a robust one; other: a net with tensors of the same names and shapes, such as a natural one.
            Both are left bit for bit as they were.
        groups: `{name: selector}`, or a selector that is taken apart by module; resolved on each net for itself.
        x: images [n, c, h, w], uint8 or float in [0, 1]; y: integer labels [n].
        names: what the two nets are called, such as `("robust", "natural")`.
        attack: run anew against every net that results; None leaves out the robust numbers.
        recalibrate_on: training images. If given, every net is measured a second time with all running statistics
            estimated anew on them: otherwise a transplant also fails where its inputs are merely scaled otherwise. They
            are used without an attack, so a net whose statistics were tracked on adversarial images changes too; compare
            with its own re-estimated row `nothing`.
        seed: of the attack's draws, the same for every net.

    Cost: two evaluations for each group and two for the nets, twice that with `recalibrate_on`.

    Raises `UserError` for wrong selectors and names, and for nets that do not fit each other.
    """
    hosts = {str(name): net for name, net in zip(names, (one, other), strict=False)}
    if len(names) != 2 or len(hosts) != 2:
        raise UserError(f"names: {list(names)} is not allowed; allowed: two names that differ")
    named = {host: bind_groups(net, groups, x[:2]) for host, net in hosts.items()}
    taken = [group for group in (NOTHING, EVERYTHING) if group in named[names[0]]]
    if taken:
        raise UserError(f"a group must not be called {taken[0]!r}: the result has a row of that name")
    states = {host: snapshot(net) for host, net in hosts.items()}
    pairs = [(host, donor) for host in hosts for donor in hosts if donor != host]
    for host, donor in pairs:
        for group in named[host].values():
            with put_back(hosts[host]):
                _receive(group, states[donor], donor)
    bench = Bench(
        x,
        y,
        attack,
        recalibrate_on=recalibrate_on,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        changes=sum(len(found) + 1 for found in named.values()),
    )
    whole = {host: bench.changed(net, host, lambda: None) for host, net in hosts.items()}
    results = []
    for host, donor in pairs:
        found = {NOTHING: (0, whole[host])}
        for name, group in named[host].items():
            quality = bench.changed(
                hosts[host], f"{name} of {donor} in {host}", partial(_receive, group, states[donor], donor)
            )
            found[name] = (group.selection.parameters, quality)
        found[EVERYTHING] = (sum(p.numel() for p in hosts[donor].parameters()), whole[donor])
        results += [
            TransplantRow(host, donor, name, kind, parameters, **asdict(quality))
            for name, (parameters, qualities) in found.items()
            for kind, quality in qualities.items()
        ]
    return Transplants((str(names[0]), str(names[1])), tuple(results))


def _receive(group: Group, state: dict[str, Tensor], donor: str) -> None:
    copy_entries(group.selection, state, donor, strict=True)
