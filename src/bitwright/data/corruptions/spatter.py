"""Spatter: drops of water, or of mud, on the lens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import SPATTER, scale_of
from bitwright.data.corruptions.windows import blur, extend, grey, window_sum

WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
LUMA = (0.2989, 0.5870, 0.1140)
WEAK, STRONG = 50, 150
"""Thresholds of the edges of drops, on Sobel's gradient of grey levels."""
FAR = 20
"""Pixels from an edge beyond which a drop is equally clear."""
RELIEF = np.array([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
"""Lights the drops from one corner."""
BOX = np.full((3, 3), 1 / 9)


def spatter(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Splash water, from severity 4 on mud, over the image."""
    mean, deviation, sigma, least, strength, mud = SPATTER[scale_of(images)][severity - 1]
    liquid = blur(draws.normal(0, (1, *images.shape[-2:]), mean, deviation), sigma)
    liquid = torch.where(liquid < least, 0.0, liquid)
    if mud:
        cover = blur((liquid > least).to(images.dtype), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + _tinted(MUD, images) * cover
    depth = liquid.clamp(0, 1).mul(255).floor_()
    clear = depth * _relief(depth)
    most = clear.amax((1, 2, 3), keepdim=True)
    return images + (_tinted(WATER, images) * (clear / most.clamp_min(1e-12) * strength)).clamp_(0, 1)


def _tinted(colour: tuple[float, float, float], images: Tensor) -> Tensor:
    """Return a colour that broadcasts with the images."""
    tint = torch.tensor(colour, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return tint if images.shape[1] == 3 else grey(tint, LUMA)


def _relief(depth: Tensor) -> Tensor:
    """Return how strongly each place of the drops shows, [N, 1, H, W]: by its distance from their edges, lit from a corner."""
    distance = distances(edges(depth), FAR)
    flat = equalized(window_sum(distance, BOX, "mirror").add_(1e-4).floor_())
    lit = window_sum(flat, RELIEF, "mirror").clamp_(0, 255)
    return window_sum(lit, BOX, "mirror")


def edges(grey_levels: Tensor) -> Tensor:
    """Return where the edges are, bool [N, 1, H, W], by the detector of Canny (1986) with Sobel's gradient in absolute values.

    An edge is as strong as neither neighbour across it, and weak ones count where they hang together with strong ones.
    """
    smooth, slope = np.array([1.0, 2.0, 1.0]), np.array([-1.0, 0.0, 1.0])
    across, down = (window_sum(grey_levels, np.outer(*pair), "nearest") for pair in ((smooth, slope), (slope, smooth)))
    size = across.abs() + down.abs()
    peak = _peaks(size, across, down)
    found, weak = peak & (size > STRONG), peak & (size > WEAK)
    while True:
        grown = (max_pool2d(found.float(), 3, 1, 1) > 0) & weak
        if torch.equal(grown, found):
            return found
        found = grown


def _peaks(size: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Return where the gradient [N, 1, H, W] is largest along its own direction, one of four."""
    height, width = size.shape[-2:]
    wide = torch.zeros(len(size), 1, height + 2, width + 2, device=size.device)
    wide[..., 1:-1, 1:-1] = size

    def beside(i: int, j: int) -> Tensor:
        return wide[..., 1 + i : 1 + i + height, 1 + j : 1 + j + width]

    flat = down.abs() < across.abs() * math.tan(math.pi / 8)
    steep = down.abs() > across.abs() * math.tan(3 * math.pi / 8)
    level = (size > beside(0, -1)) & (size >= beside(0, 1))
    upright = (size > beside(-1, 0)) & (size >= beside(1, 0))
    falling = (size > beside(-1, -1)) & (size > beside(1, 1))
    rising = (size > beside(-1, 1)) & (size > beside(1, -1))
    slanted = torch.where((across < 0) ^ (down < 0), rising, falling)
    return torch.where(flat, level, torch.where(steep, upright, slanted))


def distances(points: Tensor, most: int) -> Tensor:
    """Return how far each place is from the nearest point of bool [N, 1, H, W], in pixels, at most ``most``.

    Differs: the exact Euclidean distance; the published programs take OpenCV's approximation, off by some per cent.
    """
    nearest = torch.where(points, 0.0, float(most * most))
    for down, across in ((0, 1), (1, 0)):
        wide = extend(nearest, down * most, across * most, "nearest")
        height, width = nearest.shape[-2:]
        best = nearest
        for k in range(-most, most + 1):
            i, j = down * (most + k), across * (most + k)
            best = torch.minimum(best, wide[..., i : i + height, j : j + width] + k * k)
        nearest = best
    return nearest.sqrt().clamp_(max=most)


def equalized(grey_levels: Tensor) -> Tensor:
    """Return the grey levels [N, 1, H, W] spread so that each is about as frequent, whole numbers 0 … 255, each image by itself."""
    n, pixels = len(grey_levels), grey_levels[0].numel()
    levels = grey_levels.flatten(1).long()
    counts = torch.zeros(n, 256, dtype=torch.long, device=levels.device).scatter_add_(1, levels, torch.ones_like(levels))
    first = counts.gather(1, levels.amin(1, keepdim=True))
    above = counts.cumsum(1) - first
    table = (above * (255 / (pixels - first).clamp_min(1).double())).round().clamp_(0, 255).to(grey_levels.dtype)
    same = first == pixels  # one level alone stays as it is
    return torch.where(same, levels.to(grey_levels.dtype), table.gather(1, levels)).view_as(grey_levels)
