"""Bit Fusion's cycles and energy: by hand, and against what the authors' simulator printed."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitwright.bitfusion import BitFusionCycles, BitFusionEnergy, Machine, carried, work
from bitwright.costs import parse_budget
from bitwright.errors import BudgetError
from bitwright.policy import Bits
from bitwright.problem import Problem, build_choices
from bitwright.sites import Site, trace


def conv(inside, outside, kernel, size, groups=1, kind="conv2d"):
    shape = (outside, inside // groups, kernel, kernel)
    weights = math.prod(shape)
    return Site("conv", kind, ("conv",), shape, groups, 1, 1, weights, weights * size * size, inside * size * size, 0)


@pytest.mark.parametrize(
    ("site", "bits", "cycles"),
    [
        # Computing cycles (all less those of memory) in results/bitfusion-eyeriss-sim-sweep.csv of github.com/hsharma35/bitfusion, 16 × 32
        # units, 8 to 2 bits, 16 images: its RESNET-18 is twice as wide as usual and has 4-bit weights and activations.
        (conv(128, 128, 3, 56), Bits(4, 4), 3613708 - 1036),  # module2/conv2_1_b
        (conv(128, 128, 1, 56), Bits(4, 4), 2274988 - 1873580),  # module2/conv2_1_a
        (conv(256, 256, 3, 28), Bits(4, 4), 3613708 - 1036),  # module3/conv3_1_b
        (conv(1024, 1024, 3, 7), Bits(4, 4), 3614180 - 1508),  # module5/conv5_1_b
        (conv(512, 512, 1, 14), Bits(4, 4), 674476 - 273068),  # module4/conv4_2_a
    ],
)
def test_cycles_of_the_array_are_those_of_the_authors_simulator(site, bits, cycles):
    assert work(site, bits, Machine(), batch=16).cycles == cycles


@pytest.mark.parametrize(("w", "a", "products"), [(8, 8, 1), (4, 8, 2), (8, 4, 2), (4, 4, 4), (2, 8, 4), (2, 4, 8), (2, 2, 16), (1, 1, 16)])
def test_a_fusion_unit_does_as_many_products_as_its_bricks_allow(w, a, products):
    site = conv(512, 32, 1, 1)
    assert work(site, Bits(w, a), Machine()).cycles == 512 // 16 // products


@pytest.mark.parametrize(("width", "carrier"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (16, 16)])
def test_widths_between_are_carried_in_the_next_wider(width, carrier):
    assert carried(width, conv(1, 1, 1, 1)) == carrier
    wide = conv(512, 32, 1, 1)
    assert BitFusionCycles()(wide, Bits(width, 8)) == BitFusionCycles()(wide, Bits(carrier, 8))


def test_sixteen_bits_take_several_cycles():
    site = conv(512, 32, 1, 1)
    base = work(site, Bits(8, 8), Machine()).cycles
    assert [work(site, Bits(*bits), Machine()).cycles // base for bits in ((16, 8), (8, 16), (16, 16))] == [2, 2, 4]


def test_float_is_refused():
    with pytest.raises(BudgetError, match="site 'conv' is at 32 bits, and Bit Fusion multiplies integers; give it 1 to 8 or 16"):
        BitFusionCycles()(conv(1, 1, 1, 1), Bits(8, 32))


def test_the_first_layer_packs_its_taps_into_the_rows():
    site = conv(3, 64, 7, 112)
    plain, packed = (work(site, Bits(8, 8), Machine(), first=first).cycles for first in (False, True))
    assert plain == 112 * 112 * 2 * 49
    assert packed == 112 * 112 * 2 * math.ceil(147 / 16)
    assert BitFusionCycles("conv")(site, Bits(8, 8)) == packed


def test_groups_run_one_after_the_other():
    depthwise = conv(64, 64, 3, 8, groups=64)
    assert work(depthwise, Bits(8, 8), Machine()).cycles == 64 * 64 * 9  # one row and one column of the array are in use


def test_a_transposed_convolution_and_a_linear_layer():
    net = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Flatten(), nn.Linear(16 * 64, 40))
    up, fc = trace(net, torch.zeros(1, 32, 4, 4)).sites
    assert work(up, Bits(8, 8), Machine()).cycles == 16 * 4 * 1 * 2
    assert work(fc, Bits(8, 8), Machine()).cycles == 2 * 64


def test_a_product_of_two_activations_fills_the_array():
    site = Site("#0", "matmul", ("#0",), (), 1, 1, 2, 0, 512 * 10, 96, 0)
    assert work(site, Bits(4, 4), Machine()).cycles == math.ceil(10 / 4)


def test_traffic_by_hand():
    site = conv(16, 16, 1, 8)  # 256 weights, 1024 inputs: everything fits, so all is read once and the input was written once
    done = work(site, Bits(4, 8), Machine())
    assert done.moved_bits == 256 * 4 + 2 * 1024 * 8
    tiny = replace(Machine(), weight_buffer=1024, input_buffer=4096)
    # The weights fill two halves of their buffer, the inputs four of theirs: inputs twice or weights four times.
    again = work(site, Bits(4, 8), tiny)
    assert again.moved_bits == 1024 * 8 + min(256 * 4 + 2 * 1024 * 8, 1024 * 8 + 4 * 256 * 4)


def test_a_layer_takes_the_longer_of_computing_and_moving():
    site = conv(512, 512, 1, 1)
    moved = (512 * 512 * 2 + 2 * 512 * 8) / 192
    assert BitFusionCycles()(site, Bits(2, 8)) == math.ceil(moved) > work(site, Bits(2, 8), Machine()).cycles
    sixteen = 512 * 512 * 2 + 16 * 2 * 512 * 8  # weights are read once for all
    assert BitFusionCycles(batch=16)(site, Bits(2, 8)) == math.ceil(math.ceil(sixteen / 192) / 16)


def test_energy_by_hand():
    site, m = conv(16, 16, 1, 8), Machine()
    parts = BitFusionEnergy().parts(site, Bits(4, 8))
    assert parts["array"] == pytest.approx(64 * 1 * 1 * 0.2351e3, rel=1e-3)
    assert parts["dram"] == pytest.approx(15 * (256 * 4 + 2 * 1024 * 8))
    products = 256 * 64
    buffers = products * (4 * m.weight_read + 8 * m.input_read) + 1024 * 32 * (m.output_read + m.output_write)
    assert parts["buffers"] == pytest.approx((buffers + 1024 * m.weight_write + 8192 * m.input_write) / 1000)
    assert BitFusionEnergy()(site, Bits(4, 8)) == math.ceil(sum(parts.values()))


def test_budgets_in_time_energy_and_percent():
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    traced = trace(net, torch.zeros(1, 256))
    costs = [BitFusionCycles(traced.first), BitFusionEnergy(traced.first)]
    parsed = {
        text: parse_budget(text, traced.sites, pins={}, costs=costs).limit
        for text in ("bitfusion_cycles<=2ms", "bitfusion_cycles<=1.5K", "bitfusion_energy<=3uJ", "bitfusion_cycles<=50%")
    }
    assert list(parsed.values())[:3] == [1_000_000, 1_500, 3_000_000]
    assert parsed["bitfusion_cycles<=50%"] == costs[0].total(traced.sites, dict.fromkeys(traced.names, Bits(16, 16))) // 2
    assert costs[1].show(2_500_000, traced.sites) == "2.5uJ"


def test_a_policy_is_allocated_within_cycles():
    from bitwright.allocation import repair

    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    traced = trace(net, torch.zeros(1, 256))
    budget = parse_budget("bitfusion_cycles<=W4A8", traced.sites, pins={}, costs=[BitFusionCycles(traced.first)])
    choices = build_choices(traced, (2, 3, 4, 8), (8,), pin_first="free", pin_last="free")
    problem = Problem(net, traced, choices, budget)
    found = repair(problem.policy([3, 3, 3]), problem)
    assert problem.feasible(found)
    assert sorted(bits.w for bits in found.values()) != [8, 8, 8]
