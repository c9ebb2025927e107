"""How strong each severity is, for small and for large images.

The large ones are the constants of the package ``imagecorruptions`` (Michaelis et al., 2019), which are those of ImageNet-C
(Hendrycks and Dietterich, 2019). The small ones are the scaling of the same to 32 pixels that CIFAR-10-C (same authors) was made with,
so a network's figures can be set beside published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Scale = Literal["small", "large"]
BORDER = math.sqrt(32 * 224)
"""Images whose shorter side has more pixels than this (84.7, as far from 32 as from 224) are large."""


def scale_of(images: Tensor) -> Scale:
    """Return which constants images [N, C, H, W] take."""
    return "large" if min(images.shape[-2:]) > BORDER else "small"


Levels = tuple[float, float, float, float, float]
Tuples = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]

GAUSSIAN_NOISE: Mapping[Scale, Levels] = {"small": (0.04, 0.06, 0.08, 0.09, 0.10), "large": (0.08, 0.12, 0.18, 0.26, 0.38)}
"""Standard deviation."""
SHOT_NOISE: Mapping[Scale, Levels] = {"small": (500, 250, 100, 75, 50), "large": (60, 25, 12, 5, 3)}
"""Photons of a white pixel."""
IMPULSE_NOISE: Mapping[Scale, Levels] = {"small": (0.01, 0.02, 0.03, 0.05, 0.07), "large": (0.03, 0.06, 0.09, 0.17, 0.27)}
"""Share of the values that turn 0 or 1."""
SPECKLE_NOISE: Mapping[Scale, Levels] = {"small": (0.06, 0.10, 0.12, 0.16, 0.20), "large": (0.15, 0.20, 0.35, 0.45, 0.60)}
"""Standard deviation as a share of the value."""

GAUSSIAN_BLUR: Mapping[Scale, Levels] = {"small": (0.4, 0.6, 0.7, 0.8, 1.0), "large": (1, 2, 3, 4, 6)}
"""Standard deviation, pixels."""
DEFOCUS_BLUR: Mapping[Scale, Tuples] = {
    "small": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "large": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
}
"""Radius of the disk, and the deviation that softens its edge, pixels."""
GLASS_BLUR: Mapping[Scale, Tuples] = {
    "small": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "large": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
}
"""Deviation of the blur before and after, largest displacement, both pixels, and how often."""
MOTION_BLUR: Mapping[Scale, Tuples] = {
    "small": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "large": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
}
"""Radius and deviation, pixels."""
ZOOM_BLUR: Mapping[Scale, Tuples] = {
    "small": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "large": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
}
"""Enlargements from 1 up to the first figure, in steps of the second."""

SNOW: Mapping[Scale, Tuples] = {
    "small": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "large": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
}
"""Mean and deviation of the flakes, their size, the brightness below which there is none, radius and deviation of their fall, and
the share of the image."""
FROST: Mapping[Scale, Tuples] = {
    "small": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "large": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
}
"""Shares of the image and of the frost."""
FOG: Mapping[Scale, Tuples] = {
    "small": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "large": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
}
"""Thickness, and how fast its detail fades towards small scales."""
SPATTER: Mapping[Scale, Tuples] = {
    "small": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "large": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
}
"""Mean and deviation of the liquid, its smoothing, the depth below which there is none, strength of water or smoothing of mud, and
1 for mud."""

BRIGHTNESS: Mapping[Scale, Levels] = {"small": (0.05, 0.1, 0.15, 0.2, 0.3), "large": (0.1, 0.2, 0.3, 0.4, 0.5)}
"""Added to the value (HSV)."""
CONTRAST: Mapping[Scale, Levels] = {"small": (0.75, 0.5, 0.4, 0.3, 0.15), "large": (0.4, 0.3, 0.2, 0.1, 0.05)}
"""Share of the distance to the mean that is left."""
SATURATE: Mapping[Scale, Tuples] = {
    "small": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "large": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
"""Factor on the saturation (HSV), and what is added."""
PIXELATE: Mapping[Scale, Levels] = {"small": (0.95, 0.9, 0.85, 0.75, 0.65), "large": (0.6, 0.5, 0.4, 0.3, 0.25)}
"""Share of the side's pixels that are left."""
JPEG_COMPRESSION: Mapping[Scale, Levels] = {"small": (80, 65, 58, 50, 40), "large": (25, 18, 15, 10, 7)}
"""Quality of the codec."""
ELASTIC_TRANSFORM: Mapping[Scale, Tuples] = {
    "small": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "large": ((0.0625, 0.01, 0), (0.08125, 0.01, 0), (0.10625, 0.01, 0), (0.125, 0.01, 0), (0.15, 0.01, 0)),
}
"""Strength and smoothing of the displacements, and by how much the corners of a triangle move, all as shares of the side."""
