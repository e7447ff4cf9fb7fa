"""`robustlayers verify`: compare every finished result of a study, or of an evaluation, with what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["verify"]


def verify(
    folder: Annotated[
        Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="the folder of a study, or of `evaluate --out`")
    ],
) -> int:
    """Check sizes and SHA-256 of every finished file, and an evaluation's rows; a line for each fault; exit 1 if any is."""
    from robustlayers.cli.kept import is_evaluation, verify_evaluation
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.core.files import MANIFEST, verify_manifest

    study = (folder / "plan.json").exists()
    if not study and not is_evaluation(folder):
        text = "no study here: it has no plan.json; and no evaluation: it has no result.json"
        raise UserError(Fault(text, file=str(folder)))
    if not study:
        faults, said = verify_evaluation(folder)
        for fault in faults:
            print(fault)
        print(f"evaluation: {said}, {len(faults)} fault(s)")
        return 1 if faults else 0
    # Results that were damaged are set aside under other names and made again: they are not looked at.
    patterns = (f"*/*/seed-*/{MANIFEST}", f"analyses/*/*/{MANIFEST}")
    found = (path.parent for pattern in patterns for path in folder.glob(pattern))
    finished = sorted(place for place in found if "." not in place.name)
    faults = [fault for place in finished for fault in verify_manifest(place, digests=True)]
    for fault in faults:
        print(fault)
    print(f"{len(finished)} finished results, {len(faults)} fault(s)")
    return 1 if faults else 0
