"""Costs: what a choice of bits spends at a site, as exact integers; and budgets, which limit a cost.

A cost is a sum of integer terms, one per site, plus a fixed part; like latency, it may have terms of pairs of sites as well; or it is,
like peak memory, the largest of several such sums. Averages and decimals are exact fractions, so no limit is crossed by rounding.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from bitwright.errors import BudgetError, PolicyError, nearest
from bitwright.policy import Bits, check_bits
from bitwright.sites import Site

_FLOAT = Bits(32, 32)
BYTES: Mapping[str, int] = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Units of memory in a budget."""


@dataclass(frozen=True)
class Pair:
    """Two sites that cost ``price`` more where their bits are of different classes, which ``classes`` gives for each of the two."""

    sites: tuple[str, str]
    classes: tuple[Mapping[Bits, str], Mapping[Bits, str]]
    price: int

    def cost(self, policy: Mapping[str, Bits]) -> int:
        """Return what a policy pays for it."""
        left, right = (classes[policy[name]] for name, classes in zip(self.sites, self.classes, strict=True))
        return self.price if left != right else 0


@dataclass(frozen=True)
class Cost(ABC):
    """An integer resource: call it as ``cost(site, bits)`` for the term of one site."""

    name: ClassVar[str]
    unit: ClassVar[str]
    suffixes: ClassVar[Mapping[str, int]]
    """What may follow a number in a budget, and how many units it stands for."""

    @property
    def fixed(self) -> int:
        """What is spent whatever the policy says; part of every total."""
        return 0

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of sites that cost more where they differ in class; none where a cost is a sum over sites."""
        return ()

    @abstractmethod
    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the term of ``site`` at ``bits``."""

    @property
    def rows(self) -> tuple[Cost, ...]:
        """The sums of which the largest is the cost: the cost itself, unless it is a peak."""
        return (self,)

    def total(self, sites: Iterable[Site], policy: Mapping[str, Bits]) -> int:
        """Return the cost of a policy: the terms of all sites, its pairs and the fixed part, of the largest of the rows.

        Raises:
            PolicyError: a site has no entry in the policy.
        """
        sites = tuple(sites)
        for site in sites:
            if site.name not in policy:
                raise PolicyError(f"policy: no entry for site '{site.name}'; give every site its bits")
        sums = (sum(row(site, policy[site.name]) for site in sites) + sum(pair.cost(policy) for pair in row.pairs) for row in self.rows)
        return max(row.fixed + total for row, total in zip(self.rows, sums, strict=True))

    def in_float(self, sites: Iterable[Site]) -> int:
        """Return what the network costs in float32, the fixed part left out: the whole of a budget in percent."""
        sites = tuple(sites)
        return self.total(sites, {site.name: _FLOAT for site in sites}) - self.fixed

    def limit(self, number: Fraction, suffix: str, sites: Iterable[Site]) -> int:
        """Return the largest total that a budget of ``number`` (exact) and ``suffix`` (a key of ``suffixes``) allows."""
        return math.floor(number * self.suffixes[suffix])

    def show(self, total: int, sites: Iterable[Site]) -> str:
        """Return a total for people, in the largest unit of ``suffixes`` that it reaches."""
        reached = [(factor, suffix) for suffix, factor in self.suffixes.items() if suffix and total >= factor]
        factor, suffix = max(reached, key=lambda pair: pair[0], default=(1, ""))
        return f"{total / factor:.4g}{suffix}"


@dataclass(frozen=True)
class BitOps(Cost):
    r"""Bit operations per sample, $\sum \mathrm{MACs} \cdot w \cdot a$; a product of two activations takes $a \cdot a$.

    >>> site = Site("fc", "linear", ("fc",), (10, 64), 1, 1, 1, 640, 640, 64, 0)
    >>> BitOps()(site, Bits(2, 4)), BitOps().show(22_850_000_000, [site])
    (5120, '22.85G')
    """

    name: ClassVar[str] = "bitops"
    unit: ClassVar[str] = "bit operations"
    suffixes: ClassVar[Mapping[str, int]] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return MACs · w · a, or MACs · a · a for a product."""
        return site.macs * bits.a * (bits.a if site.operands == 2 else bits.w)


@dataclass(frozen=True)
class WeightBits(Cost):
    """Bits of the weights of all sites, pinned ones included; limited and shown as the average per weight.

    >>> site = Site("fc", "linear", ("fc",), (10, 64), 1, 1, 1, 640, 640, 64, 0)
    >>> WeightBits()(site, Bits(2, 4)), WeightBits().show(1280, [site])
    (1280, '2')
    """

    name: ClassVar[str] = "weight_bits"
    unit: ClassVar[str] = "bits"
    suffixes: ClassVar[Mapping[str, int]] = {"": 1}

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return weights · w."""
        return site.weights * bits.w

    def limit(self, number: Fraction, suffix: str, sites: Iterable[Site]) -> int:
        """Return ⌊average · weights⌋."""
        return math.floor(number * sum(site.weights for site in sites))

    def show(self, total: int, sites: Iterable[Site]) -> str:
        """Return the average bits per weight."""
        return f"{total / max(sum(site.weights for site in sites), 1):.4g}"


@dataclass(frozen=True)
class Size(Cost):
    """Bytes of the packed file: codes bit-packed per weight tensor, scales in float32, and ``fixed`` bytes for the rest.

    A weight tensor of n weights and c output channels takes ⌈n·w/8⌉ bytes, and 4·c for its scales at w ≤ 8.

    >>> site = Site("fc", "linear", ("fc",), (10, 63), 1, 1, 1, 630, 630, 63, 0, ((630, 10),))
    >>> Size()(site, Bits(3, 4)), Size()(site, Bits(32, 32))
    (277, 2520)
    """

    name: ClassVar[str] = "size"
    unit: ClassVar[str] = "bytes"
    suffixes: ClassVar[Mapping[str, int]] = BYTES

    fixed: int = 0

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the bytes of the site's codes and scales."""
        scale = 4 if bits.w <= 8 else 0
        return sum((count * bits.w + 7) // 8 + scale * channels for count, channels in site.tensors)

    def show(self, total: int, sites: Iterable[Site]) -> str:
        """Return the size in decimal units."""
        return show_bytes(total)


def show_bytes(total: int) -> str:
    """Return an amount of memory in decimal units.

    >>> show_bytes(64_000), show_bytes(12)
    ('64KB', '12B')
    """
    factor, suffix = next((f, s) for f, s in ((10**6, "MB"), (10**3, "KB"), (1, "B")) if total >= f or f == 1)
    return f"{total / factor:.4g}{suffix}"


@dataclass(frozen=True)
class Budget:
    """A cost and its limit, which no returned policy exceeds; ``text`` is what the user wrote."""

    cost: Cost
    limit: int
    text: str

    def fits(self, total: int) -> bool:
        """Whether a total is within the limit."""
        return total <= self.limit

    def describe(self, total: int, sites: Iterable[Site]) -> str:
        """Return a total beside the limit, for people.

        >>> site = Site("fc", "linear", ("fc",), (10, 64), 1, 1, 1, 640, 640, 64, 0)
        >>> parse_budget("weight_bits<=1.95", [site], pins={}).describe(1235, [site])
        'weight_bits 1.93 (limit 1.95)'
        """
        sites = tuple(sites)
        over = "" if self.fits(total) else ", exceeded"
        return f"{self.cost.name} {self.cost.show(total, sites)} (limit {self.cost.show(self.limit, sites)}{over})"


def parse_budget(
    text: str,
    sites: Iterable[Site],
    *,
    pins: Mapping[str, Bits],
    fixed_bytes: int = 0,
    float_bytes: int | None = None,
    costs: Iterable[Cost] = (),
) -> Budget:
    """Read a budget: ``COST<=LIMIT``.

    A limit is a number with a unit (``bitops<=0.39G``, ``weight_bits<=1.93``, ``size<=64KB``), a uniform width pair
    (``bitops<=W3A3``: what it costs with the pinned sites at their pins), or a share of what float32 costs
    (``size<=10%``).

    Args:
        text: the budget.
        sites: all sites of the problem.
        pins: bits of the sites that are not free.
        fixed_bytes: bytes of the packed file that no policy changes.
        float_bytes: bytes of the float32 network, which ``size<=10%`` is a share of; by default 4 per site weight.
        costs: further costs that a budget may name, such as those of `bitwright.memory` and `bitwright.bitfusion`.

    Raises:
        BudgetError: the text does not parse, or allows nothing.

    >>> site = Site("fc", "linear", ("fc",), (10, 64), 1, 1, 1, 640, 640, 64, 0)
    >>> [parse_budget(t, [site], pins={}).limit for t in ("bitops<=W3A3", "bitops<=0.01M", "weight_bits<=1.93", "size<=10%")]
    [5760, 10000, 1235, 256]
    """
    sites = tuple(sites)
    match = re.fullmatch(r"\s*(\w+)\s*<=\s*(.*?)\s*", text)
    if match is None:
        raise BudgetError(f"budget '{text}': expected COST<=LIMIT, such as 'bitops<=W3A3', 'weight_bits<=1.93' or 'size<=64KB'")
    cost = _cost(text, match[1], (BitOps(), WeightBits(), Size(fixed_bytes), *costs))
    uniform = re.fullmatch(r"[wW](\d+)[aA](\d+)", match[2])
    if uniform is not None:
        limit = _uniform(text, cost, sites, Bits(int(uniform[1]), int(uniform[2])), pins)
    else:
        limit = _amount(text, match[2], cost, sites, float_bytes)
    return Budget(cost, limit, text)


def _cost(text: str, name: str, costs: Iterable[Cost]) -> Cost:
    known = {cost.name: cost for cost in costs}
    if name not in known:
        raise BudgetError(f"budget '{text}': no cost '{name}'; {nearest(name, known)}")
    return known[name]


def _uniform(text: str, cost: Cost, sites: tuple[Site, ...], bits: Bits, pins: Mapping[str, Bits]) -> int:
    try:
        check_bits(bits, "uniform")
    except PolicyError as error:
        raise BudgetError(f"budget '{text}': {error}; write a pair such as W3A3 or W2A32") from None
    for name in pins:
        if all(name != site.name for site in sites):
            raise BudgetError(f"budget '{text}': pinned site '{name}' is no site; {nearest(name, [site.name for site in sites])}")
    return cost.total(sites, {site.name: pins.get(site.name, bits) for site in sites})


def _amount(text: str, limit: str, cost: Cost, sites: tuple[Site, ...], float_bytes: int | None) -> int:
    match = re.fullmatch(r"([+-]?)(\d+\.?\d*|\.\d+)((?:[eE][+-]?\d{1,3})?)\s*([a-zA-Z%]*)", limit)
    units = " ".join(suffix for suffix in cost.suffixes if suffix)
    expected = f"a number{f' with a unit ({units})' if units else ''}, W3A3, or a share such as 10%"
    if "<=" in limit:
        raise BudgetError(f"budget '{text}': holds more than one limit; give each a --budget of its own, and in a recipe a list of budgets")
    if match is None:
        raise BudgetError(f"budget '{text}': limit '{limit}' does not parse; expected {expected}")
    number = Fraction(match[2] + match[3])
    if match[1] == "-" or number == 0:
        raise BudgetError(f"budget '{text}': limit '{limit}' allows nothing; give a positive {expected.removeprefix('a ')}")
    if match[4] == "%":
        whole = float_bytes if isinstance(cost, Size) and float_bytes is not None else cost.in_float(sites)
        return math.floor(number * whole / 100)
    suffix = next((known for known in cost.suffixes if known.lower() == match[4].lower()), None)
    if suffix is None:
        raise BudgetError(f"budget '{text}': '{match[4]}' is no unit of {cost.name}; expected {expected}")
    return cost.limit(number, suffix, sites)
