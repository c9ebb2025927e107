"""What is made of a float network: layers that run twice, norms that follow a layer or do not, and the inputs it takes."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from bitwright.adaptive.actor import ActorOptions
from bitwright.adaptive.execution import Decision, Pass, SwitchableNorm
from bitwright.adaptive.network import AdaptiveNet, Space, adapt
from bitwright.adaptive.relaxations import Draw
from bitwright.errors import BitwrightError, DataError
from bitwright.policy import Bits
from bitwright.sites import trace

CHOICES = [Bits(2, 2), Bits(3, 3), Bits(4, 4)]


class Reused(nn.Module):
    """One convolution and its norm run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.middle, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.norm(self.again(x)).relu()
        x = self.norm(self.again(x)).relu()
        logits: Tensor = self.last(self.middle(x).relu().mean((2, 3)))
        return logits


def adaptive(model: nn.Module, x: Tensor, free: tuple[str, ...], options: ActorOptions) -> AdaptiveNet:
    found = trace(model.eval(), x[:1])
    choices = {name: CHOICES if name in free else [Bits(8, 8)] for name in found.names}
    return adapt(model, Space.of(found, choices, sum(site.macs for site in found.sites) * 30), x, options)


@pytest.fixture
def reused() -> tuple[AdaptiveNet, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(32, 3, 16, 16) * torch.rand(32, 1, 1, 1)
    net = adaptive(Reused(), x, ("again", "middle"), ActorOptions(quality=4, project=4, hidden=4, looks=64))
    for head in net.actor.heads:
        nn.init.normal_(head.weight, std=3.0)
    return net.eval(), x


def test_a_layer_that_runs_twice_decides_at_its_first_call(reused: tuple[AdaptiveNet, Tensor]) -> None:
    net, x = reused
    assert [site.shape for site in net.actor.inputs] == [(16, 16, 16)] * 2
    entered: list[Tensor] = []
    with torch.no_grad(), net.counting() as ledger, net.hearing() as heard:
        handle = net.network.get_submodule("again").register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        net(x)
        handle.remove()
        taken = net.taken()
        assert len(entered) == 2
        assert len(heard) == 2  # the actor spoke once a site, not once a call
        first = net.actor.scores(0, entered[0], net.actor.begin(x, None), None)
    assert torch.equal(first, heard[0])
    assert len(taken[0].unique()) > 1
    assert [ledger.samples(name) for name in ("again", "middle", "first")] == [2 * len(x), len(x), len(x)]
    by_width = {bits: sum(n for name, b, n, _ in ledger.entries if (name, b) == ("again", bits)) for bits in CHOICES}
    assert by_width == {bits: 2 * int((taken[0] == k).sum()) for k, bits in enumerate(CHOICES)}
    assert float(net.spent().double().sum() * net.space.limit) == pytest.approx(ledger.bitops, rel=1e-6)
    with torch.no_grad():
        single = torch.cat([net(x[n : n + 1]) for n in range(len(x))])
        assert torch.allclose(single, net(x), atol=1e-5)
        assert torch.allclose(net.member([1, 2])(x), net(x, forced=torch.tensor([[1], [2]]).expand(-1, len(x))), atol=1e-5)


@pytest.mark.parametrize("mode", ["pathwise", "probing"])
def test_a_layer_that_runs_twice_trains(reused: tuple[AdaptiveNet, Tensor], mode: str) -> None:
    net, x = reused
    net.train().mode = mode
    draw = Draw.of((2, len(x), 3), torch.Generator().manual_seed(0), 1.0, 1.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    logits = net(x, draw=draw)
    after = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad(), net.replaying():
        assert torch.allclose(net(x, forced=net.taken()), logits, atol=1e-5)  # each call by its own statistics of the batch
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    (logits.square().mean() + net.spent().mean()).backward()
    assert net.network.get_submodule("again").weight.grad is not None
    assert (net.actor.heads[0].weight.grad is not None) == (mode == "pathwise")  # probing asks for the difference of losses instead


def test_statistics_are_the_average_over_the_calls() -> None:
    shared = Pass(1, lambda site, x: Decision(torch.zeros(len(x), dtype=torch.int64)))
    norm = SwitchableNorm(nn.BatchNorm1d(2), 1, 0, "layer", shared, calls=2).train()
    norm.momentum = None
    y = torch.rand(4000, 2)
    for _ in range(2):  # the calls of a pass are counted anew
        shared.reset()
        shared.decision(0, y)
        norm(y)
        norm(y + 4)
    assert torch.allclose(norm.running_mean[0], y.mean(0) + 2, atol=0.02)


class Halves(nn.Module):
    """A convolution that runs twice, normalised the first time alone or by two norms."""

    def __init__(self, *, two: bool) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4) if two else nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.again(self.first(x))).relu()
        x = self.other(self.again(x)).relu()
        logits: Tensor = self.last(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("two", [True, False])
def test_a_norm_after_some_of_the_calls_stays_one_for_all_widths(two: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8)
    net = adaptive(Halves(two=two), x, ("again",), ActorOptions("static")).train()
    assert not any(isinstance(module, SwitchableNorm) for module in net.modules())
    net.mode = "pathwise"
    net(x, draw=Draw.of((1, 8, 3), torch.Generator().manual_seed(0), 1.0, 1.0)).square().mean().backward()
    assert not net._shared.owed  # what a neighbour gives is not left behind
    assert net.actor.scores_of.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.rand(2, 1, 32, 32), r"torch\.float32 of shape \(2, 1, 32, 32\)"),
        (torch.rand(1, 8, 8), r"torch\.float32 of shape \(1, 8, 8\)"),
        (torch.rand(2, 1, 8, 8).double(), r"torch\.float64 of shape \(2, 1, 8, 8\)"),
        (torch.rand(0, 1, 8, 8), r"torch\.float32 of shape \(0, 1, 8, 8\)"),
        (torch.rand(2, 1, 8, 8).numpy(), "a ndarray"),
    ],
)
def test_an_adaptive_network_takes_images_of_one_size_and_type(x: Tensor, found: str) -> None:
    net = adaptive(Halves(two=True), torch.rand(4, 1, 8, 8), ("again",), ActorOptions("static"))
    wanted = r"give a tensor of torch\.float32 and shape \(N, 1, 8, 8\), N at least 1; images of another size need one of their own"
    for one in (net.train(), copy.deepcopy(net).eval()):
        with pytest.raises(DataError, match=f"^adaptive network: got {found}; {wanted}"):
            one(x)
        assert len(one(torch.rand(3, 1, 8, 8))) == 3


def test_a_network_too_small_for_its_actor_is_told_how_large_it_must_be() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)), torch.rand(8, 20)
    told = r"one takes ([\d,]+) MACs an image and the network 20,224; use a network of at least ([\d,]+) MACs, or search one policy"
    with pytest.raises(BitwrightError, match=told) as caught:
        adaptive(model, x, ("2",), ActorOptions())
    takes, least = (int(number.replace(",", "")) for number in re.search(told, str(caught.value)).groups())
    assert least == math.ceil(takes / 0.015)
    assert "adaptive." not in str(caught.value)  # the caller may have no recipe
