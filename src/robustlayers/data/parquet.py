"""Parquet folders as the Hugging Face hub lays them out: encoded images in a struct column, labels, class names."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from robustlayers.data.assemble import Part, assemble, fault
from robustlayers.data.images import Dataset

__all__ = ["read_folder"]

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
# Only plain raster formats: Pillow would hand some others (EPS) to an outside program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GREY = ("1", "L", "LA")
_WIDE = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits: a conversion would clip
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Columns:
    """The two columns of the files of one part, and the class names if they are told."""

    encoded: list[tuple[Path, int, bytes | None]]
    labels: np.ndarray[Any, Any]
    classes: tuple[str, ...] | None


def read_folder(folder: Path) -> Dataset:
    """Read `train*.parquet` and `test*.parquet` (or `validation*.parquet`) in `folder` or its subfolder `data`.

    A part may be one file or all of its shards (`train-00000-of-00002.parquet`). Images stand in the column `img` or
    `image`, a struct whose `bytes` are an encoded file (PNG, JPEG, ...) of one size for all; if all are grey they keep
    one channel, otherwise they become RGB. Labels stand in `label` or `fine_label`. Class names come from the files'
    metadata, else those of CIFAR-10 for ten classes in a folder of that name, else "0", "1", ...

    Raises `UserError`, naming the file, for anything missing, damaged or unfit.
    """
    if not folder.is_dir():
        raise fault(folder, "no such folder")
    train_files = _files(folder, ("train",))
    test_files = _files(folder, ("test", "validation"))
    train, test = _columns(train_files), _columns(test_files)
    name = folder.resolve().name
    images = _decode([*train.encoded, *test.encoded])
    middle = len(train.encoded)
    parts = [
        Part(images[:middle], train.labels, str(train_files[0]), str(train_files[0])),
        Part(images[middle:], test.labels, str(test_files[0]), str(test_files[0])),
    ]
    classes = train.classes or test.classes
    highest = max((int(part.labels.max()) for part in parts if len(part.labels)), default=0)
    if classes is None and highest == 9 and "cifar10" in name.lower().replace("-", "").replace("_", ""):
        classes = _CIFAR10
    return assemble(name, parts[0], parts[1], classes)


def _files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    for stem in stems:
        for place in (folder, folder / "data"):
            found = sorted(place.glob(f"{stem}*.parquet"))
            if found:
                return _shards(found)
    raise fault(folder, f"no {' or '.join(f'{stem}*.parquet' for stem in stems)} here or in its subfolder data")


def _shards(files: list[Path]) -> list[Path]:
    matches = [_SHARD.search(path.name) for path in files]
    if not any(matches) and len(files) == 1:
        return files
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    if len(numbers) < len(files) or len({total for _, total in numbers}) != 1:
        names = ", ".join(path.name for path in files[:5])
        raise fault(files[0].parent, f"which files belong together? {names}; allowed: one file, or one set of shards")
    missing = set(range(numbers[0][1])) - {index for index, _ in numbers}
    if missing or len(files) != numbers[0][1]:
        raise fault(files[0].parent, f"{files[0].name}: {len(files)} of {numbers[0][1]} shards are here")
    return files


def _columns(files: list[Path]) -> _Columns:
    encoded: list[tuple[Path, int, bytes | None]] = []
    labels = []
    classes = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image, label = _pick(schema, _IMAGE_COLUMNS, path), _pick(schema, _LABEL_COLUMNS, path)
                _check_types(schema, image, label, path)
                table = file.read(columns=[image, label])
        except (pa.ArrowException, OSError) as error:
            raise fault(path, f"not a whole Parquet file ({error})") from None
        classes = classes or _class_names(schema, label)
        encoded.extend((path, row, content) for row, content in enumerate(_contents(table.column(image))))
        if table.column(label).null_count:
            raise fault(path, f"column {label} has {table.column(label).null_count} empty label(s)")
        labels.append(table.column(label).to_numpy().astype(np.int64))
    return _Columns(encoded, np.concatenate(labels), classes)


def _contents(column: Any) -> Iterator[bytes | None]:
    for chunk in column.chunks:
        # A null struct has no bytes, whatever its child says: flatten applies the struct's own gaps.
        names = [chunk.type.field(index).name for index in range(chunk.type.num_fields)]
        yield from chunk.flatten()[names.index("bytes")].to_pylist()


def _pick(schema: Any, allowed: tuple[str, ...], path: Path) -> str:
    for name in allowed:
        if name in schema.names:
            return name
    raise fault(path, f"no column {' or '.join(allowed)}; found: {', '.join(schema.names)}")


def _check_types(schema: Any, image: str, label: str, path: Path) -> None:
    kind = schema.field(image).type
    children = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    content = children.get("bytes") if pa.types.is_struct(kind) else None
    if content is None or not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise fault(path, f"column {image} is {kind}; allowed: a struct with binary bytes (an encoded image)")
    if not pa.types.is_integer(schema.field(label).type):
        raise fault(path, f"column {label} is {schema.field(label).type}; allowed: integers")


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _decode(encoded: list[tuple[Path, int, bytes | None]]) -> np.ndarray[Any, Any]:
    pixels = [_pixels(path, row, content) for path, row, content in encoded]
    if not pixels:
        return np.zeros((0, 1, 1, 1), dtype=np.uint8)
    size = pixels[0].shape[:2]
    for (path, row, _), image in zip(encoded, pixels, strict=True):
        if image.shape[:2] != size:
            raise fault(
                path, f"image {row} is {_by(image.shape)}, the first image {_by(size)}; all must be of one size"
            )
    channels = 3 if any(image.ndim == 3 for image in pixels) else 1
    images = np.empty((len(pixels), channels, *size), dtype=np.uint8)
    for index, image in enumerate(pixels):
        images[index] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return images


def _pixels(path: Path, row: int, content: bytes | None) -> np.ndarray[Any, Any]:
    if content is None:
        raise fault(path, f"image {row} has no bytes")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            mode = image.mode
            if mode not in _WIDE:
                target = "L" if mode in _GREY else "RGB"
                return np.asarray(image if mode == target else image.convert(target))
    except Exception as error:  # decoders raise anything on damaged bytes
        raise fault(path, f"image {row} cannot be decoded ({str(error) or type(error).__name__})") from None
    raise fault(path, f"image {row} has more than 8 bits per pixel (mode {mode}); allowed: 8 bits")


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"
