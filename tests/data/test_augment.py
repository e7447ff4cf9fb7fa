"""Augmentation: equal to a slow reference for each image, different for each image, uniform, and refused when wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.data import Augment, to_float


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(n=5, c=3, h=6, w=8, seed=0):
    return torch.randint(1, 256, (n, c, h, w), generator=stream(seed)).to(torch.uint8)


def slow(image, row, column, flip, crop):
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            y, x = i + row - crop, (w - 1 - j if flip else j) + column - crop
            if 0 <= y < h and 0 <= x < w:
                out[:, i, j] = image[:, y, x]
    return out


@given(crop=st.integers(0, 4), flip=st.booleans(), seed=st.integers(0, 99), floats=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_batch_operation_equals_a_slow_reference_for_each_image(crop, flip, seed, floats):
    augment, images = Augment(crop, flip), pixels(seed=seed)
    images = to_float(images) if floats else images
    draws = augment.draw(len(images), stream(seed))
    got = augment.apply(images, stream(seed))
    for image, out, (row, column, flipped) in zip(images, got, draws.tolist(), strict=True):
        assert torch.equal(out, slow(image, row, column, flipped and flip, crop))
    assert got.dtype == images.dtype


def test_each_image_gets_draws_of_its_own():
    one = pixels(n=1).expand(64, -1, -1, -1)
    varied = Augment(crop=2, flip=True).apply(one, stream())
    assert len({out.numpy().tobytes() for out in varied}) > 20


def test_draws_are_uniform_and_cover_the_whole_range():
    draws = Augment(crop=2, flip=True).draw(20_000, stream())
    for column, values in enumerate((5, 5, 2)):
        counts = draws[:, column].bincount(minlength=values)
        assert len(counts) == values
        # five standard deviations of a binomial count
        p = 1 / values
        assert (counts - 20_000 * p).abs().max() < 5 * (20_000 * p * (1 - p)) ** 0.5


def test_flips_do_not_depend_on_the_crop_nor_places_on_flips():
    assert torch.equal(Augment(crop=4).draw(50, stream())[:, 2], Augment(flip=True).draw(50, stream())[:, 2])
    assert torch.equal(Augment(crop=4).draw(50, stream()), Augment(crop=4, flip=True).draw(50, stream()))


def test_the_default_changes_nothing_and_draws_nothing():
    generator = stream()
    before = generator.get_state()
    images = pixels()
    assert Augment().apply(images, generator) is images
    assert torch.equal(before, generator.get_state())


def test_the_input_is_left_alone():
    images = pixels()
    before = images.clone()
    Augment(crop=2, flip=True).apply(images, stream()).zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, "augment.crop: -1"),
        ({"crop": 1.5}, "augment.crop: 1.5"),
        ({"crop": True}, "augment.crop: True"),
        ({"flip": 1}, "augment.flip: 1; allowed: true, false"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError) as error:
        Augment(**options)
    assert message in str(error.value)


def test_a_crop_as_wide_as_the_image_is_refused():
    with pytest.raises(UserError, match="6 on images of 6x8; allowed: less than their sides"):
        Augment(crop=6).apply(pixels(), stream())
