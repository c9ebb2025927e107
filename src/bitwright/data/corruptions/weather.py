"""Weather: snow, frost and fog."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.ice import ice
from bitwright.data.corruptions.severities import FOG, FROST, SNOW, scale_of
from bitwright.data.corruptions.windows import enlarge, grey, trail


def snow(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Whiten the image and let flakes fall over it, all along one direction an image."""
    mean, deviation, size, least, radius, sigma, share = SNOW[scale_of(images)][severity - 1]
    height, width = images.shape[-2:]
    flakes = enlarge(draws.normal(0, (1, height, width), mean, deviation), size)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp_(0, 1)
    flakes = trail(flakes, int(radius), sigma, draws.uniform(1, (), -135, -45))
    flakes = flakes[..., :height, :width].mul(255).round_().div_(255)
    whiter = torch.maximum(images, grey(images) * 1.5 + 0.5)
    return images * share + whiter * (1 - share) + flakes + flakes.flip(2, 3)


def frost(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Lay ice over the image.

    Differs: the published programs cut the ice from six photographs; here each image gets ice of its own, drawn from its seed.
    """
    share, strength = FROST[scale_of(images)][severity - 1]
    frozen = ice(draws, images.shape[-2:], scale_of(images))
    return images * share + (frozen if images.shape[1] == 3 else grey(frozen)) * strength


def fog(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add a cloud, thickest at its own whitest place, and scale so that the brightest value stays where it was."""
    thickness, fading = FOG[scale_of(images)][severity - 1]
    height, width = images.shape[-2:]
    size = 1 << max(1, math.ceil(math.log2(max(height, width))))
    clouds = cloud(draws, size, fading)[:, None, :height, :width]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + clouds * thickness) * (brightest / (brightest + thickness))


def cloud(draws: Draws, size: int, fading: float) -> Tensor:
    """Return clouds in 0 … 1, [N, size, size], by the diamond-square algorithm (Fournier et al., 1982) on a torus.

    Args:
        draws: one cloud each.
        size: a power of two.
        fading: the range of what is added at random falls by this factor from a scale to the next finer one, squared.
    """
    n = len(draws.low)
    field = torch.zeros(n, size, size, device=draws.low.device)
    step, reach, stream = size, 100.0, 16
    while step >= 2:
        half, count = step // 2, size // step
        bumps = draws.uniform(stream, (3, count, count), -1, 1).mul_(reach * reach)
        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        middles = (pairs + pairs.roll(-1, 2)) / 4 + bumps[:, 0]
        field[:, half::step, half::step] = middles
        above, beside = (corners + corners.roll(-1, dim) for dim in (2, 1))
        field[:, ::step, half::step] = (middles + middles.roll(1, 1) + above) / 4 + bumps[:, 1]
        field[:, half::step, ::step] = (middles + middles.roll(1, 2) + beside) / 4 + bumps[:, 2]
        step, reach, stream = half, reach / fading, stream + 1
    low, high = (bound(field, (1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    return (field - low) / (high - low).clamp_min(1e-12)
