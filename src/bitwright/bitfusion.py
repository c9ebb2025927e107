r"""Bit Fusion (Sharma et al., ISCA 2018) as two costs: cycles and energy of one input on that accelerator.

**The machine.** 16 rows of 32 Fusion Units at 500 MHz in 45 nm, with buffers of 32 KB for inputs, 64 KB for weights and 16 KB for
outputs and 192 bits a cycle to DRAM. A Fusion Unit holds 16 BitBricks of 2 × 2 bits: in a cycle it multiplies one pair of 8-bit
numbers, or :math:`(8/a)(8/w)` pairs of a and w bits. Operand widths are 2, 4, 8 (and 16, in several cycles): a width between is
carried in the next wider, and 16 is a 16-bit integer here. Sizes, clock and energies are those that the authors' simulator ships
(`Machine`).

**Cycles.** The array takes in rows of input channels and columns of output channels, tap by tap:

.. math:: C = P\,g\,K \left\lceil \frac{O/g}{32} \right\rceil \left\lceil \frac{I/g}{16\,f} \right\rceil,\qquad f = \frac{8}{a'}\frac{8}{w'}

with P output positions, g groups, K kernel taps, I input and O output channels, and :math:`a', w'` the carried widths: the formula of
the simulator, which for the first layer packs the taps into the rows as well (:math:`\lceil IK/16f \rceil` and no K outside). A layer
takes the longer of C and its DRAM traffic at 192 bits a cycle (both are double-buffered).

**Energy.** 235.1 pJ for a cycle of the array, 15 pJ for a bit from or to DRAM, and the buffers' energies for the bits they read and
write, counted as the simulator's output-stationary order does: every product reads a and w bits, every output 32 bits in and out.

A reconstruction in two points. *Traffic*: the simulator searches tilings and loop orders; here the better of two orders counts, which
read the weights once and the inputs once for every half weight buffer, or the inputs once and the weights once for every half input
buffer. *Outputs*: the simulator writes 32-bit sums to DRAM; here a tensor is written and read once at the width of the site that
reads it, so that costs stay separable. A product of two activations (attention) has no shape here: its array is taken as full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from bitwright.costs import Cost
from bitwright.errors import BudgetError
from bitwright.policy import Bits
from bitwright.sites import Site

CARRIED = (2, 4, 8, 16)
"""Widths of operands that Fusion Units multiply."""


@dataclass(frozen=True)
class Machine:
    """Sizes in Fusion Units, bits and hertz; energies in femtojoule a bit, or a cycle for the array.

    The defaults are the configuration that the authors compare with Eyeriss (``bf_e_conf.ini`` of github.com/hsharma35/bitfusion):
    energies of the array from its synthesis table (8-bit units of 2-bit bricks, 4 × 4 of them draw 3.6735 mW), those of the buffers from
    its CACTI table at 45 nm, and of DRAM from its ``stats.py``. Leakage is left out, as there.
    """

    rows: int = 16
    columns: int = 32
    hertz: int = 500_000_000
    input_buffer: int = 8 * 32_768
    weight_buffer: int = 8 * 65_536
    dram_bits: int = 192
    cycle_energy: float = 3_673_500 * 32 / 500_000_000 * 1e6
    dram_energy: float = 15_000.0
    weight_read: float = 683.701 / 32
    weight_write: float = 925.317 / 32
    input_read: float = 1903.18 / 32
    input_write: float = 3638.53 / 32
    output_read: float = 1060.97 / 32
    output_write: float = 2338.69 / 32


@dataclass(frozen=True)
class Work:
    """What one site does for one batch: cycles of the array, bits over DRAM, products, outputs, and what fills the buffers."""

    cycles: int
    weight_bits: int
    input_bits: int
    moved_bits: int
    products: int
    outputs: int


def carried(width: int, site: Site) -> int:
    """Return the operand width that carries ``width``.

    Raises:
        BudgetError: the width is float32.
    """
    if width > CARRIED[-1]:
        raise BudgetError(f"bitfusion: site '{site.name}' is at {width} bits, and Bit Fusion multiplies integers; give it 1 to 8 or 16")
    return next(known for known in CARRIED if known >= width)


def work(site: Site, bits: Bits, machine: Machine, *, first: bool = False, batch: int = 1) -> Work:
    """Return what a site does for a batch; ``first``: its kernel taps are packed into the rows.

    >>> conv = Site("conv", "conv2d", ("conv",), (128, 128, 3, 3), 1, 1, 1, 147456, 147456 * 56 * 56, 128 * 56 * 56, 0)
    >>> work(conv, Bits(4, 4), Machine(), batch=16).cycles
    3612672
    """
    w, a = carried(bits.a if site.operands == 2 else bits.w, site), carried(bits.a, site)
    # 16 bits take (16/8) cycles of an 8-bit operand
    slices = max(1, a // 8) * max(1, w // 8)
    fused = max(1, 8 // a) * max(1, 8 // w)
    products = site.macs * batch
    if site.operands == 2:
        cycles, outputs = math.ceil(products / (machine.rows * machine.columns * fused)), 0
        weights, inputs = site.acts // 2 * batch, (site.acts - site.acts // 2) * batch
    else:
        inside, outside, taps = _channels(site)
        rows = inside * taps if first else inside
        turns = math.ceil(outside / machine.columns) * math.ceil(rows / (machine.rows * fused)) * (1 if first else taps)
        positions = products // math.prod(site.weight_shape)
        cycles, outputs = positions * site.groups * turns, positions * site.groups * outside
        weights, inputs = site.weights, site.acts * batch
    weight_bits, input_bits = weights * w, inputs * a
    moved = input_bits + min(
        weight_bits + input_bits * math.ceil(2 * weight_bits / machine.weight_buffer),
        input_bits + weight_bits * math.ceil(2 * input_bits / machine.input_buffer),
    )
    return Work(cycles * slices, weight_bits, input_bits, moved, products, outputs)


def _channels(site: Site) -> tuple[int, int, int]:
    """Return input and output channels of one group, and kernel taps."""
    shape = site.weight_shape
    if "transpose" in site.kind:
        return shape[0] // site.groups, shape[1], math.prod(shape[2:])
    if site.kind.startswith("conv"):
        return shape[1], shape[0] // site.groups, math.prod(shape[2:])
    outside = shape[site.channel_axis]
    return math.prod(shape) // outside, outside, 1


@dataclass(frozen=True)
class BitFusionCycles(Cost):
    """Cycles of Bit Fusion for one input: of every site the longer of computing and moving data.

    Attributes:
        first: site whose kernel taps are packed into the rows.
        batch: inputs that are computed at once, which share the reading of weights; the cost is that of one, rounded up.
        machine: sizes.

    >>> fc = Site("fc", "linear", ("fc",), (32, 256), 1, 1, 1, 8192, 8192, 256, 0)
    >>> BitFusionCycles()(fc, Bits(8, 8)), BitFusionCycles()(fc, Bits(2, 8)), BitFusionCycles().show(1_000_000, [fc])
    (363, 107, '1M cycles (2 ms)')
    """

    name: ClassVar[str] = "bitfusion_cycles"
    unit: ClassVar[str] = "cycles"
    suffixes: ClassVar[Mapping[str, int]] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "us": 500, "ms": 500_000}

    first: str = ""
    batch: int = 1
    machine: Machine = field(default_factory=Machine)

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the cycles of a site; raises `BudgetError` for float32."""
        done = work(site, bits, self.machine, first=site.name == self.first, batch=self.batch)
        return math.ceil(max(done.cycles, math.ceil(done.moved_bits / self.machine.dram_bits)) / self.batch)

    def in_float(self, sites: Iterable[Site]) -> int:
        """Return the cycles at 16 bits, the widest that there is."""
        return sum(self(site, Bits(16, 16)) for site in sites)

    def show(self, total: int, sites: Iterable[Site]) -> str:
        """Return the cycles, and the time they take."""
        factor, suffix = next((f, s) for f, s in ((10**9, "G"), (10**6, "M"), (10**3, "K"), (1, "")) if total >= f or f == 1)
        return f"{total / factor:.4g}{suffix} cycles ({1e3 * total / self.machine.hertz:.4g} ms)"


@dataclass(frozen=True)
class BitFusionEnergy(Cost):
    """Energy of Bit Fusion for one input, in picojoule: array, buffers and DRAM; options as of `BitFusionCycles`.

    >>> fc = Site("fc", "linear", ("fc",), (32, 256), 1, 1, 1, 8192, 8192, 256, 0)
    >>> BitFusionEnergy()(fc, Bits(8, 8)) > 2 * BitFusionEnergy()(fc, Bits(2, 8))
    True
    """

    name: ClassVar[str] = "bitfusion_energy"
    unit: ClassVar[str] = "pJ"
    suffixes: ClassVar[Mapping[str, int]] = {"pJ": 1, "nJ": 10**3, "uJ": 10**6, "mJ": 10**9}

    first: str = ""
    batch: int = 1
    machine: Machine = field(default_factory=Machine)

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the picojoule of a site, rounded up; raises `BudgetError` for float32."""
        return math.ceil(sum(self.parts(site, bits).values()))

    def parts(self, site: Site, bits: Bits) -> dict[str, float]:
        """Return the picojoule of a site in the array, the buffers and DRAM."""
        m = self.machine
        done = work(site, bits, m, first=site.name == self.first, batch=self.batch)
        a, w = carried(bits.a, site), carried(bits.a if site.operands == 2 else bits.w, site)
        buffers = done.products * (w * m.weight_read + a * m.input_read) + done.outputs * 32 * (m.output_read + m.output_write)
        buffers += done.weight_bits * m.weight_write + done.input_bits * m.input_write
        parts = {"array": done.cycles * m.cycle_energy, "buffers": buffers, "dram": done.moved_bits * m.dram_energy}
        return {name: femtojoule / 1000 / self.batch for name, femtojoule in parts.items()}

    def in_float(self, sites: Iterable[Site]) -> int:
        """Return the energy at 16 bits, the widest that there is."""
        return sum(self(site, Bits(16, 16)) for site in sites)
