"""NumPy archives (`.npz`) with four arrays of bytes and labels, in the two usual spellings; nothing is unpickled."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from robustlayers.core.errors import UserError
from robustlayers.data.assemble import Part, assemble, fault
from robustlayers.data.images import Dataset

__all__ = ["read_bytes", "read_file"]

_SPELLINGS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)
_CHANNELS = (1, 3)


def read_file(path: Path, *, name: str | None = None, classes: tuple[str, ...] | None = None) -> Dataset:
    """Read `path`: arrays `train_images`, `train_labels`, `test_images`, `test_labels` (or `x_train`, `y_train`, ...).

    Images are uint8 [n, h, w], [n, h, w, c] or [n, c, h, w] with 1 or 3 channels; labels are integers [n] or [n, 1].
    Raises `UserError`, naming the file, for anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise fault(
            path, "no such file" if isinstance(error, FileNotFoundError) else f"not readable ({error})"
        ) from None
    return read_bytes(content, path, name=name or path.stem, classes=classes)


def read_bytes(content: bytes, path: Path, *, name: str, classes: tuple[str, ...] | None = None) -> Dataset:
    """Read the archive in `content`; `path` is only named in errors."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise fault(path, "not a whole .npz archive (damaged, truncated or another format)")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            spelling = _spelling(list(archive.files), path)
            arrays = [_array(archive, key, path) for key in spelling]
    except UserError:
        raise
    except Exception as error:  # zip, its decompressors and NumPy's header reader raise anything on damaged bytes
        raise fault(path, f"damaged archive ({error})") from None
    parts = []
    for images, labels, key in ((arrays[0], arrays[1], spelling[0]), (arrays[2], arrays[3], spelling[2])):
        flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if flat.ndim != 1:
            raise fault(path, f"labels beside {key} have shape {list(labels.shape)}; allowed: [n] or [n, 1]")
        parts.append(Part(_channels_first(images, key, path), flat, f"{path} ({key})", f"{path} (labels of {key})"))
    return assemble(name, parts[0], parts[1], classes)


def _spelling(found: list[str], path: Path) -> tuple[str, ...]:
    best = max(_SPELLINGS, key=lambda keys: sum(key in found for key in keys))
    missing = [key for key in best if key not in found]
    if missing:
        raise fault(path, f"no array {', '.join(missing)}; found: {', '.join(sorted(found)) or 'none'}")
    return best


def _array(archive: Any, key: str, path: Path) -> np.ndarray[Any, Any]:
    try:
        array = archive[key]
    except ValueError as error:  # arrays of Python objects, and headers that are none
        raise fault(path, f"array {key}: {error}") from None
    if not isinstance(array, np.ndarray):  # NumPy hands over a member that is no array as its bytes
        raise fault(path, f"{key} is not an array")
    return array


def _channels_first(images: np.ndarray[Any, Any], key: str, path: Path) -> np.ndarray[Any, Any]:
    if images.dtype != np.uint8:
        raise fault(path, f"array {key} is {images.dtype}; allowed: uint8, pixels of 0 to 255")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = images.shape[1] in _CHANNELS, images.shape[3] in _CHANNELS
        if first and last:
            raise fault(path, f"array {key} has shape {list(images.shape)}: are channels first or last?")
        if first:
            return images
        if last:
            return images.transpose(0, 3, 1, 2)
    allowed = "[n, h, w], [n, h, w, c] or [n, c, h, w] with 1 or 3 channels"
    raise fault(path, f"array {key} has shape {list(images.shape)}; allowed: {allowed}")
