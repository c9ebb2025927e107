"""Splits: views, determinism, speed, and one clear line for each kind of bad data."""

import random
import time

import numpy as np
import pytest
import torch

from bitwright.data import DatasetSplit, TensorSplit, check_labels
from bitwright.data.splits import random_crop
from bitwright.errors import DataError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=20, augment="none", **options):
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator())
    return TensorSplit(images, torch.arange(n) % 5, augment=augment, **options)


def slow_crop_flip(images, pad, seed, *, flip):
    """The obvious twin of random_crop: one image at a time."""
    draw = generator(seed)
    n, channels, height, width = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n), generator=draw)
    mirrored = torch.rand(n, generator=draw) < 0.5
    out = torch.zeros_like(images)
    for i in range(n):
        canvas = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=images.dtype)
        canvas[:, pad : pad + height, pad : pad + width] = images[i]
        out[i] = canvas[:, shift[0, i] : shift[0, i] + height, shift[1, i] : shift[1, i] + width]
        if flip and mirrored[i]:
            out[i] = out[i].flip(-1)
    return out


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_and_flip_equal_the_obvious_twin(pad, flip):
    images = torch.randint(0, 256, (32, 3, 8, 6), dtype=torch.uint8, generator=generator())
    assert torch.equal(random_crop(images, pad, generator(3), flip=flip), slow_crop_flip(images, pad, 3, flip=flip))


def test_the_evaluation_view_is_the_normalised_image():
    split = make(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x, y = split.batch(torch.tensor([7, 3]))
    expected = (split.images[[7, 3]].numpy() / np.float32(255) - np.array([0.1, 0.2, 0.3], "f4")[:, None, None]) / np.array(
        [0.5, 0.6, 0.7], "f4"
    )[:, None, None]
    assert np.allclose(x.numpy(), expected, atol=1e-6)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y.tolist() == [2, 3]
    assert y.dtype == torch.int64


def test_batches_are_the_whole_split_in_order():
    split = make(23)
    x = torch.cat([x for x, _ in split.batches(5)])
    assert torch.equal(x, split.batch(torch.arange(23))[0])


def test_the_training_view_depends_on_the_generator_alone():
    split, index = make(augment="crop-flip"), torch.arange(20)
    first = split.batch(index, generator(1))[0]
    torch.rand(5)
    assert torch.equal(first, split.batch(index, generator(1))[0])
    assert not torch.equal(first, split.batch(index, generator(2))[0])
    assert torch.equal(make().batch(index, generator(1))[0], make().batch(index)[0])


def test_subsets_share_images_and_nest():
    split = make(20, augment="crop-flip", mean=(0.5,))
    inner = split.subset(torch.tensor([4, 9, 2])).subset(torch.tensor([2, 0]))
    assert len(inner) == 2
    assert inner.images.data_ptr() == split.images.data_ptr()
    assert torch.equal(inner.batch(torch.arange(2))[0], split.batch(torch.tensor([2, 4]))[0])
    assert (inner.classes, inner.augment, inner.mean) == (5, "crop-flip", (0.5,))
    assert len(split.take(100)) == 20
    assert torch.equal(split.take(3).labels, split.labels)


def test_to_a_device_keeps_everything():
    split = make(10, augment="crop-flip").subset(torch.tensor([3, 4]))
    moved = split.to("cpu")
    assert torch.equal(moved.batch(torch.arange(2), generator())[0], split.batch(torch.arange(2), generator())[0])


def test_a_batch_is_fast():
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    split = TensorSplit(images, torch.zeros(2000, dtype=torch.long), augment="crop-flip", mean=(0.5,) * 3, std=(0.2,) * 3)
    seconds = []
    for i in range(15):
        start = time.perf_counter()
        split.batch(torch.arange(128) + i, generator(i))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005


ONE = torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TensorSplit(torch.zeros(0, 1, 2, 2), ONE[:0]), "there are no images; give at least one"),
        (lambda: TensorSplit(torch.zeros(1, 4), ONE), "images have shape 1x4; give them as N x channels"),
        (lambda: TensorSplit(torch.zeros(2, 1, 2, 2), ONE), r"labels are torch.int64 of shape \(1,\) for 2 images; give one integer"),
        (lambda: TensorSplit(torch.zeros(1, 1, 2, 2), torch.zeros(1)), r"labels are torch.float32 of shape \(1,\)"),
        (lambda: TensorSplit(torch.full((1, 1, 2, 2), float("nan")), ONE), "image 0 has values that are not finite"),
        (lambda: TensorSplit(torch.zeros(1, 1, 2, 2), ONE + 3, classes=3), "image 0 has label 3 and there are 3 classes"),
        (lambda: TensorSplit(torch.zeros(1, 1, 2, 2), ONE - 1), "label -1"),
        (lambda: TensorSplit(torch.zeros(1, 1, 2, 2), ONE, mean=(1.0, 2.0)), r"mean or std is \(1.0, 2.0\) for images of 1 channels"),
        (lambda: TensorSplit(torch.zeros(1, 1, 2, 2), ONE, augment="flop"), "augment is 'flop'; type one of none, crop, crop-flip"),
        (lambda: make().take(0), "a split of no images"),
        (lambda: make(5).subset(torch.tensor([5])), "positions 5 to 5 were asked for in a split of 5"),
        (lambda: check_labels(torch.tensor([0, 7, 9]), 5, "cifar"), r"cifar: image 1 has label 7 and .* 5 classes \(2 such"),
    ],
)
def test_bad_data_is_one_clear_line(call, message):
    with pytest.raises(DataError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


class Noisy(torch.utils.data.Dataset):
    """A user's dataset whose transform draws from every global generator there is."""

    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.full((1, 2, 2), float(i))
        return (x + torch.rand(1) + random.random() + np.random.rand() if self.noise else x), i % 3  # noqa: NPY002


def test_any_dataset_gives_reproducible_batches():
    split = DatasetSplit(Noisy(False), classes=3, augmented=Noisy(True))
    index = torch.tensor([4, 1])
    x, y = split.batch(index)
    assert x[:, 0, 0, 0].tolist() == [4, 1]
    assert y.tolist() == [1, 1]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = split.batch(index, generator(1))[0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    random.random()
    torch.rand(1)
    assert torch.equal(first, split.batch(index, generator(1))[0])
    assert not torch.equal(first, split.batch(index, generator(2))[0])
    assert split.subset(torch.tensor([5, 0])).batch(torch.tensor([0]))[0].max() == 5


class Bad(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


X = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([X], "item 0 is not an"),
        ([(X, "cat")], "item 0 is not an"),
        ([("image", 0)], "image of item 0 is a str; give the dataset a transform"),
        ([(X.byte(), 0)], "is a torch.uint8 tensor"),
        ([(X, 0), (X, 2)], "item 1 has label 2 and there are 2 classes; labels run from 0 to 1"),
        ([(X, 0), (torch.zeros(1, 3, 3), 1)], "images of different shapes in one batch"),
        ([(X, 0), (X / 0, 1)], "image 1 has values that are not finite"),
    ],
)
def test_bad_items_are_one_clear_line(items, message):
    with pytest.raises(DataError, match=message):
        DatasetSplit(Bad(items), classes=2).batch(torch.arange(len(items)))


def test_two_datasets_must_match():
    with pytest.raises(DataError, match="dataset has 1 items and augmented 2"):
        DatasetSplit(Bad([(X, 0)]), classes=2, augmented=Bad([(X, 0)] * 2))
