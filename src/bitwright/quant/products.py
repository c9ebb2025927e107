"""A layer as a matrix product: every output value is a few weights times the inputs that it is made of.

Convolutions of any dimension, stride, padding, dilation and grouping, transposed ones too, and linear layers. With G groups, K
inputs and R outputs a group, weights are columns ``[G, K, R]``, and the inputs of S output positions are rows ``[G, S, K]``; the K
inputs are ordered by kernel position, then by channel.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.quant.modules import Op

ROWS = 4096
"""Output positions whose inputs are gathered at once."""


@dataclass(frozen=True)
class Product:
    """The matrix product that a layer computes.

    Attributes:
        op: what the layer computes.
        shape: the shape of its weight.

    >>> product = Product(Op.of(torch.nn.Conv2d(4, 6, 3, groups=2)), (6, 2, 3, 3))
    >>> product.columns(torch.zeros(6, 2, 3, 3)).shape
    torch.Size([2, 18, 3])
    """

    op: Op
    shape: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's extent; a linear layer has none."""
        return self.shape[2:]

    @property
    def inputs(self) -> int:
        """The number K of inputs of one output value."""
        channels = self.shape[0] // self.op.groups if self.op.kind == "transposed" else self.shape[1]
        return channels * math.prod(self.kernel)

    def columns(self, weight: Tensor) -> Tensor:
        """Return a weight, or anything of its shape, as ``[G, K, R]``."""
        groups, rows = self.op.groups, weight.shape[0] // self.op.groups
        split = weight.reshape(groups, rows, weight.shape[1], -1)
        if self.op.kind == "transposed":  # [I, R, kernel], the groups along I
            return split.permute(0, 3, 1, 2).reshape(groups, -1, weight.shape[1])
        return split.permute(0, 3, 2, 1).reshape(groups, -1, rows)

    def weight(self, columns: Tensor) -> Tensor:
        """Return columns as a weight: the inverse of `columns`."""
        groups, outputs = self.op.groups, columns.shape[2]
        split = columns.reshape(groups, math.prod(self.kernel), -1, outputs)
        order = (0, 2, 3, 1) if self.op.kind == "transposed" else (0, 3, 2, 1)
        return split.permute(order).reshape(self.shape)

    def positions(self, output: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return some positions of an output ``[N, …]``, drawn without repetition: all of them where there are no more."""
        total = output.numel() // self.channels(output)
        drawn = torch.randperm(total, generator=generator)[:count] if count < total else torch.arange(total)
        return drawn.to(output.device)

    def channels(self, output: Tensor) -> int:
        """Return the number of an output's channels."""
        return output.shape[-1] if self.op.kind == "linear" else self._batched(output).shape[1]

    def outputs(self, output: Tensor, positions: Tensor) -> Tensor:
        """Return an output's values at positions, ``[G, S, R]``."""
        last = output if self.op.kind == "linear" else self._batched(output).movedim(1, -1)
        extent = last.shape[:-1]
        rows = last[torch.unravel_index(positions, extent)]
        return rows.reshape(len(positions), self.op.groups, -1).movedim(1, 0)

    def moments(self, x: Tensor, output_shape: torch.Size, positions: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the second moments of the inputs and their products with targets, averaged over output positions.

        Args:
            x: the layer's input.
            output_shape: the shape of its output.
            positions: of the output, from `positions`.
            targets: values there, ``[G, S, R]``, or None.

        Returns:
            ``[G, K, K]``, and ``[G, K, R]`` or None.
        """
        groups = self.op.groups
        gram = x.new_zeros(groups, self.inputs, self.inputs)
        cross = None if targets is None else x.new_zeros(groups, self.inputs, targets.shape[2])
        table, places = self._table(x, output_shape, positions)
        for start in range(0, len(positions), ROWS):
            rows = self._rows(table, [place[start : start + ROWS] for place in places])
            gram.baddbmm_(rows.mT, rows)
            if cross is not None and targets is not None:
                cross.baddbmm_(rows.mT, targets[:, start : start + ROWS])
        return gram / len(positions), None if cross is None else cross / len(positions)

    def _rows(self, table: Tensor, places: list[Tensor]) -> Tensor:
        """Return the inputs of some output positions, ``[G, S, K]``."""
        rows = torch.stack([table[place] for place in places], 1)
        split = rows.reshape(len(rows), len(places), self.op.groups, -1)
        return split.permute(2, 0, 1, 3).reshape(self.op.groups, len(rows), -1)

    def _table(self, x: Tensor, output_shape: torch.Size, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the input's values by pixel, with a row of zeros for what lies outside, and the row of each kernel position."""
        if self.op.kind == "linear":
            return x.reshape(-1, x.shape[-1]), [positions]
        x, padding = self._batched(x), self._padding()
        if self.op.padding_mode != "zeros":
            x, padding = F.pad(x, self.op.padding_both, mode=self.op.padding_mode), (0,) * self.op.dims
        table = x.new_zeros(x.numel() // x.shape[1] + 1, x.shape[1])
        table[:-1] = x.movedim(1, -1).reshape(-1, x.shape[1])
        extent = output_shape[-self.op.dims :]
        image, *at = torch.unravel_index(positions, (x.shape[0], *extent))
        places = []
        for offset in itertools.product(*map(range, self.kernel)):
            place, inside = image, torch.ones_like(image, dtype=torch.bool)
            for k in range(self.op.dims):
                source, hit = self._source(k, at[k], offset[k], padding[k])
                inside &= hit & (source >= 0) & (source < x.shape[2 + k])
                place = place * x.shape[2 + k] + source
            places.append(torch.where(inside, place, len(table) - 1))
        return table, places

    def _source(self, k: int, at: Tensor, offset: int, padding: int) -> tuple[Tensor, Tensor]:
        """Return along one axis which input pixel an output pixel reads at a kernel position, and whether it reads any."""
        stride, dilation = self.op.stride[k], self.op.dilation[k]
        if self.op.kind == "transposed":
            source = at + padding - offset * dilation
            return source.div(stride, rounding_mode="floor"), source % stride == 0
        return at * stride + offset * dilation - padding, torch.ones_like(at, dtype=torch.bool)

    def _padding(self) -> tuple[int, ...]:
        """Return the zeros before each axis."""
        if isinstance(self.op.padding, tuple):
            return self.op.padding
        same = self.op.padding == "same"
        return tuple(dilation * (size - 1) // 2 * same for dilation, size in zip(self.op.dilation, self.kernel, strict=True))

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == self.op.dims + 2 else x[None]
