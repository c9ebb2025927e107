"""Corruptions of images, by name and severity: the 15 common ones, and four more to test on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bitwright.data.corruptions import blurs, digital, noise, weather
from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.spatter import spatter
from bitwright.errors import DataError, nearest

FUNCTIONS: Mapping[str, Callable[[Tensor, int, Draws], Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blurs.defocus_blur,
    "glass_blur": blurs.glass_blur,
    "motion_blur": blurs.motion_blur,
    "zoom_blur": blurs.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blurs.gaussian_blur,
    "spatter": spatter,
    "saturate": digital.saturate,
}
"""What each corruption does: (images, severity, draws) -> images, before they are cut to 0 … 1."""
CORRUPTIONS: tuple[str, ...] = tuple(FUNCTIONS)
"""The names of all corruptions."""
COMMON: tuple[str, ...] = CORRUPTIONS[:15]
"""The 15 common corruptions, on which the mean corruption accuracy is taken (Hendrycks and Dietterich, 2019)."""
DETERMINISTIC: frozenset[str] = frozenset(
    ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
)
"""Those that draw nothing: every seed gives the same."""
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
"""All severities."""


def corrupt(images: Tensor, name: str, severity: int, *, seeds: Tensor | Sequence[int]) -> Tensor:
    """Corrupt images, each by its own seed: a sample comes out the same in every batch, bit for bit on one kind of device.

    Hendrycks and Dietterich (2019), "Benchmarking neural network robustness to common corruptions and perturbations". Images whose
    shorter side has at most 84 pixels take the constants of CIFAR-10-C, larger ones those of ImageNet-C. The same seed draws the
    same at every severity.

    Differs: the result is not rounded to 8 bits (JPEG's is), and frost is drawn rather than cut from photographs.

    Args:
        images: float [N, C, H, W] in 0 … 1, of 1 or 3 channels.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seeds: an integer for each image, int64 [N].

    Returns:
        Images of the same shape, type and device, in 0 … 1.

    Raises:
        DataError: images that are none (shape, type, values), an unknown name or severity, seeds that are not one an image.

    >>> images = torch.full((2, 3, 32, 32), 0.5)
    >>> noisy = corrupt(images, "gaussian_noise", 5, seeds=[1, 2])
    >>> abs(noisy.std().item() - 0.1) < 0.01
    True
    >>> bool((corrupt(images[1:], "gaussian_noise", 5, seeds=[2]) == noisy[1:]).all())
    True
    """
    check_corruption(name, severity)
    check_images(images)
    draws = Draws.of(_checked_seeds(seeds, images))
    with torch.no_grad():
        return FUNCTIONS[name](images.float(), severity, draws).clamp_(0, 1).to(images.dtype)


def check_corruption(name: str, severity: int) -> None:
    """Raise `DataError` unless there is a corruption of that name and severity."""
    if name not in FUNCTIONS:
        raise DataError(f"corruption: no corruption '{name}'; {nearest(str(name), CORRUPTIONS)}")
    if not is_severity(severity):
        raise DataError(f"corruption: severity {severity!r} of {name}; severities are the whole numbers 1 (mild) to 5")


def is_severity(value: object) -> bool:
    """Return whether a value is a severity: a whole number from 1 to 5.

    >>> is_severity(3), is_severity(6), is_severity(3.0), is_severity(True)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value in SEVERITIES


def check_images(images: Tensor) -> None:
    """Raise `DataError` unless images are float [N, C, H, W] of 1 or 3 channels with every value in 0 … 1."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise DataError(f"corruption: images are {found}; give a float tensor with values in 0 … 1 (divide bytes by 255)")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        shape = "x".join(map(str, images.shape))
        raise DataError(f"corruption: images have shape {shape}; give N x channels x height x width with 1 or 3 channels")
    low, high = (float(value) for value in torch.aminmax(images))
    if not (low >= 0 and high <= 1):
        wrong = ~((images >= 0) & (images <= 1))
        bad = int(wrong.flatten(1).any(1).nonzero()[0])
        value = float(images[bad][wrong[bad]][0])
        if value != value:  # noqa: PLR0124  (only nan differs from itself)
            raise DataError(f"corruption: image {bad} has values that are nan; mend or leave out that image")
        raise DataError(f"corruption: image {bad} has the value {value:g}; give pixels in 0 … 1, before they are normalised")


def _checked_seeds(seeds: Tensor | Sequence[int], images: Tensor) -> Tensor:
    """Return seeds as int64 [N] on the device of the images."""
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor([int(seed) % 2**63 for seed in seeds], dtype=torch.int64)
    if seeds.shape != (len(images),) or seeds.is_floating_point() or seeds.is_complex():
        found = f"{seeds.dtype} of shape {tuple(seeds.shape)}"
        raise DataError(f"corruption: seeds are {found} for {len(images)} images; give one integer for each image")
    return seeds.to(images.device, torch.int64)


__all__ = ["COMMON", "CORRUPTIONS", "DETERMINISTIC", "SEVERITIES", "check_corruption", "check_images", "corrupt"]
