"""Ice as it grows on a window: needles in several directions over uneven ground, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import Scale
from bitwright.data.corruptions.windows import blur, resample, shifted

KINDS: Mapping[Scale, tuple[tuple[float, ...], ...]] = {
    "large": (
        (0.305, 0.585, 0.650, 0.106, 0.065, 0.060),
        (0.787, 0.805, 0.841, 0.084, 0.087, 0.089),
        (0.787, 0.805, 0.841, 0.084, 0.087, 0.089),
        (0.540, 0.599, 0.648, 0.112, 0.112, 0.117),
        (0.441, 0.484, 0.528, 0.174, 0.170, 0.163),
    ),
    "small": (
        (0.305, 0.585, 0.650, 0.089, 0.055, 0.051),
        (0.787, 0.805, 0.841, 0.068, 0.071, 0.073),
        (0.787, 0.805, 0.841, 0.068, 0.071, 0.073),
        (0.540, 0.599, 0.648, 0.082, 0.082, 0.088),
        (0.441, 0.484, 0.528, 0.143, 0.138, 0.131),
    ),
}
"""Mean and deviation of red, green and blue in the photographs that the published programs draw from (two are alike)."""
LAYERS = 6
"""Directions of needles in one image."""


def ice(draws: Draws, size: Sequence[int], scale: Scale) -> Tensor:
    """Return ice in its colours, [N, 3, H, W] in 0 … 1, one of five kinds for each seed."""
    relief = _needles(draws, size) + 0.6 * _ground(draws, size, 60, 4)
    flat = relief.flatten(1).double()
    mean, deviation = (value[:, None, None, None].to(relief.dtype) for value in (flat.mean(1), flat.std(1, correction=0)))
    kinds = torch.tensor(KINDS[scale], device=relief.device)[draws.integers(33, (), 0, len(KINDS[scale]))][:, :, None, None]
    return ((relief - mean) / deviation.clamp_min(1e-6) * kinds[:, 3:] + kinds[:, :3]).clamp_(0, 1)


def _needles(draws: Draws, size: Sequence[int]) -> Tensor:
    """Return needles, [N, 1, H, W] of about unit deviation: grains smeared in one direction a layer, each layer in patches of its own.

    Where several lie over each other the brightest shows, lit from one side: its slope is added to its height.
    """
    length, grain = max(3, round(min(size) / 8)), max(0.4, min(size) / 260)
    found: Tensor | None = None
    for layer in range(LAYERS):
        seeds = blur(draws.normal(40 + layer, (1, *size)), grain, "wrap")
        angles = draws.uniform(50 + layer, (), -180, 180)
        grown = _smeared(_smeared(seeds, length, angles), length, angles)
        grown = grown / grown.square().mean((1, 2, 3), keepdim=True).sqrt() + 1.5 * _ground(draws, size, 70 + layer, 3)
        found = grown if found is None else torch.maximum(found, grown)
    assert found is not None
    slope = found - found.roll((1, 1), (2, 3))
    return found + slope / slope.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def _smeared(x: Tensor, length: int, angles: Tensor) -> Tensor:
    """Return [N, C, H, W] averaged along a line of at least ``length`` pixels, each image in its own direction (degrees, [N]).

    The image is averaged with itself moved by 1, 2, 4, … pixels: each move doubles the line.
    """
    reach, radians = 1, angles.double() * (math.pi / 180)
    while reach < length:
        down, across = ((reach * function(radians)).round().long() for function in (torch.sin, torch.cos))
        x = (x + shifted(x, down, across, "wrap")) / 2
        reach *= 2
    return x


def _ground(draws: Draws, size: Sequence[int], stream: int, parts: int) -> Tensor:
    """Return smooth unevenness, [N, 1, H, W] of about unit deviation: random heights on a grid of ``parts`` fields a side."""
    heights = draws.normal(stream, (1, parts + 1, parts + 1), deviation=1.35)  # what lies between the points varies less
    for dim in (2, 3):
        at = (np.arange(size[dim - 2]) + 0.5) * (parts / size[dim - 2])
        below = np.floor(at).astype(np.int64)
        share = (at - below) ** 2 * (3 - 2 * (at - below))
        heights = resample(heights, dim, np.stack([below, below + 1], 1), np.stack([1 - share, share], 1))
    return heights
