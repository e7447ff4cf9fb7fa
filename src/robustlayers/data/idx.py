"""The IDX files of MNIST and its relatives: a header of big-endian sizes, then bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from robustlayers.data.assemble import Part, assemble, fault
from robustlayers.data.images import Dataset

__all__ = ["FILES", "content_digest", "find", "parse", "read_folder", "unpack"]

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

_MAGIC = {1: 0x0801, 3: 0x0803}  # unsigned bytes in one or three dimensions
_LIMIT = 1 << 32  # no data set of small images is larger; a gzip bomb is


def read_folder(folder: Path, *, name: str | None = None, classes: tuple[str, ...] | None = None) -> Dataset:
    """Read `train-images-idx3-ubyte` and its three companions, each plain or with `.gz`, from `folder`.

    Raises `UserError`, naming the file, for one that is missing, damaged or does not fit the others.
    """
    parts = {}
    for part, (images, labels) in FILES.items():
        images_file, labels_file = find(folder, images), find(folder, labels)
        grey = parse(unpack(images_file), images_file, dimensions=3)[:, None]
        parts[part] = Part(
            grey, parse(unpack(labels_file), labels_file, dimensions=1), str(images_file), str(labels_file)
        )
    return assemble(name or folder.resolve().name, parts["train"], parts["test"], classes)


def find(folder: Path, name: str) -> Path:
    """Return the path of the IDX file `name` in `folder`, plain or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if not folder.is_dir():
        raise fault(folder, "no such folder")
    raise fault(folder, f"neither {name} nor {name}.gz is here")


def unpack(path: Path) -> bytes:
    """Return the bytes of a file, unzipped if they are gzip's; a truncated or damaged one is a `UserError`."""
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            content = stream.read(_LIMIT + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise fault(path, f"damaged or truncated ({error})") from None
    if len(content) > _LIMIT:
        raise fault(path, f"more than {_LIMIT} bytes")
    return content


def parse(content: bytes, path: Path, *, dimensions: int) -> np.ndarray[Any, Any]:
    """Return the uint8 array in an IDX file's bytes; magic number, dimensions and length are checked."""
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise fault(path, f"{len(content)} bytes, shorter than an IDX header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    if magic != _MAGIC[dimensions]:
        raise fault(path, f"magic number {magic:#010x}; allowed: {_MAGIC[dimensions]:#010x} (bytes, {dimensions}-d)")
    if len(content) - header != math.prod(shape):
        raise fault(path, f"{len(content) - header} bytes of data; the header promises {math.prod(shape)} for {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def content_digest(content: bytes) -> str:
    """Return the SHA-256 of unzipped bytes: gzip's own header holds a name and a date that differ between copies."""
    return hashlib.sha256(content).hexdigest()
