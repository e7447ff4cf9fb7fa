"""IDX files: a round trip, plain and gzipped, and each kind of damage named with its file."""

import gzip
import struct

import numpy as np
import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.data import idx, load


def pack(array, magic=None):
    kind = {1: 0x0801, 3: 0x0803}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", kind, *array.shape) + array.tobytes()


def folder(path, n=6, m=3, zipped=True):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", n), ("t10k", m)):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 9, 8), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 3).astype(np.uint8)
    for name, array in arrays.items():
        if zipped:
            (path / f"{name}.gz").write_bytes(gzip.compress(pack(array)))
        else:
            (path / name).write_bytes(pack(array))
    return arrays


def message(path, **options):
    with pytest.raises(UserError) as error:
        load(f"idx:{path}", **options)
    assert len(error.value.faults) == 1
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_round_trip(tmp_path, zipped):
    arrays = folder(tmp_path, zipped=zipped)
    data = load(f"idx:{tmp_path}")
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.classes == ("0", "1", "2")
    assert data.name == tmp_path.name
    assert data.train.shape == (1, 9, 8)


def test_relative_folders_count_from_the_root_or_from_here(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    folder(tmp_path / "mine")
    digest = load("idx:mine", root=tmp_path).digest
    monkeypatch.chdir(tmp_path)
    assert load("idx:mine").digest == digest


def test_a_missing_folder_or_file_is_named(tmp_path):
    assert message(tmp_path / "absent").endswith("absent: no such folder")
    folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz is here" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("train-images-idx3-ubyte", lambda b: gzip.compress(b)[:-20], "damaged or truncated"),
        ("train-images-idx3-ubyte", lambda b: b"\x1f\x8bnonsense", "damaged or truncated"),
        ("train-images-idx3-ubyte", lambda b: gzip.compress(b[:-1]), "431 bytes of data; the header promises 432"),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "433 bytes of data; the header promises 432"),
        ("train-images-idx3-ubyte", lambda b: b[:7], "7 bytes, shorter than an IDX header"),
        ("train-images-idx3-ubyte", lambda b: b"", "0 bytes, shorter"),
        ("t10k-labels-idx1-ubyte", lambda b: b"\0\0\x0d\x01" + b[4:], "magic number 0x00000d01; allowed: 0x00000801"),
        ("train-labels-idx1-ubyte", lambda b: pack(np.zeros(5, np.uint8)), "6 images, but 5 labels"),
        ("train-labels-idx1-ubyte", lambda b: pack(np.full(6, 200, np.uint8)), "label 200"),
        ("t10k-images-idx3-ubyte", lambda b: pack(np.zeros((3, 8, 8), np.uint8)), "test images are [1, 8, 8]"),
        ("t10k-images-idx3-ubyte", lambda b: pack(np.zeros((0, 9, 8), np.uint8)), "0 images, but 3 labels"),
        ("t10k-images-idx3-ubyte", lambda b: pack(np.zeros((3, 0, 8), np.uint8)), "no images"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, name, damage, expected):
    arrays = folder(tmp_path)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(damage(pack(arrays[name])))
    text = message(tmp_path)
    assert expected in text
    assert str(tmp_path / name.split("-")[0]) in text


def test_content_and_not_the_ending_says_whether_a_file_is_zipped(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(b"plain")
    assert idx.unpack(path) == b"plain"
