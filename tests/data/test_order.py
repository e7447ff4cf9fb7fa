"""Training order and validation split: permutations, purity, stratification, the last batch, resumes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.data import Augment, Images, batch_count, batches, split, to_float


def numbered(n, classes=1):
    """Images that hold their own index in two bytes."""
    index = torch.arange(n)
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 256, index // 256
    return Images(images, index % classes)


def indices(x):
    flat = (x[:, 0, 0, :2] * 255).round().long()
    return (flat[:, 0] + 256 * flat[:, 1]).tolist()


def epoch(images, size, **options):
    return list(batches(images, size, **{"seed": 0, "epoch": 0, **options}))


@given(n=st.integers(2, 70), size=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_in_batches_of_more_than_one(n, size):
    got = epoch(numbered(n), size)
    assert sorted(i for x, _ in got for i in indices(x)) == list(range(n))
    assert len(got) == batch_count(n, size)
    lengths = [len(y) for _, y in got]
    assert all(length == size for length in lengths[:-1])
    assert 2 <= lengths[-1] <= size + 1
    assert (lengths[-1] == size + 1) == (n % size == 1 and n > size)


def test_order_is_a_function_of_seed_and_epoch_only():
    images = numbered(300)
    order = [i for x, _ in epoch(images, 32) for i in indices(x)]
    assert order != list(range(300))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert order == [i for x, _ in epoch(images, 32) for i in indices(x)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert order == [i for x, _ in epoch(images, 50) for i in indices(x)]
    assert order != [i for x, _ in epoch(images, 32, seed=1) for i in indices(x)]
    assert order != [i for x, _ in epoch(images, 32, epoch=1) for i in indices(x)]
    augmented = epoch(Images(images.images, torch.arange(300)), 32, augment=Augment(crop=2, flip=True))
    assert order == [i for _, y in augmented for i in y.tolist()]


def test_labels_stay_with_their_images():
    for x, y in epoch(numbered(100, classes=7), 16):
        assert [i % 7 for i in indices(x)] == y.tolist()
        assert y.dtype == torch.int64


def test_without_augmentation_pixels_are_exactly_k_over_255():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=generator).to(torch.uint8)
    for x, y in epoch(Images(pixels, torch.arange(40)), 16):
        assert x.dtype == torch.float32
        assert torch.equal(x, to_float(pixels[y]))


@pytest.mark.parametrize("augment", [None, Augment(crop=2, flip=True)])
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_resume_inside_an_epoch_sees_what_it_would_have_seen(augment, start):
    whole = epoch(numbered(50), 10, augment=augment)
    tail = epoch(numbered(50), 10, augment=augment, start=start)
    assert len(tail) == 5 - start
    for (x, y), (x2, y2) in zip(whole[start:], tail, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_sees_the_same_batches():
    images, augment = numbered(50), Augment(crop=2, flip=True)
    there = epoch(images.to("cuda"), 16, augment=augment)
    for (x, y), (x2, y2) in zip(epoch(images, 16, augment=augment), there, strict=True):
        assert x2.is_cuda
        assert torch.equal(x, x2.cpu())
        assert torch.equal(y, y2.cpu())


@pytest.mark.parametrize(
    ("n", "size", "options", "message"),
    [
        (10, 1, {}, "batch_size: 1; allowed: a whole number, at least 2"),
        (10, 2.0, {}, "batch_size: 2.0"),
        (1, 8, {}, "1 training image(s); allowed: at least 2"),
        (10, 5, {"start": 3}, "start: batch 3; allowed: 0 to 2"),
    ],
)
def test_impossible_batches_are_refused_before_the_first_one(n, size, options, message):
    with pytest.raises(UserError) as error:
        batches(numbered(n), size, seed=0, epoch=0, **options)
    assert message in str(error.value)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_split_is_disjoint_complete_and_stratified(counts, share, seed):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    images = Images(numbered(len(labels)).images, labels)
    expected = [min(int(share * count + 0.5), count - 1) for count in counts]
    if share > 0 and not any(expected):
        with pytest.raises(UserError, match="takes none"):
            split(images, share, seed)
        return
    train, validation = split(images, share, seed)
    mine, theirs = (indices(to_float(part.images)) for part in (train, validation))
    assert mine == sorted(mine)
    assert theirs == sorted(theirs)
    assert sorted(mine + theirs) == list(range(len(labels)))
    assert torch.equal(images.labels[theirs], validation.labels)
    assert [(validation.labels == label).sum().item() for label in range(len(counts))] == expected


def test_a_split_is_stable_and_has_its_own_seed():
    images = numbered(1000, classes=10)
    chosen = [indices(to_float(split(images, "1/10", seed)[1].images)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert len(chosen[0]) == 100
    # Known values: another order of draws would change every study's validation set.
    assert chosen[0][:6] == [2, 15, 17, 26, 28, 37]


def test_a_share_of_zero_leaves_validation_empty():
    train, validation = split(numbered(10), 0)
    assert (len(train), len(validation)) == (10, 0)
    assert validation.shape == (1, 8, 8)


@pytest.mark.parametrize("share", [1, -0.1, "half", float("nan"), True])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(UserError, match="validation"):
        split(numbered(10), share)


def test_each_batch_and_each_epoch_is_augmented_by_draws_of_its_own():
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(1, 256, (1, 1, 8, 8), generator=generator).to(torch.uint8)
    same = Images(one.repeat(40, 1, 1, 1), torch.zeros(40, dtype=torch.int64))
    augment = Augment(crop=3, flip=True)
    first, second = (epoch(same, 10, augment=augment, epoch=number) for number in (0, 1))
    for other in (*first[1:], second[0]):
        assert not torch.equal(first[0][0], other[0])
