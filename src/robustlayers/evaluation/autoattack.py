"""AutoAttack that can be stopped: four attacks in turn, each on the images that the ones before have not broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from robustlayers.attacks import APGD, FAB, NamedAttack, Square, TargetedAPGD, Threat, label
from robustlayers.evaluation._still import Forward, check_classes, check_labels, check_logits, device_of, images, still
from robustlayers.evaluation.cascade import Moment, Outcome, cascade

__all__ = ["autoattack", "autoattack_label", "standard"]

_TARGETS = 9
_NAMES = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square-5000": "Square"}


def autoattack(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    *,
    threat: Threat,
    directory: Path | str | None = None,
    steps: int = 100,
    targets: int = _TARGETS,
    queries: int = 5000,
    whole: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[Moment], None] | None = None,
) -> Outcome:
    """Evaluate by AutoAttack (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T and Square, each on what is still right.

    `forward`: an `nn.Module`, evaluated in evaluation mode with norm layers by running statistics and left without a
    trace, or a function from images to logits; `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n].
    Attacks on a module see an equivalent with norm layers folded away, which costs less; every verdict is that of the
    module itself. Each batch is checked against ball and box, and at the end the final images are judged once more.

    With a `directory`, what a batch has found is kept there: a process that is killed loses one batch of one attack, and
    the same call goes on from there to the same result. An image's random draws depend on `seed` and the image alone, so
    neither `batch_size` (chosen by the device unless given) nor the order or choice of the images changes its verdict.

    The outcome's label is `AutoAttack` only for the standard: all four attacks with `steps` 100, `targets` 9 and `queries`
    5000, on a `whole` test set, as the caller says. Otherwise it says what ran: `APGD-CE+T+FAB-T+Square, n=500`. Square is
    left out in l1; with fewer than four classes APGD-T takes the margin as its loss.

    Raises `UserError` for images outside [0, 1] and for a directory that holds another evaluation.

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> with torch.no_grad():
    ...     _ = net[1].weight.copy_(torch.eye(3, 4)), net[1].bias.zero_()
    >>> x, y = torch.tensor([[[[0.9, 0.1], [0.2, 0.5]]], [[[0.4, 0.5], [0.3, 0.5]]]]), torch.tensor([0, 1])
    >>> outcome = autoattack(net, x, y, threat=Threat("linf", 0.1), steps=5, queries=20)
    >>> outcome.clean.tolist(), outcome.robust.tolist(), outcome.broken_by
    ([True, True], [True, False], ('', 'apgd-ce-5'))
    """
    check_labels(x, y)
    attacks, notes = standard(threat, _classes(forward, x, y), steps=steps, targets=targets, queries=queries)
    return cascade(
        forward,
        x,
        y,
        attacks,
        directory=directory,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        label=autoattack_label(attacks, len(x), whole=whole),
        notes=notes,
    )


def standard(
    threat: Threat, classes: int = 10, *, steps: int = 100, targets: int = _TARGETS, queries: int = 5000
) -> tuple[dict[str, NamedAttack], tuple[str, ...]]:
    """Return the attacks of AutoAttack in their order, by short name, and a note on each that has to be left out.

    >>> list(standard(Threat("l1", 12))[0])[:2]
    ['apgd-ce', 'apgd-t']
    """
    attacks: list[NamedAttack] = [
        APGD(threat, steps, "ce", early_exit=True),
        TargetedAPGD(threat, steps, targets, "dlr" if classes >= 4 else "margin"),
        FAB(threat, steps, targets),
    ]
    notes = []
    if threat.norm == "l1":
        notes.append("square is left out: it is not offered for l1")
    else:
        attacks.append(Square(threat, queries))
    return {label(attack): attack for attack in attacks}, tuple(notes)


def autoattack_label(attacks: Mapping[str, NamedAttack], images: int, *, whole: bool) -> str:
    """Return `AutoAttack` for the standard on a whole test set; otherwise what ran, and on how many images.

    >>> attacks, _ = standard(Threat("linf", "8/255"))
    >>> _ = attacks.pop("fab-t")
    >>> autoattack_label(attacks, 500, whole=False)
    'APGD-CE+T+Square, n=500'
    """
    names = list(attacks)
    targets = {name: getattr(attack, "targets", _TARGETS) for name, attack in attacks.items()}
    if whole and names == list(_NAMES) and set(targets.values()) == {_TARGETS}:
        return "AutoAttack"
    parts: list[str] = []
    for name, number in targets.items():
        if number != _TARGETS:
            parts.append(f"{name} ({number} target{'s' if number > 1 else ''})")
        elif name == "apgd-t" and parts == ["APGD-CE"]:
            parts.append("T")
        else:
            parts.append(_NAMES.get(name, name))
    return f"{'+'.join(parts)}, n={images}"


def _classes(forward: Forward, x: Tensor, y: Tensor) -> int:
    device = device_of(forward, x)
    with still(forward, device), torch.no_grad():
        logits = check_logits(forward(images(x[:1], device)), y[:1])
    check_classes(y, logits.shape[1])
    return logits.shape[1]
