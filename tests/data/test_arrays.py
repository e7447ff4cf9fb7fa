"""NumPy archives: both spellings, every layout, and each kind of mistake in one line."""

import io
import zipfile

import numpy as np
import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.data import load


def parts(n=6, m=3, shape=(8, 9, 3)):
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (n, *shape), dtype=np.uint8),
        "train_labels": np.arange(n) % 3,
        "test_images": generator.integers(0, 256, (m, *shape), dtype=np.uint8),
        "test_labels": np.arange(m) % 3,
    }


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def message(path):
    with pytest.raises(UserError) as error:
        load(f"npz:{path}")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 9, 3), (0, 3, 1, 2), (3, 8, 9)),
        ((8, 9, 1), (0, 3, 1, 2), (1, 8, 9)),
        ((3, 8, 9), (0, 1, 2, 3), (3, 8, 9)),
        ((1, 8, 9), (0, 1, 2, 3), (1, 8, 9)),
    ],
)
def test_layouts(tmp_path, shape, axes, expected):
    arrays = parts(shape=shape)
    data = load(f"npz:{save(tmp_path / 'mine.npz', arrays)}")
    assert data.train.shape == expected
    assert torch.equal(data.train.images, torch.from_numpy(arrays["train_images"].transpose(axes).copy()))
    assert (data.name, data.classes) == ("mine", ("0", "1", "2"))
    assert data.train.images.is_contiguous()


def test_grey_images_without_a_channel_axis_and_column_labels(tmp_path):
    arrays = parts(shape=(8, 9))
    arrays["train_labels"] = arrays["train_labels"][:, None].astype(np.uint8)
    data = load(f"npz:{save(tmp_path / 'a.npz', arrays)}")
    assert data.train.shape == (1, 8, 9)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_other_spelling_is_the_same_content(tmp_path):
    arrays = parts()
    keys = ("x_train", "y_train", "x_test", "y_test")
    other = dict(zip(keys, arrays.values(), strict=True))
    one, two = save(tmp_path / "a.npz", arrays), save(tmp_path / "b.npz", other)
    assert load(f"npz:{one}").digest == load(f"npz:{two}").digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_images": np.zeros((6, 8, 8), np.float32)}, "array train_images is float32; allowed: uint8"),
        ({"train_images": np.zeros((6, 8, 8), object)}, "array train_images: Object arrays cannot be loaded"),
        ({"test_labels": np.array([0, 1, None])}, "array test_labels: Object arrays cannot be loaded"),
        ({"train_images": np.zeros((6, 3, 8, 3), np.uint8)}, "are channels first or last?"),
        ({"train_images": np.zeros((6, 8, 8, 4), np.uint8)}, "has shape [6, 8, 8, 4]; allowed: [n, h, w]"),
        ({"train_images": np.zeros((6, 64), np.uint8)}, "has shape [6, 64]; allowed: [n, h, w]"),
        ({"train_labels": np.zeros(6)}, "labels are float64; allowed: integers"),
        ({"train_labels": np.zeros((6, 2), int)}, "labels beside train_images have shape [6, 2]; allowed: [n]"),
        ({"train_labels": np.zeros(4, int)}, "6 images, but 4 labels"),
        ({"test_labels": np.array([0, -1, 2])}, "label -1 at image 1; labels count from 0"),
        ({"test_labels": np.array([0, 10**9, 2])}, "label 1000000000; allowed"),
        ({"test_images": np.zeros((3, 8, 8), np.uint8)}, "test images are [1, 8, 8], training images [3, 8, 9]"),
        ({"test_images": None}, "no array test_images; found: test_labels, train_images, train_labels"),
    ],
)
def test_each_mistake_is_one_line_that_names_file_and_array(tmp_path, change, expected):
    arrays = {**parts(), **change}
    path = save(tmp_path / "mine.npz", {key: array for key, array in arrays.items() if array is not None})
    text = message(path)
    assert expected in text
    assert str(path) in text


def test_a_damaged_file_is_named(tmp_path):
    path = save(tmp_path / "mine.npz", parts())
    content = path.read_bytes()
    assert message(tmp_path / "absent.npz").endswith("absent.npz: no such file")
    path.write_bytes(content[:-30])
    assert "not a whole .npz archive" in message(path)
    path.write_bytes(b"")
    assert "not a whole .npz archive" in message(path)
    with open(path, "wb") as stream:
        np.save(stream, np.zeros(3))
    assert "not a whole .npz archive" in message(path)
    path.write_bytes(content[:200] + bytes(100) + content[300:])
    assert "damaged archive" in message(path)


def test_an_archive_of_something_else_is_refused(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for key in parts():
            archive.writestr(f"{key}.npy", b"not an array")
    (tmp_path / "x.npz").write_bytes(packed.getvalue())
    assert "x.npz: train_images is not an array" in message(tmp_path / "x.npz")
