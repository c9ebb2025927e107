"""Folders of images, and encoded images in memory, decoded when a batch asks for them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.data.packs import require_pillow
from bitwright.data.splits import Split, check_index, check_labels
from bitwright.errors import DataError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRIES = 10


class FolderSplit(Split):
    """Image files (paths, or their bytes) decoded at use with Pillow.

    The training view is a random crop of 8 to 100 % of the area and 3/4 to 4/3 of aspect, scaled to ``crop`` pixels, and a
    horizontal flip (Szegedy et al. 2015, "inception" crops); the evaluation view scales the shorter side to ``resize`` and
    cuts the centre.

    Args:
        files: one path or ``bytes`` an image.
        labels: int64 [N].
        classes: number of classes.
        crop: side of what comes out, pixels.
        resize: length of the shorter side before the centre is cut, pixels; at least ``crop``.
        mean, std: of each of the 3 channels, for pixels in 0 … 1.
        area: the least share of the area that a training crop keeps.
        workers: threads that decode.

    Raises:
        DataError: no files, labels that do not fit, sizes that do not, or (at use) a file that cannot be decoded.
    """

    def __init__(
        self,
        files: Sequence[Path | bytes],
        labels: Tensor,
        *,
        classes: int,
        crop: int = 224,
        resize: int = 256,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        area: float = 0.08,
        workers: int = 1,
    ):
        require_pillow()
        if len(files) == 0 or labels.shape != (len(files),):
            raise DataError(f"data: {labels.numel()} labels for {len(files)} image files; give at least one image, and one label for each")
        if not 1 <= crop <= resize or not 0 < area <= 1 or workers < 1:
            found = f"crop {crop}, resize {resize}, area {area}, workers {workers}"
            raise DataError(f"data: {found}; give 1 ≤ crop ≤ resize, 0 < area ≤ 1 and workers ≥ 1")
        if len(mean) != 3 or len(std) != 3:
            raise DataError(f"data: mean or std has {len(mean)} and {len(std)} numbers for 3 channels; give 3 of each")
        check_labels(labels, classes)
        self.files, self.labels, self.classes = files, labels.long(), classes
        self.crop, self.resize, self.mean, self.std, self.area, self.workers = crop, resize, tuple(mean), tuple(std), area, workers
        self._rows = torch.arange(len(files))

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, index: Tensor) -> FolderSplit:
        """Return the split of some positions (int64 [n]), sharing the files."""
        split = object.__new__(FolderSplit)
        split.__dict__.update(self.__dict__)
        split._rows = self._rows[check_index(index, len(self))]
        return split

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images [n, 3, crop, crop] and labels [n]; see `Split.batch`."""
        pixels, labels = self.pixels(index, generator)
        return self.normalise(pixels), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean).div_(std)

    def pixels(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images [n, 3, crop, crop] in 0 … 1 and labels [n]; see `Split.pixels`."""
        rows = self._rows[index]
        if generator is None:
            draws: list[Tensor | None] = [None] * len(rows)
        else:
            draws = list(torch.rand(len(rows), TRIES * 4 + 1, generator=generator, device=generator.device).cpu())
        if self.workers == 1:
            images = [self._image(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                images = list(pool.map(self._image, rows.tolist(), draws))
        return torch.stack(images).float().div_(255), self.labels[rows]

    def _image(self, row: int, draws: Tensor | None) -> Tensor:
        """Return one image, uint8 [3, crop, crop]."""
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415  (an extra)

        file = self.files[row]
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = f"image {row} of the pack" if isinstance(file, bytes) else str(file)
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(f"{name}: cannot be decoded ({reason}); restore or remove it") from None
        image = self._centre(image) if draws is None else self._cut(image, draws.tolist())
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.crop, self.crop, 3).permute(2, 0, 1)

    def _centre(self, image: PillowImage) -> PillowImage:
        short = min(image.size)
        width, height = (int(self.resize * side / short) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), resample=2)  # 2: bilinear, with antialiasing
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))

    def _cut(self, image: PillowImage, draws: list[float]) -> PillowImage:
        from PIL import ImageOps  # noqa: PLC0415

        left, top, width, height = crop_box(image.size, draws[:-1], self.area)
        image = image.crop((left, top, left + width, top + height)).resize((self.crop, self.crop), resample=2)
        return ImageOps.mirror(image) if draws[-1] < 0.5 else image


def crop_box(size: tuple[int, int], draws: Sequence[float], area: float) -> tuple[int, int, int, int]:
    """Choose a random crop from uniform draws in [0, 1), four for each try: (left, top, width, height), pixels.

    >>> crop_box((100, 80), [0.5] * 4, 0.08)
    (17, 7, 66, 66)
    """
    width, height = size
    for i in range(0, len(draws), 4):
        share, aspect, across, down = draws[i : i + 4]
        kept = width * height * (area + (1 - area) * share)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        w, h = round(math.sqrt(kept * ratio)), round(math.sqrt(kept / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def scan_folder(root: Path, classes: Sequence[str] | None = None) -> tuple[list[Path], Tensor, list[str]]:
    """List ``root/<class>/*`` : (files, labels int64 [N], class names); classes are the sorted folder names.

    Args:
        root: a folder of folders.
        classes: the names that count (those of the training folder), so that the labels of two folders agree.

    Raises:
        DataError: a missing or empty folder, or a class that is not among ``classes``.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; images are expected as {root}/<class>/<image>.jpg")
    found = sorted(item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
    names = list(found if classes is None else classes)
    for name in found:
        if name not in names:
            raise DataError(f"{root / name}: a class that the training images do not have; {nearest(name, names)}")
    files: list[Path] = []
    labels: list[int] = []
    for name in found:
        inside = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise DataError(f"{root / name}: has no images ({', '.join(SUFFIXES)}); remove the folder or put images in it")
        files += inside
        labels += [names.index(name)] * len(inside)
    if not files:
        raise DataError(f"{root}: has no folders of images; they are expected as {root}/<class>/<image>.jpg")
    return files, torch.tensor(labels), names
