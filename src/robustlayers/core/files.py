"""Durable files: every write is whole or absent, and a finished folder is one whose manifest checks out.

The write protocol, used by everything that is kept: a temporary file in the same folder, fsync, atomic replace, fsync of
the folder. `manifest.json`, with the size and SHA-256 of every other file, is written last; a folder without a valid
manifest is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors

from robustlayers.core.errors import Fault, UserError

__all__ = [
    "MANIFEST",
    "file_digest",
    "read_json",
    "read_tensors",
    "remove_leftovers",
    "verify_manifest",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_tensors",
    "write_text",
]

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


def write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path` so that a reader, also after a kill or a power cut, sees the old file or the new one whole.

    An `OSError` of the system, such as that of a full disk, names `path`; what was there before is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is what has to be told
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # it names no file, or the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    _sync_folder(path.parent)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 with Unix line ends, durably."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON; NaN and infinity are refused, since no other reader takes them."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(Fault("no such file", file=str(path))) from None
    except (ValueError, OSError) as error:
        raise UserError(Fault(f"not readable as JSON ({error})", file=str(path))) from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors as safetensors, durably; they are moved to the CPU and made contiguous first."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return write_bytes(path, pack_tensors(plain, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; a missing, truncated or foreign file is a `UserError` that names it."""
    try:
        return parse_tensors(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(Fault("no such file", file=str(path))) from None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(Fault(f"not a whole safetensors file ({error})", file=str(path))) from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Declare `folder` finished: list every file below it with size and SHA-256, beside the given `facts`."""
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not path.name.startswith("."):
            files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    return write_json(folder / MANIFEST, {**(facts or {}), "files": files})


def verify_manifest(folder: Path, *, digests: bool = False) -> list[Fault]:
    """Return what is wrong with a finished folder: nothing if it is whole.

    Sizes are always compared; with `digests` the SHA-256 of every file is too.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        return [Fault("unfinished: no manifest", file=str(folder))]
    try:
        files = [(name, fact["size"], fact["sha256"]) for name, fact in read_json(path)["files"].items()]
    except (UserError, KeyError, TypeError, AttributeError):
        return [Fault("damaged manifest", file=str(path))]
    faults = []
    for name, size, sha256 in files:
        target = folder / name
        if not target.is_file():
            faults.append(Fault("listed in the manifest but missing", file=str(target)))
        elif target.stat().st_size != size:
            faults.append(Fault(f"{target.stat().st_size} bytes, manifest says {size}", file=str(target)))
        elif digests and file_digest(target) != sha256:
            faults.append(Fault("content differs from the manifest's SHA-256", file=str(target)))
    return faults


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that a killed process left below `folder`; return how many there were."""
    leftovers = [path for path in Path(folder).rglob(f"{_TEMPORARY}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to flush
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
