"""Costs against the exact table of the conventions, and budgets as they are written."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.costs import BitOps, Size, WeightBits, parse_budget
from bitwright.errors import BudgetError, PolicyError
from bitwright.models import build
from bitwright.policy import Bits, Policy
from bitwright.sites import Site, trace

# MACs total, inner, first, last (M); weights (M): total, inner, first + last; BitOps (G) at each width, first and last at W8A8.
TABLE = {
    ("resnet18", 224): ("1814.1 1695.5 118.0 0.51", "11.679 11.158 0.521", "14.37 22.85 34.71 49.97 68.63 116.1 1857.6"),
    ("resnet50", 224): ("4089.2 3969.1 118.0 2.05", "25.503 23.446 2.057", "23.56 43.41 71.19 106.9 150.6 261.7 4187"),
    ("mobilenet_v2", 224): ("300.8 288.7 10.84 1.28", "3.470 2.189 1.281", "1.93 3.37 5.39 7.99 11.17 19.25 308.0"),
    ("cifar_resnet20", 32): ("40.6 40.1 0.44 0.001", "0.268 0.267 0.0011", "0.189 0.389 0.670 1.03 1.47 2.60 41.5"),
}
WIDTHS = (2, 3, 4, 5, 6, 8, 32)


def printed(value, like):
    """Return an exact value with as many decimals as the text ``like`` has."""
    return f"{float(value):.{len(like.partition('.')[2])}f}"


@pytest.fixture(scope="module")
def traces():
    with torch.device("meta"):
        return {(name, size): trace(build(name), torch.zeros(1, 3, size, size)) for name, size in TABLE}


@pytest.mark.parametrize("net", TABLE)
def test_conventions_table(net, traces):
    found = traces[net]
    macs, weights, bitops = (text.split() for text in TABLE[net])
    ends = {found.first: Bits(8, 8), found.last: Bits(8, 8)}
    total = sum(s.macs for s in found.sites)
    inner = total - sum(found[name].macs for name in ends)
    counted = (total, inner, found[found.first].macs, found[found.last].macs)
    assert [printed(Fraction(v, 10**6), t) for v, t in zip(counted, macs, strict=True)] == macs
    weight, outer = sum(s.weights for s in found.sites), sum(found[name].weights for name in ends)
    assert [printed(Fraction(v, 10**6), t) for v, t in zip((weight, weight - outer, outer), weights, strict=True)] == weights
    for width, text in zip(WIDTHS, bitops, strict=True):
        budget = parse_budget(f"bitops<=W{width}A{width}", found.sites, pins=ends if width < 32 else {})
        assert printed(Fraction(budget.limit, 10**9), text) == text
        bits = {s.name: ends.get(s.name, Bits(width, width)) if width < 32 else Bits(32, 32) for s in found.sites}
        assert BitOps().total(found.sites, Policy(bits)) == budget.limit
        assert WeightBits().total(found.sites, bits) == sum(s.weights * bits[s.name].w for s in found.sites)


SITES = (
    Site("conv", "conv2d", ("conv",), (8, 3, 3, 3), 1, 1, 1, 216, 216 * 64, 192, 0),
    Site("#0", "matmul", ("#0",), (), 1, 1, 2, 0, 1000, 60, 0),
    Site("up", "conv_transpose2d", ("up",), (8, 5, 1, 1), 2, 1, 1, 40, 640, 64, 1),
)
POLICY = Policy({"conv": (3, 4), "#0": (8, 4), "up": (16, 8)})


def test_terms():
    assert [BitOps()(s, POLICY[s.name]) for s in SITES] == [216 * 64 * 12, 16000, 640 * 128]
    assert [WeightBits()(s, POLICY[s.name]) for s in SITES] == [648, 0, 640]
    assert [Size()(s, POLICY[s.name]) for s in SITES] == [81 + 32, 0, 80]
    assert Size()(SITES[2], Bits(1, 8)) == 5 + 4 * 10
    assert Size(fixed=1000).total(SITES, POLICY) == 1193
    assert [cost.unit for cost in (BitOps(), WeightBits(), Size())] == ["bit operations", "bits", "bytes"]
    with pytest.raises(PolicyError, match=r"no entry for site '#0'; give every site its bits"):
        BitOps().total(SITES, {"conv": Bits(8, 8)})


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("bitops<=W3A3", 216 * 64 * 64 + 9 * 1640),
        ("bitops<=w2a32", 216 * 64 * 64 + 32 * 32 * 1000 + 64 * 640),
        ("bitops <= 0.39G", 390_000_000),
        ("bitops<=1.5k", 1500),
        ("bitops<=.5M", 500_000),
        ("bitops<=2e3", 2000),
        ("bitops<=7T", 7 * 10**12),
        ("bitops<=50%", 512 * (216 * 64 + 640 + 1000)),
        ("weight_bits<=1.93", 494),
        ("weight_bits<=2", 512),
        ("weight_bits<=W2A32", 216 * 8 + 80),
        ("weight_bits<=10%", 819),
        ("size<=64KB", 64_000),
        ("size<=0.5 MB", 500_000),
        ("size<=64KiB", 65_536),
        ("size<=1mib", 2**20),
        ("size<=900B", 900),
        ("size<=10%", 102),
        ("size<=W4A8", 500 + 216 + 32 + 20 + 40),
    ],
)
def test_limits(text, limit):
    budget = parse_budget(text, SITES, pins={"conv": Bits(8, 8)}, fixed_bytes=500)
    assert budget.limit == limit
    assert budget.text == text
    assert budget.fits(limit)
    assert not budget.fits(limit + 1)


def test_size_share_is_of_the_whole_float_network():
    assert parse_budget("size<=10%", SITES, pins={}, float_bytes=2009).limit == 200
    assert parse_budget("size<=10%", SITES, pins={}, fixed_bytes=77).cost == Size(77)


@given(st.integers(1, 10**9), st.decimals("0.01", "32", places=4))
def test_the_average_limit_is_exact(weights, average):
    site = Site("fc", "linear", ("fc",), (1, weights), 1, 1, 1, weights, weights, weights, 0)
    limit = parse_budget(f"weight_bits<={average}", [site], pins={}).limit
    assert Fraction(limit, weights) <= Fraction(average) < Fraction(limit + 1, weights)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bitops<3", r"expected COST<=LIMIT, such as 'bitops<=W3A3', 'weight_bits<=1.93' or 'size<=64KB'"),
        ("", "expected COST<=LIMIT"),
        ("bitops<=W9A3", "weight width 9 is not one of 1, 2, .*; write a pair such as W3A3 or W2A32"),
        ("bitops<=W3A0", "activation width 0 is not one of"),
        ("size<=-1KB", "'-1KB' allows nothing; give a positive number with a unit .B KB MB GB KiB MiB GiB., W3A3, or a share"),
        ("size<=0KB", "limit '0KB' allows nothing"),
        ("size<=64", "'' is no unit of size; expected a number with a unit"),
        ("latency<=2ms", "no cost 'latency'; known: bitops, weight_bits, size"),
        ("bitop<=W3A3", "no cost 'bitop'; did you mean 'bitops'?"),
        ("bitops<=3Q", r"'Q' is no unit of bitops; expected a number with a unit \(K M G T\)"),
        ("weight_bits<=2K", "'K' is no unit of weight_bits; expected a number, W3A3"),
        ("bitops<=lots", "limit 'lots' does not parse"),
        ("bitops<=nan", "limit 'nan' does not parse"),
        ("bitops<=", "limit '' does not parse"),
        ("size<=1KB, bitops<=1G", "holds more than one limit; give each a --budget of its own, and in a recipe a list of budgets"),
        ("bitops<=1e9999", "does not parse"),
    ],
)
def test_bad_budgets(text, match):
    with pytest.raises(BudgetError, match=match) as caught:
        parse_budget(text, SITES, pins={})
    assert str(caught.value).startswith(f"budget '{text}': ")
    assert "\n" not in str(caught.value)


def test_an_unknown_pin():
    with pytest.raises(BudgetError, match=r"pinned site 'conf' is no site; did you mean 'conv'\?"):
        parse_budget("bitops<=W3A3", SITES, pins={"conf": Bits(8, 8)})


def test_a_budget_describes_itself():
    def describe(text, total):
        return parse_budget(text, SITES, pins={}).describe(total, SITES)

    assert describe("weight_bits<=1.95", 494) == "weight_bits 1.93 (limit 1.949)"
    assert describe("bitops<=22.85G", 22_800_000_000) == "bitops 22.8G (limit 22.85G)"
    assert describe("bitops<=500", 400) == "bitops 400 (limit 500)"
    assert describe("size<=64KB", 65_000) == "size 65KB (limit 64KB, exceeded)"
    assert describe("size<=64KB", 512) == "size 512B (limit 64KB)"
    assert describe("size<=2MB", 1_500_000) == "size 1.5MB (limit 2MB)"
