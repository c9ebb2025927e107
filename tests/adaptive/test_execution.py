from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitwright.adaptive.execution import PRIOR, Decision, Pass, SwitchableNorm
from bitwright.adaptive.grouped import grouped_convolution, grouped_linear
from bitwright.adaptive.network import AdaptiveNet, Space, adapt
from bitwright.adaptive.relaxations import Draw
from bitwright.errors import BitwrightError, DataError, SiteError
from bitwright.models import build
from bitwright.policy import Bits
from bitwright.sites import trace

CHOICES = [Bits(2, 2), Bits(3, 4), Bits(8, 8)]


def digits(**pins: Bits) -> AdaptiveNet:
    torch.manual_seed(0)
    model = build("digits_cnn").eval()
    x = torch.rand(64, 1, 8, 8)
    found = trace(model, x[:1])
    choices = {name: [pins[name]] if name in pins else CHOICES for name in found.names}
    return adapt(model, Space.of(found, choices, sum(site.macs for site in found.sites) * 12), x).eval()


@pytest.fixture(scope="module")
def net() -> AdaptiveNet:
    made = digits(conv1=Bits(8, 8), fc=Bits(8, 8))
    torch.manual_seed(3)
    for head in made.actor.heads:  # so that samples differ in what they get
        nn.init.normal_(head.weight, std=3.0)
    return made


def test_one_sample_is_what_it_is_in_a_batch(net: AdaptiveNet) -> None:
    x = torch.rand(128, 1, 8, 8) * torch.rand(128, 1, 1, 1)
    with torch.no_grad():
        together, taken = net(x), net.taken()
        single = [(net(x[n : n + 1]), net.taken()) for n in range(len(x))]
    assert torch.equal(torch.cat([index for _, index in single], 1), taken)  # the same bits, exactly
    assert torch.allclose(torch.cat([logits for logits, _ in single]), together, rtol=0, atol=1e-5)
    assert all(len(row.unique()) > 1 for row in taken)


def test_what_is_recorded_is_what_was_executed(net: AdaptiveNet) -> None:
    x = torch.rand(40, 1, 8, 8) * torch.rand(40, 1, 1, 1)
    with torch.no_grad(), net.counting() as ledger:
        net(x)
    spent = net.spent().double().sum() * net.space.limit
    assert abs(float(spent) / ledger.bitops - 1) < 1e-6
    index = net.taken()
    exact = int(net.space.terms.gather(1, index).sum()) + len(x) * (net.space.fixed + 64 * net.actor.macs)
    assert ledger.bitops == exact
    assert all(ledger.samples(name) == len(x) for name in (*net.space.names, "conv1", "fc", "actor"))  # one execution a sample and site


def test_members_are_ordinary_networks_with_the_same_outputs(net: AdaptiveNet) -> None:
    x = torch.rand(20, 1, 8, 8)
    index = torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        wanted = net(x, forced=index[:, None].expand(-1, 20))
        assert torch.allclose(net.member(index.tolist())(x), wanted, atol=1e-5)


@pytest.mark.parametrize("mode", ["pathwise", "drawn"])
def test_gradients_reach_weights_and_actor(mode: str) -> None:
    net = digits(conv1=Bits(8, 8), fc=Bits(8, 8)).train()
    net.mode = mode
    draw = Draw.of((4, 16, 3), torch.Generator().manual_seed(0), 1.0, 1.0)
    loss = net(torch.rand(16, 1, 8, 8), draw=draw).square().mean() + net.spent().mean()
    loss.backward()
    assert all(p.grad is not None for p in net.actor.parameters())
    assert all(p.grad is not None for n, p in net.network.named_parameters() if p.requires_grad and not n.endswith("gate"))


def test_the_neighbour_leaves_the_forward_pass_alone() -> None:
    net = digits(conv1=Bits(8, 8), fc=Bits(8, 8)).train()
    x, draw = torch.rand(16, 1, 8, 8), Draw.of((4, 16, 3), torch.Generator().manual_seed(0), 1.0, 1.0)
    other = copy.deepcopy(net)
    net.mode, other.mode = "pathwise", "drawn"
    assert torch.equal(net(x, draw=draw), other(x, draw=draw))
    assert torch.equal(net.taken(), other.taken())


@pytest.mark.parametrize("count", [0, 1])
def test_a_group_of_one_sample_or_none_normalises(count: int) -> None:
    norm = nn.BatchNorm1d(3)
    shared = Pass(1, lambda site, x: None)  # type: ignore[arg-type,return-value]
    switchable = SwitchableNorm(norm, 2, 0, "layer", shared).train()
    from bitwright.adaptive.execution import Decision

    shared.decisions = [Decision(torch.tensor([1] * count + [0] * (8 - count)))]
    y = torch.randn(8, 3, requires_grad=True)
    out = switchable(y)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(y.grad).all()
    expected = y[0].detach() / (1 + PRIOR) if count else torch.zeros(3)
    assert torch.allclose(switchable.running_mean[1], 0.1 * expected * (2 / 8 if count else 0), atol=1e-6)


def test_a_choice_that_is_tried_but_not_taken_is_judged_by_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    shared = Pass(1, lambda site, x: Decision(torch.zeros(len(x), dtype=torch.int64)))
    norm = SwitchableNorm(nn.BatchNorm2d(3), 2, 0, "layer", shared).train()
    y, tried = torch.randn(64, 3, 8, 8), torch.arange(64) < 16
    for _ in range(60):
        shared.reset()
        shared.decision(0, y)
        norm(y)
        usual = norm.running_mean[0].clone(), norm.last_mean[0, 0].clone()
        shared.reset()
        shared.replay = True
        shared.decisions[0] = Decision(tried.long())
        with torch.no_grad():
            out = norm(torch.where(tried[:, None, None, None], 3 * y + 5, y))  # its outputs lie elsewhere than they once did
        shared.replay = False
        assert torch.equal(norm.running_mean[0], usual[0])  # the choice that is taken follows the pass itself alone
    assert float(out[:16].mean()) == pytest.approx(0.0, abs=0.05)
    assert float(out[:16].std()) == pytest.approx(1.0, abs=0.1)
    expected = (y[16:] - usual[1].view(3, 1, 1)) / (norm.last_var[0, 0].view(3, 1, 1) + norm.eps).sqrt()
    assert torch.allclose(out[16:], expected, atol=1e-5)


def test_grouped_convolution_equals_one_by_one() -> None:
    torch.manual_seed(0)
    for channels_last in (False, True):
        x = torch.randn(10, 4, 7, 7).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
        w = torch.randn(3, 6, 2, 3, 3, requires_grad=True)
        index = torch.tensor([0, 2, 2, 0, 0, 2, 2, 0, 2, 0])  # width 1 has no sample
        y = grouped_convolution(x, w, index, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)
        wanted = torch.cat([nn.functional.conv2d(x[n : n + 1], w[k], stride=2, padding=1, groups=2) for n, k in enumerate(index)])
        assert torch.allclose(y, wanted, atol=1e-5)
        g = torch.randn_like(y)
        for one, other in zip(torch.autograd.grad(y, (x, w), g), torch.autograd.grad(wanted, (x, w), g), strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_grouped_linear_equals_one_by_one() -> None:
    x, w, index = torch.randn(5, 3, 4), torch.randn(2, 6, 4), torch.tensor([0, 1, 1, 0, 1])
    wanted = torch.stack([x[n] @ w[k].T for n, k in enumerate(index)])
    assert torch.allclose(grouped_linear(x, w, index), wanted, atol=1e-5)


def test_a_compiled_step_gives_what_the_plain_one_does() -> None:
    def step(compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3)).eval()
        x = torch.rand(8, 1, 8, 8)
        found = trace(model, x[:1])
        choices = {"0": CHOICES, "3": [Bits(8, 8)], "5": [Bits(8, 8)]}
        from bitwright.adaptive.actor import ActorOptions

        net = adapt(model, Space.of(found, choices, 10**6), x, ActorOptions("static")).train()
        net.mode = "pathwise"

        def loss(x: torch.Tensor, draw: Draw) -> torch.Tensor:
            return net(x, draw=draw).square().mean() + net.spent().mean()

        run = torch.compile(loss, dynamic=False, backend="aot_eager", fullgraph=True) if compiled else loss
        draws = [Draw.of((1, 8, 3), torch.Generator().manual_seed(k), 1.0, 1.0) for k in range(2)]
        values = [run(x, draw) for draw in draws]
        values[-1].backward()
        return torch.stack(values).detach(), net.actor.scores_of.grad

    for one, other in zip(step(False), step(True), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_bad_input_is_named() -> None:
    net = digits(conv1=Bits(8, 8), fc=Bits(8, 8))
    x = torch.rand(3, 1, 8, 8)
    x[1, 0, 2, 2] = float("nan")
    with pytest.raises(DataError, match="image 1 of 3 has values that are not finite"):
        net(x)


def test_what_cannot_adapt_is_named() -> None:
    model = build("digits_cnn")
    found = trace(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(BitwrightError, match="every site has one choice"):
        Space.of(found, {name: [Bits(8, 8)] for name in found.names}, 1)
    with pytest.raises(BitwrightError, match="sites have different choices"):
        Space.of(found, {name: CHOICES[: 2 + (name == "fc")] for name in found.names}, 1)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    found = trace(Called(), torch.zeros(1, 4))
    with pytest.raises(SiteError, match=r"functional call '#0'.*search.skip"):
        Space.of(found, dict.fromkeys(found.names, CHOICES), 1)
