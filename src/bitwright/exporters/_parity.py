"""Does a file compute what the network computes? Compared layer by layer, in steps of each grid, and at the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bitwright.errors import ExportError
from bitwright.exporters._emission import PointRecord
from bitwright.exporters._graph import Program, averaged_axes, kind_of
from bitwright.quant.points import OnPoint
from bitwright.quant.quantizers import LSQActivation, LSQWeight

_EXACT = """mark conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear relu relu6 hardtanh clamp add cat getitem
max_pool1d max_pool2d max_pool3d view reshape flatten unflatten permute transpose t squeeze unsqueeze slice select pad mean
constant_pad_nd adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d chunk split"""
EXACT = frozenset(_EXACT.split())
"""Calls that compute sums of few-bit integers exactly, in whatever order."""
LAST = 0.01
"""How far outputs may be off, as a share of the largest, where all that is on a grid before them is the network's own."""
MOST = 0.3
"""How far outputs of a chain may be off unless more is asked for, as a share of the largest, however coarse the grids."""
Array = NDArray[np.int64]
Steps = Annotated[int, Field(ge=0)]
"""How many steps codes may differ by."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""How far outputs may differ, as a share of the largest: all of it is what a file of zeros is off by."""


@dataclass(frozen=True)
class Row:
    """One tensor on a grid: its bits, how many values it has, how many differ, and by how many steps at most and in all."""

    name: str
    bits: int
    values: int
    differing: int
    steps: int
    total: int

    def allowed(self, steps: int) -> float:
        """Return how many steps its codes may differ by in all: on average the share of the grid that so many steps of 8 bits are.

        A step is a small part of a grid of 8 bits and the whole of one of 1 bit, where a bound of a step for each code is no bound. One
        code may always differ: it may lie on the border of two.

        >>> Row("x", 8, 1000, 0, 0, 0).allowed(1), Row("x", 1, 2550, 0, 0, 0).allowed(1), Row("x", 1, 10, 0, 0, 0).allowed(1)
        (1000.0, 10.0, 1)
        """
        return max(steps, steps * self.values * ((1 << self.bits) - 1) / 255)


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Attributes:
        exact: whether equality bit for bit was asked for: all steps are powers of two, and every call sums integers.
        alone: each tensor when the file is given the network's own tensors before it.
        chained: each tensor when the file computes everything from the example.
        outputs: the largest difference of the outputs, as a share of the largest output.
        difference: the largest difference of the outputs itself.
        agreement: the share of samples with the same largest output; 1 where outputs are no ``[n, classes]``.
        last: the outputs when the file is given the network's own tensors before them, as a share of the largest output.
    """

    exact: bool
    alone: tuple[Row, ...]
    chained: tuple[Row, ...]
    outputs: float
    difference: float
    agreement: float
    last: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return JSON-able values."""
        return {**asdict(self), "alone": [asdict(row) for row in self.alone], "chained": [asdict(row) for row in self.chained]}


def is_exact(program: Program) -> bool:
    """Return whether integers can give a program's outputs bit for bit."""
    steps = []
    for mark in program.marks:
        quantizer = mark.quantizer
        steps.append((isinstance(quantizer, (LSQActivation, LSQWeight)) and quantizer.power_of_two) or isinstance(quantizer, OnPoint))
    kinds = {kind_of(node) for node in program.graph.nodes if isinstance(node.meta.get("val"), (Tensor, list, tuple))} - {""}
    widths = all(bits.w <= 8 and bits.a <= 8 for _, bits in program.layers.values())
    return bool(steps) and all(steps) and widths and kinds <= EXACT and all(_halves(node) for node in program.graph.nodes)


def _halves(node: torch.fx.Node) -> bool:
    """Return whether a mean is over a power of two of values; true for all else."""
    if "mean" not in kind_of(node) and "avg_pool" not in kind_of(node):
        return True
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if kind_of(node) == "mean":
        sizes = [(before[axis], 1) for axis in averaged_axes(node)]
    else:
        sizes = list(zip(before[2:], after[2:], strict=True))
    return all(isinstance(a, int) and a % b == 0 and (a // b) & (a // b - 1) == 0 for a, b in sizes)


def codes_of(values: Tensor, point: PointRecord) -> Array:
    """Return the integers that values on a grid stand for, moved by the code of zero."""
    return np.rint(values.detach().numpy() / np.float32(point.step)).astype(np.int64) + point.zero


def rows(points: Sequence[PointRecord], wanted: Mapping[str, Array], found: Mapping[str, Array]) -> tuple[Row, ...]:
    """Compare the codes of each point, by node."""
    result = []
    for point in points:
        gap = np.abs(wanted[point.node] - found[point.node].astype(np.int64))
        result.append(Row(point.name, point.bits, int(gap.size), int((gap > 0).sum()), int(gap.max(initial=0)), int(gap.sum())))
    return tuple(result)


def output_gaps(wanted: Sequence[Tensor], found: Sequence[NDArray[np.float32]]) -> tuple[float, float, float]:
    """Return the largest difference as a share of the largest output, the difference itself, and the agreement of answers."""
    largest = share = 0.0
    agreement = 1.0
    for a, b in zip(wanted, found, strict=True):
        if tuple(a.shape) != tuple(b.shape):
            raise ExportError(f"export: the file gives an output of shape {tuple(b.shape)}, the network {tuple(a.shape)}")
        gap = float(np.abs(a.double().numpy() - b.astype(np.float64)).max(initial=0.0))
        if not np.isfinite(gap):
            raise ExportError("export: the network or the file gives outputs that are nan or infinite; restore an earlier checkpoint")
        largest, share = max(largest, gap), max(share, gap / max(float(a.abs().max()), 1e-30) if a.numel() else 0.0)
        if a.dim() == 2 and a.shape[1] > 1:
            agreement = min(agreement, float((a.argmax(1).numpy() == b.argmax(1)).mean()))
    return share, largest, agreement


def allowed_outputs(program: Program, asked: float | None) -> float:
    """Return how far the outputs of a chain may differ, as a share of the largest; 0 where integers give them bit for bit.

    Unless asked otherwise that is two steps of the coarsest activation grid, no less than 5 % and no more than 30 %: a value that lies on
    the border of two codes may fall to either side, and a step of a grid of few bits is a large part of it.
    """
    if is_exact(program):
        return 0.0
    if asked is not None:
        return asked
    narrowest = min((bits.a for _, bits in program.layers.values()), default=8)
    return min(MOST, max(0.05, 2.0 / ((1 << narrowest) - 1)))


def judge(parity: Parity, steps: int, outputs: float, runtime: str) -> None:
    """Raise `ExportError` unless a comparison is within its bounds: equal where that can be, else so many steps and such a share.

    Bounds are on each code, on the codes of a tensor on average (`Row.allowed`), on the outputs given the network's own codes, and on those
    of the chain.
    """
    limit = 0 if parity.exact else steps
    bad = max((row for row in parity.alone if row.steps > limit), key=lambda row: row.steps, default=None)
    if bad is not None:
        asked = "equal codes (all scales are powers of two)" if parity.exact else f"codes within {steps} step{'s' * (steps != 1)}"
        found = f"{bad.differing} of {bad.values} values of '{bad.name}' ({bad.bits} bits) differ, by up to {bad.steps} steps"
        raise ExportError(f"export: {runtime} does not reproduce the network: asked for {asked}, and {found}; nothing was written")
    many = max((row for row in parity.alone if row.total > row.allowed(limit)), key=lambda row: row.total / row.values, default=None)
    if many is not None:
        bits = f"{many.bits} bit{'s' * (many.bits != 1)}"
        found = f"{many.differing} of {many.values} values of '{many.name}' ({bits}) differ, by {many.total} steps in all"
        raise ExportError(
            f"export: {runtime} does not reproduce the network: {found}, and {int(many.allowed(limit))} are allowed; nothing was written"
        )
    if parity.last > LAST:
        found = f"given the network's own codes, its outputs differ by {100 * parity.last:.3g} % of the largest"
        raise ExportError(
            f"export: {runtime} does not reproduce the network: {found}, and {100 * LAST:.3g} % is allowed; nothing was written"
        )
    if parity.outputs > outputs:
        found = f"{100 * parity.outputs:.3g} % of the largest (answers agree on {100 * parity.agreement:.4g} % of the example)"
        allowed = "none is allowed with scales that are powers of two" if parity.exact else f"{100 * outputs:.3g} % is allowed"
        raise ExportError(
            f"export: {runtime} does not reproduce the network: its outputs differ by {found}, and {allowed}; nothing was written"
        )
