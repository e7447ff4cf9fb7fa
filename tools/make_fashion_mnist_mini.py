"""Make the small set inside the package, `fashion-mnist-mini.npz`, from the IDX files of Fashion-MNIST.

    python tools/make_fashion_mnist_mini.py [--source FOLDER] [--to FILE]

It holds 1,000 training and 200 test images of each class. Within a class, images are taken in the order of the SHA-256
of "SEED:part:index", a permutation that no version of any library can change; classes alternate, so that image i is of
class i mod 10. The archive has no dates, so the same zlib gives the same bytes. Prints the SHA-256 that belongs into
`robustlayers.data.fashion.MINI_DIGEST`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from robustlayers.core.files import write_bytes
from robustlayers.data import fashion

SEED = 0
PER_CLASS = {"train": 1_000, "test": 200}
TARGET = Path(__file__).parents[1] / "src/robustlayers/data/assets" / fashion.MINI


def chosen(labels: np.ndarray, part: str) -> np.ndarray:
    """Return the indices of the images that are taken, classes alternating."""
    by_class = []
    for label in range(len(fashion.CLASSES)):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"{SEED}:{part}:{index}".encode()).digest())
        by_class.append(members[: PER_CLASS[part]])
    return np.array(by_class).T.reshape(-1)


def main() -> None:
    """Read, choose, write, print the digest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of the four IDX files (default: the usual places)")
    parser.add_argument("--to", type=Path, default=TARGET, help="the archive to write")
    arguments = parser.parse_args()
    full = fashion.load_full(arguments.source)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for part, images in (("train", full.train), ("test", full.test)):
            labels = images.labels.numpy()
            index = chosen(labels, part)
            for key, array in (("images", images.images.numpy()[index]), ("labels", labels[index].astype(np.uint8))):
                content = io.BytesIO()
                np.save(content, array, allow_pickle=False)
                entry = zipfile.ZipInfo(f"{part}_{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    write_bytes(arguments.to, packed.getvalue())
    print(f"{arguments.to}: {len(packed.getvalue()):,} bytes, SHA-256 {hashlib.sha256(packed.getvalue()).hexdigest()}")


if __name__ == "__main__":
    main()
