"""Does a runtime miscompute activations of few bits? What it gives is compared with what the rounding of floats alone could change.

A step of a grid of few bits is a large part of it, so a bound on outputs that allows for a value on the border of two codes allows for
anything. Where all scales are powers of two there is no such border: the outputs are equal, but for the rounding of the last layer.
Elsewhere few values lie there, and most samples have none: the median over samples tells a runtime that computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.exporters import Example
from bitwright.exporters._graph import Program, run
from bitwright.exporters._parity import is_exact

EQUAL = 1e-4
"""How far outputs of integers may be off, as a share of the largest, for a result that is scaled in another order."""
TYPICAL = 1e-3
"""How far the outputs of half of the samples may always be off, as a share of the largest."""
DRAWS = 4
ROUNDING = {16: 2.0**-8, 32: 2.0**-20}
"""How far a value may be off before it is rounded to a grid, as a share of the largest: by sums in bfloat16, or in float32 in any order."""


@dataclass(frozen=True)
class Allowed:
    """How far the outputs of any sample, and of half of them, may be off, as a share of the largest."""

    largest: float
    typical: float = np.inf


def allowed(program: Program, example: Example, wanted: Sequence[Tensor], asked: float) -> Allowed:
    """Return the bounds of a network: what was asked for, and less where activations have fewer than 8 bits."""
    widths = [bits for _, bits in program.layers.values()]
    if all(bits.a >= 8 for bits in widths):
        return Allowed(asked)
    if is_exact(program):
        return Allowed(min(asked, EQUAL))
    size = ROUNDING[16 if any(16 in bits for bits in widths) else 32]
    draws = [typical(wanted, [out.numpy() for out in run(program, example, _Jitter(size, seed))[0]]) for seed in range(DRAWS)]
    return Allowed(asked, max(TYPICAL, 2 * max(draws)))


def typical(wanted: Sequence[Tensor], found: Sequence[Any]) -> float:
    """Return the median over samples of the largest difference of an output, as a share of the largest output.

    >>> typical([torch.tensor([[4.0], [2.0], [1.0]])], [np.float32([[4], [3], [3]])])
    0.25
    """
    shares = [0.0]
    for a, b in zip(wanted, found, strict=True):
        gaps = np.abs(a.double().numpy() - b).reshape(len(a) if a.dim() else 1, -1).max(1, initial=0.0)
        shares.append(float(np.median(gaps)) / max(float(a.abs().max()), 1e-30) if gaps.size else 0.0)
    return max(shares)


class _Jitter:
    """Moves values by up to a share of the largest, but for zeros, which a ReLU gives exactly."""

    def __init__(self, size: float, seed: int):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        return x + self.size * x.abs().amax() * (2 * torch.rand(x.shape, generator=self.generator) - 1) * (x != 0)
