"""`robustlayers presets`: the published experiments that a study can name, and what one of them expands to."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

__all__ = ["presets"]


def presets(
    name: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help="what to expand; all are listed unless given")
    ] = "",
    options: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="NAME=VALUE", help="its options, as in code=A1N2 cut=layer2.1.bn1 part.optimizer.lr=0.01"
        ),
    ] = (),
) -> int:
    """List the presets that `phases` of a study can name, or print the plain phases that one of them makes."""
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.study.patches import apply
    from robustlayers.study.presets import expand, preset_lines, preset_text
    from robustlayers.study.yaml import parse_value, path_text

    if not name:
        lines = preset_lines()
        width = max(map(len, lines))
        for preset, line in lines.items():
            print(f"{preset:<{width}}  {line}")
        print(
            "Each also takes epochs, settings of all phases, and of one by its name: all.attack=pgd-7 part.optimizer.lr=0.01"
        )
        return 0
    given: dict[str, Any] = {}
    faults: list[Fault] = []
    for text in options:
        path, equals, value = text.partition("=")
        try:
            if not equals:
                raise UserError(Fault(f"{text!r} is not NAME=VALUE, such as epochs=5", path=name))
            given = apply(given, path.strip(), parse_value(value, path.strip()), where=path.strip())
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults)
    try:
        expanded = expand({"phases": {name: given}})
    except UserError as error:
        start = path_text(("phases", name))
        below = [(fault.path or "").removeprefix(start).removeprefix(".") for fault in error.faults]
        raise UserError(
            [Fault(fault.message, path=path) for fault, path in zip(error.faults, below, strict=True)]
        ) from None
    print(preset_text(expanded), end="")
    return 0
