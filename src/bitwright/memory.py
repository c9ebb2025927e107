"""Peak memory of activations, as a cost: each step of the network is a row, and the largest row counts.

`bitwright.lifetimes` says which tensors are held at a step. Here each gets its bytes, ⌈elements · width / 8⌉ per sample:

- a tensor that sites read has the widest of their activation widths;
- one that anything else reads (an addition, a concatenation, average pooling, the caller) has `ActivationMemory.point` bits at least:
  the fixed width at which a target keeps what is no site's input;
- one that a skipped layer reads has 32.

The widest of several sites is not a sum of terms, so such a step has a row for every choice of one reader per tensor: their maximum is
exact, and the integer program keeps them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from bitwright.costs import BYTES, Cost, show_bytes
from bitwright.errors import BudgetError
from bitwright.lifetimes import Held, Lifetimes, Step
from bitwright.policy import Bits
from bitwright.sites import Site

ROWS = 4096
"""Rows of one step that are allowed: readers of each tensor held, multiplied."""


@dataclass(frozen=True)
class MemoryRow(Cost):
    """What one step holds: ``fixed`` bytes, and (elements, least width) by site of the tensors that a site's width decides."""

    name: ClassVar[str] = "activation_memory"
    unit: ClassVar[str] = "bytes"
    suffixes: ClassVar[Mapping[str, int]] = BYTES

    step: str = "nothing"
    fixed: int = 0
    tensors: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the bytes of the tensors that have the site's activation width."""
        return sum(_bytes(elements, max(bits.a, least)) for elements, least in self.tensors.get(site.name, ()))


@dataclass(frozen=True)
class ActivationMemory(Cost):
    """Peak of the bytes of activations held at once, for one sample; see this module for what counts.

    Attributes:
        lifetimes: of the traced network.
        point: width of what something that is no site reads; 32 where no activation is quantized.

    >>> held = (Held(64, ("a",)), Held(64, ("b",)), Held(10, point=True))
    >>> cost = ActivationMemory(Lifetimes(held, (Step("a", (0, 1)), Step("b", (1, 2)))))
    >>> a, b = (Site(name, "linear", (name,), (64, 64), 1, 1, 1, 4096, 4096, 64, 0) for name in "ab")
    >>> cost.total([a, b], {"a": Bits(8, 8), "b": Bits(8, 2)})
    80
    """

    name: ClassVar[str] = "activation_memory"
    unit: ClassVar[str] = "bytes"
    suffixes: ClassVar[Mapping[str, int]] = BYTES

    lifetimes: Lifetimes
    point: int = 8

    @cached_property
    def _rows(self) -> tuple[MemoryRow, ...]:
        return tuple(row for step in self.lifetimes.steps for row in self._of(step)) or (MemoryRow(),)

    @property
    def rows(self) -> tuple[Cost, ...]:
        """One row a step, or several where more than one site reads a tensor."""
        return self._rows

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the most bytes that the site's width decides at any step; the terms of a peak are those of its rows."""
        return max(row(site, bits) for row in self._rows)

    def show(self, total: int, sites: Iterable[Site]) -> str:
        """Return the peak in decimal units."""
        return show_bytes(total)

    def in_float(self, sites: Iterable[Site]) -> int:
        """Return the peak where everything is float32, points as well."""
        sites = tuple(sites)
        return ActivationMemory(self.lifetimes, 32).total(sites, dict.fromkeys((site.name for site in sites), Bits(32, 32)))

    def peak(self, sites: Iterable[Site], policy: Mapping[str, Bits]) -> str:
        """Return the name of the step that holds the most."""
        sites = tuple(sites)
        return max(self._rows, key=lambda row: row.total(sites, policy)).step

    def _of(self, step: Step) -> list[MemoryRow]:
        tensors = [self.lifetimes.tensors[i] for i in step.held]
        shared = [tensor for tensor in tensors if len(tensor.sites) > 1]
        count = math.prod(len(tensor.sites) for tensor in shared)
        if count > ROWS:
            asked = f"activation_memory: at '{step.name}', {len(shared)} tensors that several sites read make {count} rows"
            raise BudgetError(f"{asked}, more than {ROWS}; tie sites that read the same tensor")
        fixed = sum(_bytes(tensor.elements, self._least(tensor)) for tensor in tensors if not tensor.sites)
        alone = [(tensor.sites[0], tensor) for tensor in tensors if len(tensor.sites) == 1]
        rows = []
        for readers in itertools.product(*(tensor.sites for tensor in shared)):
            of_site: dict[str, tuple[tuple[int, int], ...]] = {}
            for site, tensor in (*alone, *zip(readers, shared, strict=True)):
                of_site[site] = (*of_site.get(site, ()), (tensor.elements, self._least(tensor)))
            rows.append(MemoryRow(step.name, fixed, of_site))
        return rows

    def _least(self, tensor: Held) -> int:
        return max(tensor.least, self.point if tensor.point else 0)


def _bytes(elements: int, width: int) -> int:
    return (elements * width + 7) // 8
