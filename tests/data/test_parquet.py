"""Parquet folders: round trips of lossless images, channels, class names, shards, and each kind of mistake."""

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robustlayers.core.errors import UserError
from robustlayers.data import load

DATA = Path(os.environ.get("ROBUSTLAYERS_DATA") or Path(__file__).parents[2] / "../shared/data")


def encode(array, kind="PNG", mode=None):
    packed = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(packed, kind)
    return packed.getvalue()


def pictures(n, shape=(8, 9, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write(path, contents, labels, *, image="img", label="label", names=None, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": content, "path": None} for content in contents], kind or STRUCT)
    table = pa.table({image: column, label: pa.array(labels)})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def both(folder, arrays, labels, **options):
    contents = [encode(array) for array in arrays]
    write(folder / "train.parquet", contents, labels, **options)
    write(folder / "test.parquet", contents[:2], labels[:2], **options)


def message(folder):
    with pytest.raises(UserError) as error:
        load(f"parquet:{folder}")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("shape", "channels"), [((8, 9, 3), 3), ((8, 9), 1)])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label")])
def test_a_round_trip(tmp_path, shape, channels, image, label):
    arrays = pictures(4, shape)
    both(tmp_path, arrays, [0, 1, 2, 1], image=image, label=label)
    data = load(f"parquet:{tmp_path}")
    expected = torch.from_numpy(arrays.reshape(4, 8, 9, channels).transpose(0, 3, 1, 2).copy())
    assert torch.equal(data.train.images, expected)
    assert torch.equal(data.test.images, expected[:2])
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert (data.name, data.classes) == (tmp_path.name, ("0", "1", "2"))


def test_shards_in_the_data_folder_and_validation_as_test(tmp_path):
    arrays = pictures(5)
    contents = [encode(array) for array in arrays]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", contents[:2], [0, 1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", contents[2:4], [1, 0])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", contents[4:], [1])
    data = load(f"parquet:{tmp_path}")
    assert torch.equal(data.train.images, torch.from_numpy(arrays[:4].transpose(0, 3, 1, 2).copy()))
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert len(data.test) == 1


def test_a_test_part_goes_before_a_validation_part(tmp_path):
    both(tmp_path, pictures(3), [0, 1, 0])
    write(tmp_path / "validation.parquet", [encode(pictures(1)[0])], [1])
    assert len(load(f"parquet:{tmp_path}").test) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train-00000-of-00002"], "1 of 2 shards are here"),
        (["train", "train-00000-of-00001"], "which files belong together?"),
        (["train-a", "train-b"], "which files belong together?"),
        ([], "no train*.parquet here or in its subfolder data"),
    ],
)
def test_incomplete_or_ambiguous_files_are_refused(tmp_path, files, expected):
    for name in [*files, "test"]:
        write(tmp_path / f"{name}.parquet", [encode(pictures(1)[0])], [0])
    assert expected in message(tmp_path)


def test_grey_and_color_together_become_rgb(tmp_path):
    grey, color = pictures(1, (8, 9))[0], pictures(1, seed=1)[0]
    write(tmp_path / "train.parquet", [encode(grey), encode(color)], [0, 1])
    write(tmp_path / "test.parquet", [encode(color)], [0])
    images = load(f"parquet:{tmp_path}").train.images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(images[1], torch.from_numpy(color.transpose(2, 0, 1).copy()))


def test_palettes_and_jpeg_are_decoded(tmp_path):
    color = (204, 51, 102)  # of the palette's 216
    flat = np.full((8, 9, 3), color, dtype=np.uint8)
    contents = [encode(flat, mode="P"), encode(flat, "JPEG")]
    write(tmp_path / "train.parquet", contents, [0, 1])
    write(tmp_path / "test.parquet", contents[:1], [0])
    images = load(f"parquet:{tmp_path}").train.images
    assert (images.float() - torch.tensor(color).view(1, 3, 1, 1)).abs().max() < 4


def test_class_names_come_from_the_metadata(tmp_path):
    both(tmp_path, pictures(3), [0, 1, 0], names=["cat", "dog", "cow"])
    assert load(f"parquet:{tmp_path}").classes == ("cat", "dog", "cow")
    both(tmp_path, pictures(3), [0, 1, 2], names=["cat", "dog"])
    assert "label 2 at image 2; allowed: 0 to 1" in message(tmp_path)


def test_ten_classes_in_a_folder_called_cifar10_have_their_names(tmp_path):
    both(tmp_path / "my-cifar-10", pictures(10), list(range(10)))
    assert load("parquet:my-cifar-10", root=tmp_path).classes[9] == "truck"
    both(tmp_path / "other", pictures(10), list(range(10)))
    assert load("parquet:other", root=tmp_path).classes[9] == "9"


@pytest.mark.parametrize(
    ("write_train", "expected"),
    [
        (lambda p, c: write(p, c, [0, 1], label="lbl"), "no column label or fine_label; found: img, lbl"),
        (lambda p, c: write(p, c, [0, 1], image="picture"), "no column img or image; found: picture, label"),
        (lambda p, c: write(p, c, [0.5, 1.0]), "column label is double; allowed: integers"),
        (lambda p, c: write(p, c, [0, None]), "column label has 1 empty label(s)"),
        (lambda p, c: write(p, c, [0, -1]), "label -1 at image 1"),
        (lambda p, c: write(p, [], pa.array([], pa.int64())), "no images"),
        (lambda p, c: write(p, [c[0], b"nonsense"], [0, 1]), "image 1 cannot be decoded"),
        (lambda p, c: write(p, [c[0], c[1][:60]], [0, 1]), "image 1 cannot be decoded"),
        (lambda p, c: write(p, [c[0], None], [0, 1]), "image 1 has no bytes"),
        (
            lambda p, c: write(p, [c[0], encode(pictures(1, (4, 4, 3))[0])], [0, 1]),
            "image 1 is 4x4, the first image 8x9",
        ),
        (lambda p, c: write(p, [encode(np.zeros((8, 9), np.uint16)), c[1]], [0, 1]), "more than 8 bits per pixel"),
        (
            lambda p, c: pq.write_table(pa.table({"img": [b"a"], "label": [0]}), p),
            "column img is binary; allowed: a struct",
        ),
        (lambda p, c: p.write_bytes(b"PAR1 and no more"), "not a whole Parquet file"),
        (lambda p, c: p.write_bytes(b""), "not a whole Parquet file"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_file(tmp_path, write_train, expected):
    contents = [encode(array) for array in pictures(2)]
    write(tmp_path / "test.parquet", contents, [0, 1])
    write_train(tmp_path / "train.parquet", contents)
    text = message(tmp_path)
    assert expected in text
    assert "train.parquet" in text


def test_a_truncated_parquet_file_is_named(tmp_path):
    both(tmp_path, pictures(3), [0, 1, 0])
    path = tmp_path / "test.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert "test.parquet: not a whole Parquet file" in message(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    assert message(tmp_path / "absent").endswith("absent: no such folder")


@pytest.mark.slow
def test_the_whole_of_cifar10_jpeg_loads_in_time():
    folder = DATA / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip(f"the data set {folder} is not here")
    started = time.process_time()
    data = load(f"parquet:{folder}")
    assert time.process_time() - started < 30
    assert (len(data.train), len(data.test), data.train.shape) == (50_000, 10_000, (3, 32, 32))
    assert data.train.labels.bincount().tolist() == [5_000] * 10
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    assert data.classes[0] == "airplane"
