"""Random numbers that depend on a sample's seed and nothing else: not on its batch, not on the device.

Every number is a hash of its sample's seed, a stream and its place, computed with integers alone, so a batch is drawn in one go
on any device and a sample of it is drawn alike alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 0x1E3779B9
"""Separates the streams of a seed; any odd number that is far from a power of two would do."""


@dataclass(frozen=True)
class Draws:
    """Where the numbers of a batch come from.

    Attributes:
        low: int32 [N], the lower halves of the seeds.
        high: int32 [N], the upper halves.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, seeds: Tensor) -> Draws:
        """Return the draws of seeds, int64 [N]."""
        return cls(_half(seeds), _half(seeds >> 32))

    def words(self, stream: int, shape: Sequence[int]) -> Tensor:
        """Return 32 random bits for each place of [N, *shape], as int32."""
        away = (stream * STEP + 2**31) % 2**32 - 2**31  # wrapped to 32 bits, as the sums are
        low, high = _hash(_hash(self.low + away) ^ self.high), _hash(_hash(self.high - away) ^ self.low)
        places = torch.arange(math.prod(shape), dtype=torch.int32, device=self.low.device)
        mixed = _hash(places + low[:, None]).bitwise_xor_(high[:, None])
        return _hash(mixed).view(-1, *shape)

    def uniform(self, stream: int, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return numbers spread evenly over the open interval (low, high), float32 [N, *shape].

        >>> draws = Draws.of(torch.tensor([7, 8]))
        >>> alone = Draws.of(torch.tensor([8])).uniform(0, (3,))
        >>> bool((draws.uniform(0, (3,))[1] == alone[0]).all())
        True
        """
        # 23 bits and a half: exact in float32, and neither 0 nor 1
        shares = (self.words(stream, shape) >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
        return shares if (low, high) == (0.0, 1.0) else shares.mul_(high - low).add_(low)

    def normal(self, stream: int, shape: Sequence[int], mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        """Return normal numbers, float32 [N, *shape], by the transform of Box and Muller (1958).

        >>> x = Draws.of(torch.arange(4)).normal(0, (100, 100))
        >>> abs(x.mean().item()) < 0.02, abs(x.std().item() - 1) < 0.02
        (True, True)
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        pairs = self.uniform(stream, (2, half))
        radius = pairs[:, 0].log().mul_(-2.0).sqrt_().mul_(deviation)
        angle = pairs[:, 1].mul(2 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
        return (both if mean == 0.0 else both + mean).reshape(-1, *shape)

    def integers(self, stream: int, shape: Sequence[int], low: int, high: int) -> Tensor:
        """Return integers from ``low`` to ``high`` - 1, int64 [N, *shape]."""
        return self.uniform(stream, shape).mul_(high - low).long().add_(low)


def _half(words: Tensor) -> Tensor:
    """Return the lower 32 bits of int64 numbers as int32."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _hash(words: Tensor) -> Tensor:
    """Scramble int32 words: every bit of the result depends on all bits of the word (two multiplications, three folds)."""
    words = words ^ ((words >> 16) & 0xFFFF)
    words *= 0x21F0AAAD
    words ^= (words >> 15) & 0x1FFFF
    words *= 0x735A2D97
    words ^= (words >> 15) & 0x1FFFF
    return words
