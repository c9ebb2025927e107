"""The one-neighbour gradient against references that compute every width, on a network of three sites."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitwright.adaptive.actor import ActorOptions, Table
from bitwright.adaptive.execution import AdaptiveLayer, Decision
from bitwright.adaptive.network import AdaptiveNet, Space, adapt
from bitwright.adaptive.relaxations import Draw
from bitwright.policy import Bits
from bitwright.sites import trace

N, S, K = 12, 3, 3
CHOICES = [Bits(2, 2), Bits(3, 3), Bits(4, 4)]


def three_sites() -> tuple[AdaptiveNet, Tensor, Tensor]:
    """Return three convolutions that decide, in evaluation statistics, with a row of scores for every sample."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(6 * 4, 5)).eval()
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    x, y = torch.rand(N, 2, 8, 8), torch.randint(0, 5, (N,))
    found = trace(model, x[:1])
    net = adapt(model, Space.of(found, {n: CHOICES if n != "7" else [Bits(8, 8)] for n in found.names}, 10**5), x, ActorOptions("static"))
    net.actor = Table(S, K, conditions=N)
    with torch.no_grad():
        net.actor.scores_of.normal_(std=0.5)
    return net.train(), x, y


@pytest.fixture(scope="module")
def setting() -> tuple[AdaptiveNet, Tensor, Tensor]:
    return three_sites()


def losses(net: AdaptiveNet, x: Tensor, y: Tensor, **how: object) -> Tensor:
    return nn.functional.cross_entropy(net(x, condition=torch.arange(N), **how), y, reduction="none")


def estimate(net: AdaptiveNet, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    net.mode = "pathwise"
    return torch.autograd.grad(losses(net, x, y, draw=draw).sum(), net.actor.scores_of)[0]


def neighbours(draw: Draw) -> Iterator[Draw]:
    """Yield the draw with many other draws of the neighbour."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(80):
        yield replace(draw, uniform=torch.rand(S, N, generator=generator).clamp(1e-6, 1 - 1e-6))


def all_widths(net: AdaptiveNet, x: Tensor, y: Tensor, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the straight-through gradient with every width of every site computed: slow and obvious."""
    gates: dict[int, Tensor] = {}

    def decide(site: int, inputs: Tensor) -> Decision:
        noisy = net.actor.scores_of[torch.arange(N), site] + draw.gumbel[site]
        gates[site] = torch.softmax(noisy / draw.temperature, 1)
        return Decision(noisy.argmax(1))

    def forward(layer: AdaptiveLayer, inputs: Tensor) -> Tensor:
        if layer.site < 0:
            return layer._execute(inputs, torch.zeros(N, dtype=torch.int64), layer._weights())
        index = layer.shared.decision(layer.site, inputs).index
        out = layer._execute(inputs, index, layer._weights())
        for k in range(K):
            at_k = layer._execute(inputs.detach(), torch.full((N,), k), layer._weights()).detach()
            gate = gates[layer.site][:, k]
            out = out + (gate - gate.detach()).view(-1, 1, 1, 1) * at_k
        return out

    with monkeypatch.context() as patch:
        patch.setattr(net._shared, "decide", decide)
        patch.setattr(AdaptiveLayer, "forward", forward)
        return torch.autograd.grad(losses(net, x, y).sum(), net.actor.scores_of)[0]


def exact(net: AdaptiveNet, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the expected loss itself, over all 27 joint choices."""
    scores = net.actor.scores_of.detach().clone().requires_grad_()
    logs = torch.log_softmax(scores, 2)
    total = torch.zeros(())
    for joint in itertools.product(range(K), repeat=S):
        with torch.no_grad():
            value = losses(net, x, y, forced=torch.tensor(joint)[:, None].expand(-1, N))
        chance = sum(logs[:, site, k] for site, k in enumerate(joint)).exp()
        total = total + (chance * value).sum()
    return torch.autograd.grad(total, scores)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_one_neighbour_stands_for_all_widths_without_bias(setting, temperature, monkeypatch, record_property) -> None:
    net, x, y = setting
    draw = Draw.of((S, N, K), torch.Generator().manual_seed(3), temperature, 1.0)
    reference = all_widths(net, x, y, draw, monkeypatch)
    each = torch.stack([estimate(net, x, y, other) for other in neighbours(draw)])
    mean = each.mean(0)
    error = each.std(0) / len(each) ** 0.5
    bias = float((mean - reference).norm() / reference.norm())
    single = float(torch.stack([torch.tensor(cosine(one, reference)) for one in each]).mean())
    record_property("cosine of one draw", single)
    record_property("cosine of the mean", cosine(mean, reference))
    record_property("relative bias", bias)
    assert cosine(mean, reference) > 0.99
    assert single > 0.5
    assert bias < 0.2
    # what is left of a bias is what 80 draws cannot tell from none
    assert float(((mean - reference).abs() <= 4 * error + 1e-6).float().mean()) > 0.99


def test_the_pathwise_gradient_points_down_the_expected_loss(setting, record_property) -> None:
    net, x, y = setting
    truth = exact(net, x, y)
    draws = [Draw.of((S, N, K), torch.Generator().manual_seed(k), 1.0, 1.0) for k in range(100)]
    mean = torch.stack([estimate(net, x, y, draw) for draw in draws]).mean(0)
    record_property("cosine with the exact gradient", cosine(mean, truth))
    record_property("norm over the exact gradient's", float(mean.norm() / truth.norm()))
    assert cosine(mean, truth) > 0.6


def difference(net: AdaptiveNet, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Return one estimate by running the batch again with one site of each sample at its neighbour's width."""
    generator = torch.Generator().manual_seed(seed)
    draw = Draw.of((S, N, K), generator, 1.0, 1.0)
    net.mode = "probing"
    value = losses(net, x, y, draw=draw).detach()
    other, gate = net.changed(torch.randint(0, S, (N,), generator=generator))
    with torch.no_grad(), net.replaying():
        changed = losses(net, x, y, forced=other)
    return torch.autograd.grad((S * (changed - value) * gate).sum(), net.actor.scores_of)[0]


def test_the_counterfactual_gradient_is_nearer_the_expected_loss(setting, record_property) -> None:
    net, x, y = setting
    truth = exact(net, x, y)
    mean = torch.stack([difference(net, x, y, seed) for seed in range(400)]).mean(0)
    draws = [Draw.of((S, N, K), torch.Generator().manual_seed(k), 1.0, 1.0) for k in range(400)]
    linear = torch.stack([estimate(net, x, y, draw) for draw in draws]).mean(0)
    record_property("cosine with the exact gradient", cosine(mean, truth))
    record_property("norm over the exact gradient's", float(mean.norm() / truth.norm()))
    assert cosine(mean, truth) > 0.96
    assert cosine(mean, truth) > cosine(linear, truth) + 0.01


def test_a_neighbour_differs_at_one_site(setting) -> None:
    net, x, y = setting
    net.mode = "probing"
    site = torch.arange(N) % S
    losses(net, x, y, draw=Draw.of((S, N, K), torch.Generator().manual_seed(0), 1.0, 1.0))
    other, gate = net.changed(site)
    assert ((other != net.taken()).sum(0) == 1).all()
    assert (other != net.taken())[site, torch.arange(N)].all()
    assert (gate.detach() == 0).all()


def test_a_batch_that_runs_again_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(8, 2, 8, 8)
    found = trace(model, x[:1])
    choices = {name: CHOICES if name == "0" else [Bits(8, 8)] for name in found.names}
    net = adapt(model, Space.of(found, choices, 10**6), x, ActorOptions("static")).train()
    forced = torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        first = net(x, forced=forced)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with net.replaying():
            again = net(x, forced=forced)
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.track_running_stats for module in net.modules() if isinstance(module, nn.BatchNorm2d))


def scored(net: AdaptiveNet, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return one estimate by REINFORCE."""
    net.mode = "drawn"
    value = losses(net, x, y, draw=draw).detach()
    return torch.autograd.grad(((value - value.mean()) * net.log_probability()).sum(), net.actor.scores_of)[0]


def test_reinforce_is_unbiased_but_rough(setting, record_property) -> None:
    net, x, y = setting
    truth = exact(net, x, y)
    found = [scored(net, x, y, Draw.of((S, N, K), torch.Generator().manual_seed(k), 1.0, 1.0)) for k in range(120)]
    rough = torch.stack([torch.tensor(cosine(one, truth)) for one in found]).mean()
    record_property("cosine of one draw", float(rough))
    assert cosine(torch.stack(found).mean(0), truth) > 0.4
