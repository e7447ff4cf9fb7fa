"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): where its files may lie, and a small part in the package."""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path

from robustlayers.core.errors import UserError
from robustlayers.data import arrays, idx
from robustlayers.data.assemble import fault
from robustlayers.data.images import Dataset

__all__ = ["CLASSES", "DIGESTS", "MINI", "MINI_DIGEST", "cache_folder", "load_full", "load_mini"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# SHA-256 of the unzipped files.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

MINI = "fashion-mnist-mini.npz"
MINI_DIGEST = "1c8c0ddd5640bcb85d8273b98464a435dc21286802384429b322c7b98d1539fc"

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def cache_folder(name: str) -> Path:
    """Return `~/.cache/robustlayers/NAME`: the folder that `fetch` writes to and `load` looks in."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "robustlayers" / name


def load_mini() -> Dataset:
    """Return `fashion-mnist-mini`: 1,000 training and 200 test images of each class, part of this package.

    Image i is of class i mod 10, so that the first 10k images are balanced for every k. For tests, first tries and
    examples: numbers on it are not comparable with those on Fashion-MNIST.
    """
    path = Path(str(resources.files("robustlayers.data") / "assets" / MINI))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise fault(
            path, f"part of robustlayers, but not readable ({error.strerror}); install robustlayers anew"
        ) from None
    if hashlib.sha256(content).hexdigest() != MINI_DIGEST:
        raise fault(path, "damaged: its SHA-256 is not the one of this version; install robustlayers anew")
    return arrays.read_bytes(content, path, name="fashion-mnist-mini", classes=CLASSES)


def load_full(root: Path | None) -> Dataset:
    """Return Fashion-MNIST from the first of the usual folders that holds it, each file checked against its SHA-256.

    Looked for in: `root` and `root/fashion-mnist`, `$ROBUSTLAYERS_DATA/fashion-mnist`, the folder of Debian's package,
    the user's cache. Raises `UserError` that says how to get it.
    """
    for folder in _places(root):
        try:
            files = [idx.find(folder, name) for name in DIGESTS]
        except UserError:
            continue
        for path in files:
            if idx.content_digest(idx.unpack(path)) != DIGESTS[path.name.removesuffix(".gz")]:
                raise fault(path, "not the file of Fashion-MNIST: the SHA-256 of its content differs (damaged?)")
        return idx.read_folder(folder, name="fashion-mnist", classes=CLASSES)
    raise UserError(
        "fashion-mnist: its four files are not here; get them with `robustlayers data fetch fashion-mnist`, or with "
        "Debian's package dataset-fashion-mnist, or put them into a folder fashion-mnist and name the folder above it "
        "in ROBUSTLAYERS_DATA"
    )


def _places(root: Path | None) -> list[Path]:
    places = [root, root / "fashion-mnist"] if root is not None else []
    named = os.environ.get("ROBUSTLAYERS_DATA")
    if named:
        places.append(Path(named) / "fashion-mnist")
    return [*places, _DEBIAN, cache_folder("fashion-mnist")]
