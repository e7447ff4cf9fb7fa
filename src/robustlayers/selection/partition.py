"""Partitions: named selectors bound to one model, total, disjoint and non-empty over every entry of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.selection import Selection
from robustlayers.selection.selectors import resolve

__all__ = ["REST", "Partition"]

REST = "rest"


class Partition:
    """Groups of a model's tensors: `{group: selector}`, where the selector `rest` takes all that the others leave.

    For all groups G_i: no G_i is empty, G_i and G_j share no entry, and their union is every entry of every tensor in
    `model.state_dict()`, buffers included. Otherwise `UserError` lists every fault: the tensors that overlap or are left
    over, or the selector that picks nothing.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    >>> partition = Partition(net, {"norm": "norm", "others": "rest"})
    >>> list(partition["norm"])
    ['1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    >>> partition["others"].parameters
    20
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, str]) -> None:
        self.model = model
        self.selectors = dict(groups)
        self.inventory = Inventory(model)
        self.groups: dict[str, Selection] = self._bind()

    def __getitem__(self, group: str) -> Selection:
        return self.groups[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def group_of(self, tensor: str) -> list[str]:
        """Return the groups that hold entries of the tensor `tensor`: one, or several where it is divided."""
        name = self.inventory.canonical[tensor]
        return [group for group, selection in self.groups.items() if name in selection]

    def _bind(self) -> dict[str, Selection]:
        faults: list[Fault] = []
        rests = [group for group, selector in self.selectors.items() if selector.strip() == REST]
        if not self.selectors:
            raise UserError("a partition needs at least one group")
        if len(rests) > 1:
            faults.append(Fault(f"'rest' is given to {len(rests)} groups: {', '.join(rests)}", path=rests[1]))
        found: dict[str, Selection] = {}
        for group, selector in self.selectors.items():
            if group in rests:
                continue
            try:
                found[group] = resolve(self.inventory, selector)
            except UserError as error:
                faults += [fault.at(path=group) for fault in error.faults]
        if faults:
            raise UserError(faults)
        taken = Selection(self.inventory, {})
        owners: dict[str, Selection] = {}
        for group, selection in found.items():
            if selection & taken:
                for other, earlier in owners.items():
                    both = selection & earlier
                    if both:
                        faults.append(Fault(f"overlaps with group {other!r}: {_listed(list(both))}", path=group))
            taken = taken | selection
            owners[group] = selection
        left = ~taken
        if rests and not left:
            faults.append(Fault("picks nothing: the other groups hold every tensor already", path=rests[0]))
        elif not rests and left:
            faults.append(
                Fault(
                    f"groups leave out {_listed(list(left))}; add them, or a group 'rest', to say what they learn from"
                )
            )
        if faults:
            raise UserError(faults)
        return {group: left if group in rests else found[group] for group in self.selectors}


def _listed(names: list[str], most: int = 4) -> str:
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text
