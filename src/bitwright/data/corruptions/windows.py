"""Windows over images: sums over neighbours, resampling and bilinear look-ups, exact alike whatever the batch.

A matrix product or a convolution may round otherwise in another batch; sums of shifted images cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Edge = Literal["nearest", "reflect", "mirror", "wrap"]
"""What lies beyond the edge, in scipy's words: aa|abc (nearest), ba|abc (reflect), cb|abc (mirror), bc|abc (wrap)."""
NEGLIGIBLE = 1e-7


def beyond(index: Tensor, length: int, edge: Edge) -> Tensor:
    """Bring positions of any size back to 0 … length - 1.

    >>> [beyond(torch.arange(-2, 5), 3, edge).tolist() for edge in ("nearest", "reflect", "mirror", "wrap")]
    [[0, 0, 0, 1, 2, 2, 2], [1, 0, 0, 1, 2, 2, 1], [2, 1, 0, 1, 2, 1, 0], [1, 2, 0, 1, 2, 0, 1]]
    """
    if edge == "nearest":
        return index.clamp(0, length - 1)
    if edge == "wrap":
        return index.remainder(length)
    if edge == "reflect":
        index = index.remainder(2 * length)
        return torch.where(index < length, index, 2 * length - 1 - index)
    if length == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * length - 2)
    return torch.where(index < length, index, 2 * length - 2 - index)


def extend(x: Tensor, down: int, across: int, edge: Edge) -> Tensor:
    """Return [..., H, W] with ``down`` rows and ``across`` columns more on either side."""
    for dim, width in ((-2, down), (-1, across)):
        if width:
            places = torch.arange(-width, x.shape[dim] + width, device=x.device)
            x = x.index_select(dim, beyond(places, x.shape[dim], edge))
    return x


def window_sum(x: Tensor, kernel: NDArray[np.float64], edge: Edge) -> Tensor:
    """Return the sum over a window weighted by ``kernel`` [odd, odd] around every pixel of [..., H, W] (a correlation)."""
    down, across = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = extend(x, down, across, edge)
    total = torch.zeros_like(x)
    height, width = x.shape[-2:]
    for i, j in zip(*np.nonzero(np.abs(kernel) > NEGLIGIBLE), strict=True):
        total += padded[..., i : i + height, j : j + width] * float(kernel[i, j])
    return total


def gaussian_kernel(sigma: float, radius: int) -> NDArray[np.float64]:
    """Return a normal density at -radius … radius, its sum 1, as [2 radius + 1]."""
    places = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (places / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def blur(x: Tensor, sigma: float | tuple[float, float], edge: Edge = "nearest", *, truncate: float = 4.0) -> Tensor:
    """Return [..., H, W] smoothed by a normal density cut off at ``truncate`` deviations.

    Args:
        x: images.
        sigma: the deviation in pixels, or that down and that across.
        edge: what lies beyond.
        truncate: deviations.
    """
    down, across = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    for deviation, shape in ((down, (-1, 1)), (across, (1, -1))):
        radius = int(truncate * deviation + 0.5)
        if radius:
            x = window_sum(x, gaussian_kernel(deviation, radius).reshape(shape), edge)
    return x


def disk(radius: float, softness: float) -> NDArray[np.float64]:
    """Return a disk of a radius in pixels, smoothed by a small normal density of deviation ``softness``; its sum is 1."""
    half, soft = (8, 1) if radius <= 8 else (int(radius), 2)
    places = np.arange(-half, half + 1)
    inside = (places[:, None] ** 2 + places[None, :] ** 2 <= radius**2).astype(np.float64)
    ring = gaussian_kernel(softness, soft)
    wide = np.pad(inside / inside.sum(), soft, mode="reflect")
    size = 2 * half + 1
    rows = sum(weight * wide[k : k + size] for k, weight in enumerate(ring))
    return np.asarray(sum(weight * rows[:, k : k + size] for k, weight in enumerate(ring)))


def resample(x: Tensor, dim: int, places: NDArray[np.int64], weights: NDArray[np.float64]) -> Tensor:
    """Return the images with one dimension made anew: entry i is the sum over t of ``weights[i, t]`` · x at ``places[i, t]``."""
    shape = [1] * x.ndim
    shape[dim] = len(places)
    total: Tensor | None = None
    for t in range(places.shape[1]):
        weight = torch.tensor(weights[:, t], dtype=x.dtype, device=x.device).view(shape)
        part = x.index_select(dim, torch.tensor(places[:, t], device=x.device)) * weight
        total = part if total is None else total + part
    assert total is not None
    return total


def enlarge(x: Tensor, factor: float) -> Tensor:
    """Return the middle of [..., H, W], enlarged linearly by ``factor`` >= 1 to its size or some pixels more.

    The corner pixels of the middle stay corner pixels, as in scipy's ``zoom``.
    """
    for dim in (-2, -1):
        length = x.shape[dim]
        inner = math.ceil(length / factor)
        outer = max(length, round(inner * factor))
        at = np.arange(outer) * ((inner - 1) / max(1, outer - 1))
        below = np.minimum(np.floor(at).astype(np.int64), max(0, inner - 2))
        share = at - below
        places = np.stack([below, np.minimum(below + 1, inner - 1)], 1) + (length - inner) // 2
        x = resample(x, dim, places, np.stack([1 - share, share], 1))
    return x


def look_up(x: Tensor, rows: Tensor, columns: Tensor, edge: Edge) -> Tensor:
    """Return [N, C, H, W] at fractional places (rows and columns [N, H, W], pixels), linearly between the four neighbours."""
    top, left = rows.floor(), columns.floor()
    down, across = (rows - top).unsqueeze(1), (columns - left).unsqueeze(1)
    top, left = top.long(), left.long()
    corners = [[_at(x, top + i, left + j, edge) for j in (0, 1)] for i in (0, 1)]
    upper, lower = (pair[0] * (1 - across) + pair[1] * across for pair in corners)
    return upper * (1 - down) + lower * down


def _at(x: Tensor, rows: Tensor, columns: Tensor, edge: Edge) -> Tensor:
    """Return [N, C, H, W] at whole places, int64 [N, H, W]."""
    n, channels, height, width = x.shape
    index = beyond(rows, height, edge) * width + beyond(columns, width, edge)
    return x.flatten(2).gather(2, index.view(n, 1, -1).expand(-1, channels, -1)).view(n, channels, *rows.shape[1:])


def shifted(x: Tensor, down: Tensor, across: Tensor, edge: Edge) -> Tensor:
    """Return each image of [N, C, H, W] moved by whole pixels, int64 [N] each."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) - down[:, None]
    columns = torch.arange(width, device=x.device) - across[:, None]
    return _at(x, rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1), edge)


def trail(x: Tensor, radius: int, sigma: float, angles: Tensor) -> Tensor:
    """Return [N, C, H, W] smeared along a line to one side, each image in its own direction.

    Args:
        x: images.
        radius: the line has 2 · radius + 1 pixels.
        sigma: deviation of the one-sided normal weights along it.
        angles: [N], degrees.
    """
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    sine, cosine = (function(angles.double() * (math.pi / 180)) for function in (torch.sin, torch.cos))
    total = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        if weight > NEGLIGIBLE:
            moves = [-torch.ceil(i * part - 0.5).long() for part in (sine, cosine)]
            total += shifted(x, moves[0], moves[1], "nearest") * float(weight)
    return total


def grey(x: Tensor, weights: Sequence[float] = (0.299, 0.587, 0.114)) -> Tensor:
    """Return the luminance of [N, C, H, W] as [N, 1, H, W]; one channel is its own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (x[:, k : k + 1] * weight for k, weight in enumerate(weights))
    return red + green + blue
