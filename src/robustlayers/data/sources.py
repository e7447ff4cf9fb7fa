"""One text names a data set: a known name, or `kind:place` for files of one's own."""

from __future__ import annotations

from pathlib import Path

from robustlayers.core.errors import UserError, one_of
from robustlayers.data import fashion
from robustlayers.data.images import Dataset

__all__ = ["load", "names"]

_NAMES = ("fashion-mnist-mini", "fashion-mnist")
_KINDS = {"idx": "FOLDER", "npz": "FILE", "parquet": "FOLDER"}


def names() -> tuple[str, ...]:
    """Return what `load` takes: the known names, and the kinds of files with what follows the colon.

    >>> names()
    ('fashion-mnist-mini', 'fashion-mnist', 'idx:FOLDER', 'npz:FILE', 'parquet:FOLDER')
    """
    return (*_NAMES, *(f"{kind}:{place}" for kind, place in _KINDS.items()))


def load(spec: str, *, root: Path | str | None = None) -> Dataset:
    """Return the data set that `spec` names, on the CPU.

    - `fashion-mnist-mini`: 10,000 + 2,000 images inside this package, nothing to download;
    - `fashion-mnist`: 60,000 + 10,000, from its IDX files in one of the usual folders (see `fashion.load_full`);
    - `idx:FOLDER`, `parquet:FOLDER`, `npz:FILE`: files of one's own; see `idx`, `parquet` and `arrays` in this package.

    Relative places count from `root`, or from the current folder. Raises `UserError` for an unknown name and, naming
    the file, for anything missing, damaged or unfit.

    >>> data = load("fashion-mnist-mini")
    >>> len(data.train), len(data.test), data.train.shape, data.classes[9]
    (10000, 2000, (1, 28, 28), 'Ankle boot')
    """
    base = Path(root).expanduser() if root is not None else None
    if spec == "fashion-mnist-mini":
        return fashion.load_mini()
    if spec == "fashion-mnist":
        return fashion.load_full(base)
    kind, colon, place = spec.partition(":")
    if not colon or kind not in _KINDS:
        raise UserError(one_of("data set", spec, names()))
    if not place.strip():
        raise UserError(f"data set {spec!r}: nothing after the colon; write {kind}:{_KINDS[kind]}")
    path = (base or Path()) / Path(place).expanduser()
    # Imported here: pyarrow and Pillow are slow to load, and most sessions need neither.
    if kind == "idx":
        from robustlayers.data import idx

        return idx.read_folder(path)
    if kind == "npz":
        from robustlayers.data import arrays

        return arrays.read_file(path)
    from robustlayers.data import parquet

    return parquet.read_folder(path)
