"""`robustlayers verify`: compare every finished result of a study, or of an evaluation, with what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["verify"]

_MOST = 3  # missing results that are named


def verify(
    folder: Annotated[
        Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="the folder of a study, or of `evaluate --out`")
    ],
) -> int:
    """Check sizes and SHA-256 of every finished file, and an evaluation's rows; a line for each fault; exit 1 if any is.

    Results that the plan needs and that are not there are told too. They are no fault: the same `run` makes them.
    """
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
    missing = _missing(folder)
    if missing:
        many = len(missing) > 1
        some = ", ".join(missing[:_MOST]) + (f" and {len(missing) - _MOST} more" if len(missing) > _MOST else "")
        print(
            f"{len(missing)} result{'s are' if many else ' is'} missing: {some}; "
            f"run again to make {'them' if many else 'it'}"
        )
    print(
        f"{len(finished)} finished results, {len(faults)} fault(s)" + (f", {len(missing)} missing" if missing else "")
    )
    return 1 if faults else 0


def _missing(folder: Path) -> list[str]:
    """Return the folders of phases and measurements that the plan needs and that are not finished, below `folder`.

    Nothing comes after a phase that diverged, and none of it is missing.
    """
    from robustlayers.core.files import MANIFEST, read_json
    from robustlayers.study.store import Store

    store = Store(folder)
    plan = read_json(store.plan)
    missing: dict[str, None] = {}
    for seed in plan["seeds"]:
        for arm in plan["arms"]:
            for place in (*(store.phase(node, seed) for node in arm["nodes"]), store.result(arm["run"], seed)):
                if (place / MANIFEST).exists():
                    continue
                failure = store.failure(place)
                if failure and failure[0] == "diverged":
                    break
                missing[place.relative_to(folder).as_posix()] = None
    return list(missing)
