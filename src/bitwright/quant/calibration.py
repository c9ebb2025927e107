"""Where a step size starts: min-max, percentile or least squares over what a tensor holds."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.quant.functional import (
    SIGNED_MAX,
    SIGNED_MIN,
    SIGNED_MIN_NARROW,
    UNSIGNED_MAX,
    bounds,
    codes,
    fake_quantize,
    to_power_of_two,
)

Rule = Literal["minmax", "percentile", "mse"]

TINY = 1e-8
"""The smallest step size: an all-zero channel gets it."""
PERCENTILE = 0.999
"""Share of magnitudes that the percentile rule keeps inside the clip."""
CANDIDATES = 80
"""Step sizes that the least-squares rule tries between a fiftieth of the min-max step and 1.2 of it."""
SAMPLE = 1 << 18
"""Values of a tensor that a per-tensor calibration looks at; of more, those below the tail are thinned out evenly."""
TAIL = 0.5
"""The tail is what is larger than this share of the largest magnitude: a step is lost or won on few values, which thinning would miss."""


def is_signed(x: Tensor) -> bool:
    """Return whether a tensor holds negative values, so that its grid needs negative codes.

    >>> is_signed(torch.tensor([0.0, 2.0])), is_signed(torch.tensor([-0.1, 2.0]))
    (False, True)
    """
    return bool((x < 0).any())


def calibrate(x: Tensor, bits: int, *, signed: bool = True, narrow: bool = False, axis: int | None = None, rule: Rule = "mse") -> Tensor:
    """Return the step size that a rule chooses for a tensor.

    Args:
        x: values, any shape, finite.
        bits: width, 1 to 8.
        signed: whether the grid has negative codes.
        narrow: whether the grid is symmetric.
        axis: one step size for each index of this axis; None for one in all.
        rule: ``"minmax"`` covers the largest magnitude, ``"percentile"`` all but the largest thousandth, ``"mse"`` has the
            least squared error over a line of candidates.

    Returns:
        Positive step sizes: 0-dimensional, or of ``x``'s rank with 1 everywhere but at ``axis``.

    Raises:
        BitwrightError: the rule is unknown, or the tensor is empty or not finite.

    >>> calibrate(torch.tensor([-2.0, 1.0]), 2, rule="minmax")
    tensor(1.)
    """
    if rule not in ("minmax", "percentile", "mse"):
        raise BitwrightError(f"calibration rule '{rule}' is unknown; use minmax, percentile or mse")
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise BitwrightError("calibration got a tensor that is empty or holds values that are not finite; check the calibration data")
    rows, counts = _rows(x.detach().float(), axis)
    widest = _minmax(rows, bits, signed=signed, narrow=narrow)
    if rule == "percentile":
        kept = _quantile(rows.abs(), counts)
        widest = _minmax(rows.clamp(-kept, kept), bits, signed=signed, narrow=narrow)
    step = widest.clamp_min(TINY)
    if rule == "mse":
        step = _least_squares(rows, counts, step, bits, signed=signed, narrow=narrow)
    if axis is None:
        return step[0]
    shape = [1] * x.dim()
    shape[axis] = -1
    return step.view(shape)


def power_of_two_steps(x: Tensor, step: Tensor, bits: int, *, signed: bool = True, narrow: bool = False) -> Tensor:
    """Return for each step size the power of two around it that has the least squared error on the tensor.

    Args:
        x: values that the steps were calibrated on.
        step: what `calibrate` returned: one step, or one for each index of an axis.
        bits: width, 1 to 8.
        signed: whether the grid has negative codes.
        narrow: whether the grid is symmetric.

    >>> power_of_two_steps(torch.tensor([0.0, 2.5, 5.0]), torch.tensor(1.5), 2, signed=False)
    tensor(2.)
    """
    near = to_power_of_two(step)
    best, least = near, None
    for candidate in (near, near * 2, near / 2):
        error = (fake_quantize(x.detach().float(), candidate, bits, signed=signed, narrow=narrow) - x).square().sum_to_size(step.shape)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best, least = torch.where(better, candidate, best), error if least is None else torch.minimum(error, least)
    return best


def _rows(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the values as one row for each step size, and how many values each of them stands for; None is one."""
    if axis is not None:
        return x.movedim(axis, 0).reshape(x.shape[axis], -1), None
    flat = x.reshape(-1)
    if flat.numel() <= SAMPLE:
        return flat[None], None
    extremes = torch.stack(flat.aminmax())
    bound = TAIL * extremes.abs().amax()
    every = math.ceil(flat.numel() / SAMPLE)
    body, tail = flat[::every], flat[flat.abs() > bound]
    body, thin = body[body.abs() <= bound], math.ceil(tail.numel() / SAMPLE)
    tail = tail[:: max(1, thin)]
    counts = torch.cat([torch.full_like(body, every), torch.full_like(tail, thin), torch.ones_like(extremes)])
    return torch.cat([body, tail, extremes])[None], counts


def _quantile(magnitudes: Tensor, counts: Tensor | None) -> Tensor:
    """Return for each row the magnitude that the percentile rule keeps."""
    if counts is None:
        return magnitudes.kthvalue(max(1, math.ceil(PERCENTILE * magnitudes.shape[1])), dim=1).values[:, None]
    ordered, order = magnitudes.sort(1)
    seen = counts[order].double().cumsum(1)
    place = (seen < PERCENTILE * seen[:, -1:]).sum(1, keepdim=True)
    return ordered.gather(1, place)


def _minmax(rows: Tensor, bits: int, *, signed: bool, narrow: bool) -> Tensor:
    """Return for each row the step whose grid reaches its extremes; a grid of one sign ignores the other."""
    if not signed:
        return rows.amax(1).clamp_min(0) / UNSIGNED_MAX[bits]
    lowest = (SIGNED_MIN_NARROW if narrow else SIGNED_MIN)[bits]
    below, above = rows.amin(1).clamp_max(0) / lowest, rows.amax(1).clamp_min(0) / SIGNED_MAX[bits]
    return torch.maximum(below, above)


def _least_squares(rows: Tensor, counts: Tensor | None, widest: Tensor, bits: int, *, signed: bool, narrow: bool) -> Tensor:
    """Return for each row the candidate step of least squared error."""
    best, least = widest, torch.full_like(widest, math.inf)
    low, high = bounds(bits, rows, signed=signed, narrow=narrow)
    error = torch.empty_like(rows)
    for k in range(1, CANDIDATES + 1):
        step = (widest * (0.02 + 1.18 * k / CANDIDATES)).clamp_min(TINY)
        if signed and bits == 1:
            error = codes(rows, step[:, None], low, high, True)
        else:  # the codes in place: this loop is what a calibration costs
            torch.div(rows, step[:, None], out=error).round_().clamp_(low, high)
        squares = error.mul_(step[:, None]).sub_(rows).square_()
        squared = (squares if counts is None else squares.mul_(counts)).sum(1)
        better = squared < least
        best, least = torch.where(better, step, best), torch.where(better, squared, least)
    return best
