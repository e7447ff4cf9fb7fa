"""`robustlayers data`: which data sets there are, and fetching one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["data"]


def data(
    action: Annotated[Literal["list", "fetch"], tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME", help="what to fetch")] = "",
    to: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="where to; the cache folder unless given")] = None,
) -> int:
    """List the data sets that studies can name, or download one with its checksums, which happens only when asked for."""
    from robustlayers.core.errors import UserError
    from robustlayers.data import fetch, load, names

    if action == "list":
        for known in (name for name in names() if ":" not in name):
            try:
                dataset = load(known)
            except UserError as error:
                print(f"{known:<20} {error.faults[0].message}")
            else:
                shape = "x".join(map(str, dataset.train.shape))
                print(
                    f"{known:<20} {len(dataset.train)} train, {len(dataset.test)} test, {shape}, {len(dataset.classes)} classes"
                )
        print("parquet:FOLDER       a Parquet data set in the Hugging Face layout (image with bytes, label)")
        print("idx:FOLDER           IDX files, as MNIST and its relatives come")
        print("npz:FILE             uint8 arrays train_images, train_labels, test_images, test_labels")
        return 0
    if not name:
        raise UserError("data fetch: name the data set, as in: robustlayers data fetch fashion-mnist")
    folder = fetch(name, to or Path.home() / ".cache" / "robustlayers" / name)
    print(f"fetched into {folder}")
    return 0
