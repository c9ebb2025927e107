"""Noise: of the sensor, of photons, of dead pixels, and speckle."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import GAUSSIAN_NOISE, IMPULSE_NOISE, SHOT_NOISE, SPECKLE_NOISE, scale_of

GREYS = 255
MOST = 64
"""Photons beyond those of the grey level below that a value can hold: far more than two expected ever bring."""


def gaussian_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add normal noise to every value: x + σ n."""
    deviation = GAUSSIAN_NOISE[scale_of(images)][severity - 1]
    return draws.normal(0, images.shape[1:], deviation=deviation).add_(images)


def speckle_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add normal noise in proportion to the value: x + x σ n."""
    deviation = SPECKLE_NOISE[scale_of(images)][severity - 1]
    return draws.normal(0, images.shape[1:], deviation=deviation).add_(1).mul_(images)


def impulse_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Turn a share of the values 0 or 1, half of them each ("salt and pepper")."""
    share = IMPULSE_NOISE[scale_of(images)][severity - 1]
    places = draws.uniform(0, images.shape[1:])
    salted = torch.where(places < share, 1.0, images)
    return torch.where(places < share / 2, 0.0, salted)


def shot_noise(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Count photons: Poisson(c x) / c.

    Exact for every rate: the counts of the grey level below (one of 256 tables) and of what a value has above it are drawn
    apart and added, for the sum of two Poisson numbers is one.
    """
    photons = int(SHOT_NOISE[scale_of(images)][severity - 1])
    level = (images * GREYS + 1e-3).floor_()
    rest = (images * GREYS - level).clamp_min_(0).mul_(photons / GREYS)
    counts = _quantiles(photons, level.long(), draws.uniform(0, images.shape[1:]))
    return (counts + _small_quantiles(rest, draws.uniform(1, images.shape[1:]))) / photons


@lru_cache(maxsize=16)
def _table(photons: int) -> Tensor:
    """Return the chances of at most k photons, float32 [256, K], for every grey level."""
    rates = torch.arange(GREYS + 1, dtype=torch.float64)[:, None] * (photons / GREYS)
    counts = torch.arange(int(photons + 12 * photons**0.5 + 20), dtype=torch.float64)
    chances: Tensor = torch.special.gammaincc(counts + 1, rates)
    return chances.float()


def _quantiles(photons: int, level: Tensor, share: Tensor) -> Tensor:
    """Return the least counts k with P(at most k) >= share, for the rates of grey levels, as float32.

    The guess of Cornish and Fisher (1938) is put right by the table, one up or down at a time.
    """
    table = _table(photons).to(level.device)
    width = table.shape[1]
    table, start = table.flatten(), level * width
    rate = level * (photons / GREYS)
    normal: Tensor = torch.special.ndtri(share)
    count = (rate + rate.sqrt() * normal + (normal.square() - 1) / 6).round_().long().clamp_(0, width - 1)
    while True:
        more = (share > table[start + count]) & (count < width - 1)
        less = (count > 0) & (share <= table[start + (count - 1).clamp_min(0)])
        if not bool((more | less).any()):
            return count.to(share.dtype)
        count = count + more.long() - less.long()


def _small_quantiles(rate: Tensor, share: Tensor) -> Tensor:
    """Return the same for small rates of any value, term by term."""
    term = torch.exp(-rate)
    chance, count = term.clone(), torch.zeros_like(rate)
    for k in range(1, MOST):
        more = share > chance
        if not bool(more.any()):
            break
        count += more
        term = term * rate / k
        chance += term
    return count
