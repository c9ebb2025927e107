"""Blurs: of the lens, of frosted glass, of motion and of zooming."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import DEFOCUS_BLUR, GAUSSIAN_BLUR, GLASS_BLUR, MOTION_BLUR, ZOOM_BLUR, scale_of
from bitwright.data.corruptions.windows import blur, disk, enlarge, trail, window_sum


def gaussian_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smooth by a normal density."""
    return blur(images, GAUSSIAN_BLUR[scale_of(images)][severity - 1])


def defocus_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smooth by a disk, the picture that a lens out of focus makes of a point."""
    return window_sum(images, disk(*DEFOCUS_BLUR[scale_of(images)][severity - 1]), "mirror")


def motion_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smear every image along a line of its own, -45 to 45 degrees from the horizontal."""
    radius, sigma = MOTION_BLUR[scale_of(images)][severity - 1]
    return trail(images, int(radius), sigma, draws.uniform(0, (), -45, 45))


def zoom_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Average the image and its enlargements about the centre."""
    stop, step = ZOOM_BLUR[scale_of(images)][severity - 1]
    factors = np.arange(1, stop, step)
    height, width = images.shape[-2:]
    total = images.clone()
    for factor in factors:
        total += enlarge(images, float(factor))[..., :height, :width]
    return total / (len(factors) + 1)


def glass_blur(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smooth, let pixels take the place of near ones, and smooth again.

    The published programs go through the pixels from the last to the first and let each take the value of a random neighbour,
    which may itself have taken one before (they mean to swap the two, but copy one over the other). The chains of pixels so
    formed are followed here by doubling, all at once.
    """
    sigma, reach, times = GLASS_BLUR[scale_of(images)][severity - 1]
    x = blur(images, sigma).mul(255).floor_().div_(255)
    for turn in range(int(times)):
        x = _displaced(x, int(reach), draws, turn)
    return blur(x, sigma)


def _displaced(x: Tensor, reach: int, draws: Draws, turn: int) -> Tensor:
    _, channels, height, width = x.shape
    if min(height, width) <= 2 * reach:
        return x  # no pixel is that far from every edge
    move = draws.integers(turn, (2, height, width), -reach, reach)
    rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
    moved = ((rows > reach) & (rows <= height - reach))[:, None] & ((columns > reach) & (columns <= width - reach))
    target = (rows[:, None] + move[:, 0]) * width + columns + move[:, 1]
    own = (rows[:, None] * width + columns).flatten()
    target = torch.where(moved, target, own.view(height, width)).flatten(1)
    # what a pixel takes was itself replaced before, if it comes later and is one of those that move
    goes_on = moved.flatten()[target] & (target > own)
    onward = torch.where(goes_on, target, own)
    for _ in range(math.ceil(math.log2(height * width))):
        following = onward.gather(1, onward)
        if torch.equal(following, onward):
            break
        onward = following
    source = target.gather(1, onward)
    return x.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(x)
