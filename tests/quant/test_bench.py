"""The bench: what stands there equals what `quantize` makes, is taken back whole, and a replayed run equals a whole one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.quant.bench import FLOAT, Bench, Replay
from bitwright.sites import trace


class Net(nn.Module):
    """A convolution used twice, an addition in place, a functional call and a product of activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.relu(self.twice(self.norm(self.twice(x))), inplace=True)
        out = self.last(x)
        out += x
        pooled = out.mean((2, 3))
        mixed = (pooled[:, :, None] @ pooled[:, None]).mean(2)
        return nn.functional.linear(mixed, self.head)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(net, images):
    return trace(net, images)


WIDTHS = ([2, 4], [3, 8])


@pytest.mark.parametrize("bits", [Bits(2, 32), Bits(32, 3), Bits(4, 8), Bits(16, 32), Bits(32, 32)])
def test_a_site_at_a_width_is_what_quantize_makes_of_it(net, images, traced, bits):
    bench = Bench(net, traced.sites, images, weights=WIDTHS[0], inputs=WIDTHS[1])
    everything = Policy((name, FLOAT) for name in traced.names)
    for site in traced.sites:
        own = Bits(bits.a, bits.a) if site.operands == 2 else bits
        expected = quantize(net, everything.replace({site.name: own}), calibration=images, sites=traced.sites)
        with torch.no_grad(), bench.at({site.name: own}):
            assert torch.equal(bench.network(images), expected(images)), site.name
    with torch.no_grad():
        assert torch.equal(bench.network(images), net(images))


def test_a_site_comes_back_to_float_after_an_error(net, images, traced):
    bench = Bench(net, traced.sites, images, weights=[2])
    with pytest.raises(ZeroDivisionError), bench.at({"stem": Bits(2, 32)}):
        raise ZeroDivisionError
    with torch.no_grad():
        assert torch.equal(bench.network(images), net(images))


def test_several_sites_at_once_and_quantizers_made_only_when_asked_for(net, images, traced):
    bench = Bench(net, traced.sites, images)
    assert all(not place.weights and not place.inputs for place in bench.places.values())
    policies = [
        {name: Bits(2 + k % 3, 4) if traced[name].operands == 1 else Bits(4, 4) for k, name in enumerate(traced.names)},
        {name: Bits(3, 8) if traced[name].operands == 1 else Bits(8, 8) for name in traced.names},
    ]
    for policy in [*policies, *policies]:
        with torch.no_grad(), bench.at(policy):
            assert torch.equal(bench.network(images), quantize(net, Policy(policy), calibration=images, sites=traced.sites)(images))
    assert bench.passes == 16  # the second time nothing is calibrated
    assert set(bench.places["stem"].weights) == {2, 3}
    with torch.no_grad():
        assert torch.equal(bench.network(images), net(images))


def test_calibration_of_activations_is_counted_and_of_weights_is_free(net, images, traced):
    assert Bench(net, traced.sites, images, weights=[2, 3, 32]).passes == 0
    assert Bench(net, traced.sites, images, inputs=[2, 3, 16]).passes == 16


@pytest.mark.parametrize("limit", [1 << 30, 8 * 4 * 36 * 4 * 2, 0])
def test_a_replayed_run_equals_a_whole_one(net, images, traced, limit):
    bench = Bench(net, traced.sites, images, weights=[2])
    replay = Replay(bench, limit)
    with torch.no_grad(), replay.recording() as tape:
        bench.network(images)
    assert len(tape) == {1 << 30: 4, 8 * 4 * 36 * 4 * 2: 2, 0: 0}[limit]
    for site in traced.sites:
        modules = [place.module for place in bench.places.values() if place.site is site]
        start = replay.first_call(modules)
        assert start == {"stem": 0, "twice": 1, "last": 3}.get(site.name, 0)  # calls are not watched: all of it runs
        bits = Bits(2, 2) if site.operands == 2 else Bits(2, 32)
        with torch.no_grad(), bench.at({site.name: bits}):
            whole = bench.network(images)
            with replay.playing(tape, start):
                assert torch.equal(bench.network(images), whole)


def test_what_is_replayed_is_not_computed(net, images, traced):
    bench = Bench(net, traced.sites, images, weights=[2])
    replay = Replay(bench)
    with torch.no_grad(), replay.recording() as tape:
        bench.network(images)
    with torch.no_grad(), replay.playing(tape, 3):
        bench.places["stem"].module.weight.fill_(torch.nan)
        assert bool(torch.isfinite(bench.network(images)).all())
    with torch.no_grad():
        assert not bool(torch.isfinite(bench.network(images)).any())
