"""Images and data sets: bytes to pixels exactly, selection, digests of content, refusal of what does not fit."""

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.data import Dataset, Images, to_float

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make(n=6, c=1, size=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, c, size, size), generator=generator).to(torch.uint8)
    return Images(images, torch.arange(n) % classes)


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_becomes_the_float_nearest_to_k_over_255(device):
    k = torch.arange(256, dtype=torch.uint8)
    expected = (torch.arange(256, dtype=torch.float64) / 255).to(torch.float32)
    pixels = to_float(k.to(device))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels.cpu(), expected)


def test_to_float_refuses_what_is_no_byte_and_leaves_its_input_alone():
    with pytest.raises(UserError, match="allowed: uint8"):
        to_float(torch.zeros(2))
    k = torch.tensor([255], dtype=torch.uint8)
    to_float(k)
    assert k.item() == 255


def test_take_and_first():
    images = make()
    taken = images.take([5, 0, 0])
    assert torch.equal(taken.images, images.images[[5, 0, 0]])
    assert taken.labels.tolist() == [2, 0, 0]
    assert len(images.take([])) == 0
    assert torch.equal(images.first(2).images, images.images[:2])
    assert images.shape == (1, 8, 8)


@pytest.mark.parametrize("indices", [[6], [-1], [0, 99]])
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(UserError, match="allowed: 0 to 5"):
        make().take(indices)


def test_first_does_not_give_fewer_than_asked():
    with pytest.raises(UserError, match="first: 7 images were asked for; allowed: 0 to 6"):
        make().first(7)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), "images: torch.float32"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "allowed: uint8 [n, channels"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2), "labels: torch.float32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "2 images, but 3 labels"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, message):
    with pytest.raises(UserError) as error:
        Images(images, labels)
    assert message in str(error.value)


def test_the_digest_names_the_content_and_not_the_name():
    classes = ("a", "b", "c")
    reference = Dataset.of("one", make(seed=0), make(seed=1), classes)
    assert Dataset.of("two", make(seed=0), make(seed=1), classes).digest == reference.digest
    assert len(reference.digest) == 64
    flipped = make(seed=1)
    flipped.images[-1, -1, -1, -1] ^= 1
    relabeled = make(seed=1)
    relabeled.labels[0] = 1
    long = [Images(part.images.view(6, 1, 4, 16), part.labels) for part in (make(seed=0), make(seed=1))]
    others = [
        Dataset.of("one", make(seed=0), flipped, classes),
        Dataset.of("one", make(seed=0), relabeled, classes),
        Dataset.of("one", make(seed=1), make(seed=0), classes),
        Dataset.of("one", long[0], long[1], classes),
        Dataset.of("one", make(seed=0), make(seed=1), ("a", "b", "d")),
    ]
    assert len({reference.digest, *(other.digest for other in others)}) == 6


def test_the_digest_does_not_depend_on_memory_layout():
    train = make(c=3)
    last = Images(train.images.contiguous(memory_format=torch.channels_last), train.labels)
    assert Dataset.of("x", last, make(c=3), "abc").digest == Dataset.of("x", train, make(c=3), "abc").digest


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"training images are \[1, 8, 8\], test images \[3, 8, 8\]"):
        Dataset.of("x", make(), make(c=3), "abc")
    with pytest.raises(UserError, match="test labels are 0 to 2; allowed: 0 to 1"):
        Dataset.of("x", make(classes=2), make(), "ab")
    negative = make()
    negative.labels[0] = -1
    with pytest.raises(UserError, match="training labels are -1 to 2"):
        Dataset.of("x", negative, make(), "abc")


def test_to_moves_all_four_tensors():
    moved = Dataset.of("x", make(), make(), "abc").to("meta")
    assert {t.device.type for part in (moved.train, moved.test) for t in (part.images, part.labels)} == {"meta"}
