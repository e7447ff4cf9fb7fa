"""`robustlayers verify`: compare every finished result in a study's folder with its manifest."""

from __future__ import annotations

from robustlayers.cli.arguments import StudyFolder

__all__ = ["verify"]


def verify(folder: StudyFolder) -> int:
    """Check sizes and SHA-256 of every finished file; print a line for each that is damaged or missing; exit 1 if any is."""
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.core.files import MANIFEST, verify_manifest

    if not (folder / "plan.json").exists():
        raise UserError(Fault("no study here: it has no plan.json", file=str(folder)))
    # Results that were damaged are set aside under other names and made again: they are not looked at.
    patterns = (f"*/*/seed-*/{MANIFEST}", f"analyses/*/*/{MANIFEST}")
    found = (path.parent for pattern in patterns for path in folder.glob(pattern))
    finished = sorted(place for place in found if "." not in place.name)
    faults = [fault for place in finished for fault in verify_manifest(place, digests=True)]
    for fault in faults:
        print(fault)
    print(f"{len(finished)} finished results, {len(faults)} fault(s)")
    return 1 if faults else 0
