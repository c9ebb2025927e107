"""Ice as it grows on a window: needles in several directions over uneven ground, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import Scale
from bitwright.data.corruptions.windows import blur, trail

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
LAYERS = 5
"""Directions of needles in one image."""


def ice(draws: Draws, size: Sequence[int], scale: Scale) -> Tensor:
    """Return ice in its colours, [N, 3, H, W] in 0 … 1, one of five kinds for each seed."""
    relief = _needles(draws, size) + 0.5 * _ground(draws, size)
    flat = relief.flatten(1).double()
    mean, deviation = (value[:, None, None, None].to(relief.dtype) for value in (flat.mean(1), flat.std(1)))
    kinds = torch.tensor(KINDS[scale], device=relief.device)[draws.integers(33, (), 0, len(KINDS[scale]))][:, :, None, None]
    return ((relief - mean) / deviation.clamp_min(1e-6) * kinds[:, 3:] + kinds[:, :3]).clamp_(0, 1)


def _needles(draws: Draws, size: Sequence[int]) -> Tensor:
    """Return needles, [N, 1, H, W] in units of their own deviation: sparse seeds, each layer smeared in a direction of its own."""
    length = max(3, round(min(size) / 12))
    found: Tensor | None = None
    for layer in range(LAYERS):
        seeds = draws.normal(40 + layer, (1, *size))
        seeds = torch.where(seeds > 1.5, seeds, 0.0)
        angles = draws.uniform(50 + layer, (), -180, 180)
        grown = trail(trail(seeds, length, length * 0.8, angles), length, length * 0.8, angles + 180)
        found = grown if found is None else torch.maximum(found, grown)
    assert found is not None
    return found * math.sqrt(length) * 2


def _ground(draws: Draws, size: Sequence[int]) -> Tensor:
    """Return smooth unevenness, [N, 1, H, W] of about unit deviation."""
    sigma = max(1.0, min(size) / 12)
    return blur(draws.normal(60, (1, *size)), sigma, "reflect", truncate=3) * (2 * math.sqrt(math.pi) * sigma)
