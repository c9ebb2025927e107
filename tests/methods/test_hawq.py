"""HAWQ: traces against exact Hessians, scores against their definition, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitwright.costs import Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import search
from bitwright.errors import RecipeError, TrainingError
from bitwright.methods import hawq
from bitwright.methods.hawq import HAWQ
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.testing import check_method

SAMPLES = 24


@pytest.fixture
def net():
    """A smooth network, whose second derivatives are not zero between kinks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).eval()


def problem_of(net, activations=(32,), **pins):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 2, 3, 3, generator=generator)
    split = TensorSplit(images, torch.randint(3, (SAMPLES,), generator=generator), classes=3)
    traced = trace(net, images[:1])
    choices = build_choices(traced, (2, 4), activations, **{"pin_first": "free", "pin_last": "free"} | pins)
    return Problem(net, traced, choices, Budget(WeightBits(), 10**6, ""), SearchData(split, split))


def exact_traces(net, problem):
    """The trace of each weight's Hessian of the mean loss, and of each input's Hessian of its own sample's loss, averaged."""
    x, y = problem.data.fit.batch(torch.arange(SAMPLES))
    state = dict(net.named_parameters())

    def loss_of_weight(name, value):
        return cross_entropy(torch.func.functional_call(net, {**state, name: value}, x), y)

    def loss_of_input(k, value, label):
        return cross_entropy(net[k:](value), label)

    weights, inputs = {}, {}
    for k in (0, 3):
        own = state[f"{k}.weight"].detach()
        hessian = torch.autograd.functional.hessian(lambda value, k=k: loss_of_weight(f"{k}.weight", value), own)
        weights[str(k)] = float(hessian.reshape(own.numel(), -1).trace())
        entering = net[:k](x).detach()
        total = 0.0
        for n in range(SAMPLES):
            one = entering[n : n + 1]
            hessian = torch.autograd.functional.hessian(lambda value, k=k, n=n: loss_of_input(k, value, y[n : n + 1]), one)
            total += float(hessian.reshape(one.numel(), -1).trace())
        inputs[str(k)] = total / SAMPLES
    return weights, inputs


@pytest.mark.parametrize("batch_size", [SAMPLES, 8])
def test_traces_are_those_of_the_exact_hessians(net, batch_size):
    problem = problem_of(net, (2, 4))
    weights, inputs = exact_traces(net, problem)
    parts = hawq._probed(problem, HAWQ(samples=SAMPLES, batch_size=batch_size, probes=250, tolerance=0.0))
    assert len(parts) == 4
    for part in parts:
        exact = (inputs if isinstance(part, hawq._Operand) else weights)[part.place.site.name]
        estimates = torch.tensor(part.traces)
        noise = float(estimates.std()) / math.sqrt(len(estimates))
        assert abs(float(estimates.mean()) - exact) < 4 * noise
        assert noise < 0.25 * abs(exact)
        assert part.size == (part.place.weight.numel() if isinstance(part, hawq._Weight) else {"0": 18, "3": 12}[part.place.site.name])


def test_a_score_is_half_the_mean_trace_times_the_squared_error(net):
    problem = problem_of(net, (2, 4))
    options = HAWQ(samples=SAMPLES, batch_size=8, probes=40, tolerance=0.0)
    scores = options.scores(problem)
    traces = {(type(part), part.place.site.name): part.mean_trace() for part in hawq._probed(problem, options)}
    images = problem.data.fit.batch(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)))[0]
    for bits in (Bits(2, 2), Bits(4, 2)):
        layer = quantize(net, {"0": bits, "3": bits}, calibration=images)[0]
        by_weight = traces[hawq._Weight, "0"] * float((layer.quantized_weight() - layer.weight).detach().square().sum())
        by_input = traces[hawq._Operand, "0"] * float((layer.input_quantizer(images) - images).detach().square().sum()) / SAMPLES
        place = problem.choices["0"].index(bits)
        assert float(scores["0"][place]) == pytest.approx(0.5 * (by_weight + by_input), rel=1e-5)


def test_probing_stops_when_every_mean_has_settled_and_not_before(net):
    def probes(tolerance):
        return len(hawq._probed(problem_of(net), HAWQ(samples=SAMPLES, batch_size=2, probes=30, tolerance=tolerance))[0].traces)

    assert probes(10.0) == 12  # every batch was seen once, and that is more than the least
    assert probes(0.0) == 30
    (part,) = hawq._probed(problem_of(net, pin_last=(8, 32)), HAWQ(samples=SAMPLES, batch_size=SAMPLES, probes=500, tolerance=0.01))
    means = [sum(part.traces[:k]) / k for k in range(1, len(part.traces) + 1)]
    changes = [abs(now - before) / abs(now) for before, now in itertools.pairwise(means)]
    assert changes[-1] <= 0.01
    assert all(change > 0.01 for change in changes[hawq.LEAST - 2 : -1])


def test_a_trace_lost_in_noise_counts_as_its_standard_error():
    part = hawq._Weight(None, size=2, traces=[-4.0, 2.0, -1.0])
    assert part.mean_trace() == pytest.approx(3.0 / math.sqrt(3) / 2)
    assert hawq._Weight(None, size=2, traces=[4.0, 4.0]).mean_trace() == 2.0


def test_labels_of_the_model_need_no_data(net):
    problem = problem_of(net)
    given, drawn = (HAWQ(samples=SAMPLES, probes=20, labels=labels).scores(problem) for labels in ("given", "model"))
    assert any(not torch.equal(given[name], drawn[name]) for name in given)
    relabelled = problem_of(net)
    relabelled.data.fit.labels.fill_(0)
    again = HAWQ(samples=SAMPLES, probes=20, labels="model").scores(relabelled)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_a_product_with_the_hessian_counts_as_three_gradients(net):
    problem = problem_of(net)
    HAWQ(samples=SAMPLES, batch_size=SAMPLES, probes=10, tolerance=0.0).scores(problem)
    assert problem.sample_passes == 10 * SAMPLES * (3 + 6)


class Shared(nn.Module):
    """Two layers with one weight, and a product of two activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = x.flatten(1)
        y = torch.tanh(self.a(x)) + self.b(x)
        return self.head((y[:, :, None] @ y[:, None]).mean(2))


def test_shared_weights_products_and_frozen_parameters():
    torch.manual_seed(0)
    net = Shared().train().requires_grad_(False)
    images = torch.randn(SAMPLES, 6, 1, 1)
    split = TensorSplit(images, torch.arange(SAMPLES) % 3, classes=3)
    traced = trace(net, images[:2])
    choices = build_choices(traced, (2, 4), (2, 8, 32), pin_first="free", pin_last="free")
    problem = Problem(net, traced, choices, Budget(WeightBits(), 10**6, ""), SearchData(split, split))
    parts = hawq._probed(problem, HAWQ(samples=SAMPLES, probes=8))
    assert sum(isinstance(part, hawq._Weight) for part in parts) == 2
    assert sum(isinstance(part, hawq._Operand) for part in parts) == 5
    scores = HAWQ(samples=SAMPLES, probes=8).scores(problem)
    for site in problem.sites:
        if site.operands == 2:
            two, eight, none = scores[site.name].tolist()
            assert two > eight > none == 0.0
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_pinned_sites_score_nothing_and_a_problem_of_pins_is_solved(net):
    problem = problem_of(net, pin_first=(8, 32), pin_last=(8, 32))
    assert all(score.tolist() == [0.0] for score in HAWQ().scores(problem).values())
    assert search(problem, HAWQ()).policy["0"] == Bits(8, 32)


@pytest.mark.parametrize("kind", ["conv", "joint"])
def test_keeps_the_contract_and_is_within_a_hundredth_of_the_optimum(kind):
    report = check_method(HAWQ(samples=256, probes=16), kinds=(kind,), limit=0.01)
    assert all(row.uniform > 0.2 for row in report.rows)


def test_options_and_networks_that_do_not_fit(net):
    with pytest.raises(RecipeError, match=r"hawq: samples=512, batch_size=64, probes=0, tolerance=0\.01; give at least 1 of each"):
        HAWQ(probes=0)
    with pytest.raises(RecipeError, match="hawq: labels='modle' is unknown; did you mean 'model'"):
        HAWQ(labels="modle")
    problem = problem_of(net)
    with torch.no_grad():
        net[3].bias[0] = math.inf
    with pytest.raises(TrainingError, match="hawq: the curvature at site '0' is not finite"):
        HAWQ(probes=2).scores(problem)
