"""What an evaluation has found so far, on disk: one file for each batch that an attack is done with, whole or absent.

FOLDER/
  evaluation.json                     what is evaluated: data, model, threat, attacks, seed
  clean.<sha>.safetensors             which images are right without an attack
  00-apgd-ce/000012.<sha>.safetensors  one shard: which images the attack got, which it broke, and how

A shard's name carries the SHA-256 of its bytes, so that a damaged one is noticed when it is read; it is set aside, and
its images are attacked again. Shards say which images they hold, so a process with another batch size can go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save as pack
from torch import Tensor

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import read_json, read_tensors, remove_leftovers, write_bytes, write_json

__all__ = ["Shard", "Shards"]

_SUFFIX = ".safetensors"
_DIGITS = 16


@dataclass(frozen=True)
class Shard:
    """One batch that an attack is done with: `places` [n] in the set, `broken` [n], and `x_adv` of the broken ones.

    `forwards` and `backwards` are passes of single images, as they were made.
    """

    places: Tensor
    broken: Tensor
    x_adv: Tensor
    forwards: int
    backwards: int
    seconds: float


class Shards:
    """The shards of one evaluation, in memory, and in a folder if there is one."""

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for this process and for the evaluation that `identity` describes.

        Raises `UserError` where another process evaluates there, and where the folder holds another evaluation.
        """
        if self.folder is None:
            yield
            return
        owner = self.folder / ".owner.json"
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            who = ""
            with suppress(UserError):  # the other may not have written its name yet
                facts = read_json(owner)
                who = f" (host {facts.get('host')}, process {facts.get('pid')})"
            raise UserError(Fault(f"another process is evaluating here{who}", file=str(self.folder))) from None
        except OSError as error:
            raise UserError(Fault(f"cannot be written into: {error.strerror}", file=str(self.folder))) from None
        try:
            write_json(owner, {"host": socket.gethostname(), "pid": os.getpid()})
            remove_leftovers(self.folder)
            self._claim(identity)
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _claim(self, identity: Mapping[str, Any]) -> None:
        path = Path(self.folder or "") / "evaluation.json"
        wanted = json.loads(json.dumps(identity))
        if not path.exists():
            write_json(path, wanted)
            return
        found = read_json(path)
        differ = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        if differ:
            raise UserError(
                Fault(f"holds another evaluation: {', '.join(differ)} differ; name another folder", file=str(path))
            )

    def read(self, group: str) -> list[Shard]:
        """Return the whole shards of an attack, in the order in which they were made."""
        if self.folder is None:
            return []
        shards = []
        for path in sorted((self.folder / group).glob(f"[0-9]*{_SUFFIX}")):
            tensors = _intact(path)
            if tensors is not None:
                forwards, backwards, nanoseconds = tensors.pop("cost").tolist()
                shards.append(Shard(**tensors, forwards=forwards, backwards=backwards, seconds=nanoseconds / 1e9))
        return shards

    def write(self, group: str, shard: Shard) -> None:
        """Keep a shard."""
        if self.folder is None:
            return
        cost = torch.tensor([shard.forwards, shard.backwards, round(shard.seconds * 1e9)])
        tensors = {"places": shard.places, "broken": shard.broken, "x_adv": shard.x_adv, "cost": cost}
        _write(self.folder / group, f"{int(shard.places[0]):06d}", tensors)

    def clean(self) -> Tensor | None:
        """Return which images are right without an attack, if that is known."""
        if self.folder is None:
            return None
        for path in sorted(self.folder.glob(f"clean.*{_SUFFIX}")):
            tensors = _intact(path)
            if tensors is not None:
                return tensors["right"]
        return None

    def write_clean(self, right: Tensor) -> None:
        """Keep which images are right without an attack."""
        if self.folder is not None:
            _write(self.folder, "clean", {"right": right})


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    data = pack({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    write_bytes(folder / f"{name}.{hashlib.sha256(data).hexdigest()[:_DIGITS]}{_SUFFIX}", data)


def _intact(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file whose bytes are those its name promises; a damaged one is set aside."""
    promised = path.name.removesuffix(_SUFFIX).rpartition(".")[2]
    if hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS] == promised:
        return read_tensors(path)
    os.replace(path, path.with_name(f"{path.name}.damaged"))
    return None
