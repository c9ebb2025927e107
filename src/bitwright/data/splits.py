"""Splits: labelled images that give batches, in the training view (augmented, all draws from a generator) or as they are."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros
from torch.utils.data import Dataset

from bitwright.errors import DataError

Augment = Literal["none", "crop", "crop-flip"]
AUGMENTS: tuple[Augment, ...] = ("none", "crop", "crop-flip")


class Split(ABC):
    """Labelled images of one part of a data set."""

    classes: int
    """Number of classes: every label is in 0 … classes - 1."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the images and labels of some positions.

        Args:
            index: int64 [n], positions in this split.
            generator: if given, the images are in the training view and every random draw comes from it; if not, they
                are in the evaluation view.

        Returns:
            x, float32 [n, C, H, W], normalised; y, int64 [n].
        """

    @abstractmethod
    def subset(self, index: Tensor) -> Split:
        """Return the split of some positions (int64 [n]), sharing the images."""

    def pixels(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return what `batch` does before the images are normalised: pixels in 0 … 1, on which corruptions work.

        A split that does not normalise by itself has nothing else to return than its batches.
        """
        return self.batch(index, generator)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as the network takes them: `batch` is this of `pixels`."""
        return pixels

    def take(self, n: int) -> Split:
        """Return the first ``n`` images, or all if there are fewer; raises `DataError` unless n is at least 1."""
        return self.subset(torch.arange(min(n, len(self))))

    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the whole split in order, in the evaluation view, ``size`` images at a time."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))


class TensorSplit(Split):
    """Images held in memory as one tensor.

    Args:
        images: uint8 or float [N, C, H, W]; uint8 is divided by 255.
        labels: integers [N].
        classes: number of classes; by default the highest label + 1.
        mean, std: per channel, subtracted and divided by afterwards.
        augment: the training view: "none", "crop" (zero padding, random crop) or "crop-flip" (and horizontal flip).
        pad: width of that padding, in pixels.

    Raises:
        DataError: no images, labels that do not fit them, or values that are not finite.

    >>> split = TensorSplit(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 1]), mean=(0.5,), std=(0.5,))
    >>> x, y = split.batch(torch.tensor([1]))
    >>> x.shape, x.max().item(), y.item()
    (torch.Size([1, 1, 4, 4]), 1.0, 1)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        classes: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        augment: Augment = "none",
        pad: int = 4,
        _rows: Tensor | None = None,
    ):
        if _rows is None:
            _check_tensors(images, labels, classes)
        self.images, self.labels = images, labels.long()
        self.classes = int(labels.max()) + 1 if classes is None else classes
        self.mean, self.std, self.augment, self.pad = tuple(mean), tuple(std), _check_augment(augment), pad
        self._mean, self._std = (_per_channel(values, images) for values in (mean, std))
        self._rows = torch.arange(len(images), device=images.device) if _rows is None else _rows

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, index: Tensor) -> TensorSplit:
        """Return the split of some positions (int64 [n]), sharing the images."""
        return self._with(self.images, self.labels, self._rows[check_index(index, len(self)).to(self._rows.device)])

    def to(self, device: torch.device | str) -> TensorSplit:
        """Return the split with its images on a device: its batches are then made there."""
        return self._with(self.images.to(device), self.labels.to(device), self._rows.to(device))

    def _with(self, images: Tensor, labels: Tensor, rows: Tensor) -> TensorSplit:
        look = {"classes": self.classes, "mean": self.mean, "std": self.std, "augment": self.augment, "pad": self.pad}
        return TensorSplit(images, labels, **look, _rows=rows)  # type: ignore[arg-type]

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return normalised images [n, C, H, W] and labels [n]; see `Split.batch`."""
        pixels, labels = self.pixels(index, generator)
        return self.normalise(pixels), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation."""
        return (pixels - self._mean).div_(self._std)

    def pixels(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] before they are normalised, bytes divided by 255, and labels [n]; see `Split.pixels`."""
        rows = self._rows[index.to(self._rows.device)]
        images = self.images[rows]
        if generator is not None and self.augment != "none":
            images = random_crop(images, self.pad, generator, flip=self.augment == "crop-flip")
        x = images.float()
        if images.dtype == torch.uint8:
            x = x.div_(255)
        return x, self.labels[rows]


def random_crop(images: Tensor, pad: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Zero-pad, crop at random to the same size, and flip half of the images if asked; [n, C, H, W] in and out.

    One gather does it all: the index of a flipped image runs backwards. The draws are the same with and without ``flip``.
    """
    n, channels, height, width = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=generator.device).to(device)
    mirrored = (torch.rand(n, generator=generator, device=generator.device) < 0.5).to(device) & flip
    across = torch.arange(width, device=device)
    rows = shift[0, :, None] + torch.arange(height, device=device)
    columns = shift[1, :, None] + torch.where(mirrored[:, None], width - 1 - across, across)
    index = (rows * (width + 2 * pad)).unsqueeze(2) + columns.unsqueeze(1)
    padded = pad_zeros(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, index.view(n, 1, height * width).expand(-1, channels, -1)).view(n, channels, height, width)


class DatasetSplit(Split):
    """Any map-style ``torch.utils.data.Dataset`` whose items are (float tensor [C, H, W], integer label).

    Args:
        dataset: gives the evaluation view.
        augmented: the same items in the training view (its transform may draw from torch's, numpy's or Python's global
            generators: they are seeded from the one passed to `batch` and restored after); by default ``dataset``.
        classes: number of classes.

    Raises:
        DataError: no items, two datasets of different length, or (when it is read) an item that is not such a pair.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, int]], *, classes: int, augmented: Dataset[tuple[Tensor, int]] | None = None):
        self.dataset, self.augmented, self.classes = dataset, dataset if augmented is None else augmented, classes
        count, other = len(self.dataset), len(self.augmented)  # type: ignore[arg-type]
        if count == 0:
            raise DataError("data: the dataset has no items; give one with at least one image")
        if count != other:
            raise DataError(f"data: dataset has {count} items and augmented {other}; give the same items in both")
        self._rows = torch.arange(count)

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, index: Tensor) -> DatasetSplit:
        """Return the split of some positions (int64 [n]), sharing the dataset."""
        split = DatasetSplit(self.dataset, classes=self.classes, augmented=self.augmented)
        split._rows = self._rows[check_index(index, len(self))]
        return split

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] and labels [n]; see `Split.batch`."""
        rows: list[int] = self._rows[index].tolist()
        if generator is None:
            items = [self._item(self.dataset, row) for row in rows]
        else:
            with _seeded(int(torch.randint(2**31, (1,), generator=generator, device=generator.device))):
                items = [self._item(self.augmented, row) for row in rows]
        if len({x.shape for x, _ in items}) != 1:
            raise DataError(f"data: images of different shapes in one batch ({_shapes(items)}); resize them in the dataset's transform")
        x = torch.stack([x for x, _ in items])
        if not bool(torch.isfinite(x).all()):
            bad = rows[int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])]
            raise DataError(f"data: image {bad} has values that are not finite (nan or inf); mend or leave out that item")
        return x, torch.tensor([y for _, y in items])

    def _item(self, dataset: Dataset[tuple[Tensor, int]], row: int) -> tuple[Tensor, int]:
        try:
            x, y = dataset[row]
            label = int(y)
        except (TypeError, ValueError) as error:
            raise DataError(f"data: item {row} is not an (image, label) pair ({error}); return a float tensor and an integer") from None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise DataError(f"data: the image of item {row} is {found}; give the dataset a transform that returns a float tensor [C, H, W]")
        if not 0 <= label < self.classes:
            found = f"item {row} has label {label} and there are {self.classes} classes"
            raise DataError(f"data: {found}; labels run from 0 to {self.classes - 1}")
        return x.float(), label


def _shapes(items: Sequence[tuple[Tensor, int]]) -> str:
    return ", ".join(sorted({"x".join(map(str, x.shape)) for x, _ in items}))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a while, as transforms draw from them, and put them back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the legacy global one is what transforms use
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _check_tensors(images: Tensor, labels: Tensor, classes: int | None) -> None:
    if len(images) == 0:
        raise DataError("data: there are no images; give at least one")
    if images.ndim != 4:
        raise DataError(f"data: images have shape {'x'.join(map(str, images.shape))}; give them as N x channels x height x width")
    if labels.shape != (len(images),) or labels.is_floating_point():
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise DataError(f"data: labels are {found} for {len(images)} images; give one integer for each image")
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images).flatten(1).all(1)).nonzero()[0])
        raise DataError(f"data: image {bad} has values that are not finite (nan or inf); mend or leave out that image")
    check_labels(labels, int(labels.max()) + 1 if classes is None else classes)


def check_labels(labels: Tensor, classes: int, where: str = "data") -> None:
    """Raise `DataError` unless every label (integers [N]) is in 0 … classes - 1."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        found = f"image {int(wrong[0])} has label {int(labels[wrong[0]])} and there are {classes} classes ({len(wrong)} such labels)"
        raise DataError(f"{where}: {found}; labels run from 0 to {classes - 1}")


def check_index(index: Tensor, length: int) -> Tensor:
    """Return positions (integers [n]) as int64; raises `DataError` for none, or for one outside 0 … length - 1."""
    if index.numel() == 0:
        raise DataError("data: a split of no images was asked for; take at least one")
    if int(index.min()) < 0 or int(index.max()) >= length:
        raise DataError(f"data: positions {int(index.min())} to {int(index.max())} were asked for in a split of {length} images")
    return index.long()


def _check_augment(augment: Augment) -> Augment:
    if augment not in AUGMENTS:
        raise DataError(f"data: augment is '{augment}'; type one of {', '.join(AUGMENTS)}")
    return augment


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    channels = images.shape[1]
    if len(values) not in (1, channels) or not all(math.isfinite(v) for v in values):
        raise DataError(f"data: mean or std is {tuple(values)} for images of {channels} channels; give one number, or {channels}")
    return torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
