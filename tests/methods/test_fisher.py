"""Fisher: known answers on small networks, near-optimal on planted ones, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from bitwright.allocation import within
from bitwright.costs import Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import search
from bitwright.errors import RecipeError, TrainingError
from bitwright.methods.fisher import Fisher, fisher_scores
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.testing import NETWORKS, check_method, planted


def problem_of(model, images, choices=None, *, seed=0, labels=None):
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    split = TensorSplit(images, labels, classes=3)
    traced = trace(model, images[:1])
    choices = choices or build_choices(traced, (2, 4), (32,), pin_first="free", pin_last="free")
    limit = WeightBits().total(traced.sites, {name: allowed[-1] for name, allowed in choices.items()})
    return Problem(model, traced, choices, Budget(WeightBits(), limit, ""), SearchData(split, split), seed=seed)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()


@pytest.fixture
def images():
    return torch.randn(64, 6, 1, 1, generator=torch.Generator().manual_seed(1))


def exact_scores(model, images, bits, block):
    """The Fisher form of a softmax regression by its definition: every sample, every label, no sampling."""
    weight = model[1].weight.detach()
    layer = quantize(model, {"1": bits}, calibration=images)[1]
    x = images.flatten(1)
    delta = (layer.quantized_weight() - weight).detach()
    p = model(images).detach().softmax(1)
    total = 0.0
    for n in range(len(x)):
        for y in range(3):
            gradient = (torch.eye(3)[y] - p[n])[:, None] * x[n][None]
            effect = gradient * delta
            blocks = {"weight": effect, "kernel": effect, "channel": effect.sum(1), "layer": effect.sum()}[block]
            total += 0.5 * float(p[n, y] * blocks.square().sum()) / len(x)
    return total


@pytest.mark.parametrize("block", ["weight", "kernel", "channel", "layer"])
@pytest.mark.parametrize("group", [1, 4])
def test_scores_of_a_softmax_regression_are_the_fisher_form(linear, images, block, group):
    # Labels are drawn, so the estimate is a mean over draws; group > 1 must not bias it.
    draws = [fisher_scores(problem_of(linear, images, seed=seed), Fisher(block=block, group=group))["1"] for seed in range(30)]
    for j, bits in enumerate((Bits(2, 32), Bits(4, 32))):
        values = torch.stack(draws)[:, j]
        exact = exact_scores(linear, images, bits, block)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(len(values))


def test_activation_scores_are_squared_gradient_times_squared_error(linear, images):
    labels = torch.arange(64) % 3
    choices = {"1": tuple(Bits(32, a) for a in (2, 4, 32))}
    scores = fisher_scores(problem_of(linear, images, choices, labels=labels), Fisher(labels="given"))["1"]
    x = images.flatten(1).requires_grad_()
    gradient = torch.autograd.grad(nn.functional.cross_entropy(linear[1](x), labels, reduction="sum"), x)[0]
    for score, a in zip(scores, (2, 4), strict=False):
        quantizer = quantize(linear, {"1": Bits(32, a)}, calibration=images)[1].input_quantizer
        error = (quantizer(x) - x).detach()
        assert float(score) == pytest.approx(float(0.5 * (gradient * error).square().sum() / 64), rel=1e-4)
    assert float(scores[2]) == 0.0


def test_given_labels_take_one_pass_per_sample(linear, images):
    labels = torch.arange(64) % 3
    one, other = (fisher_scores(problem_of(linear, images, labels=labels), Fisher(labels="given", group=g))["1"] for g in (1, 16))
    assert torch.equal(one, other)


class Shared(nn.Module):
    """Two layers with one weight, a branch read twice, and a layer in BatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.norm(self.a(x)).relu() + self.b(x))


def test_shared_weights_frozen_parameters_and_training_mode_are_left_as_they_were(images):
    torch.manual_seed(0)
    model = Shared().train().requires_grad_(False)
    traced = trace(model, images[:2])
    problem = problem_of(model, images, build_choices(traced, (2, 4), (4, 8), pin_first="free", pin_last="free"))
    scores = fisher_scores(problem)
    assert all(bool((score[:3] > 0).all()) for score in scores.values())
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(scores[name], again) for name, again in fisher_scores(problem).items())


def test_pinned_sites_score_nothing_and_a_problem_of_pins_is_solved(linear, images):
    problem = problem_of(linear, images, {"1": (Bits(8, 32),)})
    assert fisher_scores(problem)["1"].tolist() == [0.0]
    assert search(problem, Fisher()).policy["1"] == Bits(8, 32)


def test_the_proposal_is_the_exact_allocation_of_the_scores():
    problem = planted("joint", seed=2).problem
    scores = fisher_scores(problem)
    result = search(problem, Fisher())

    def score(index):
        return sum(float(scores[name][j]) for name, j in zip(problem.choices, index, strict=True))

    indices = itertools.product(*(range(len(allowed)) for allowed in problem.choices.values()))
    best = min((index for index in indices if within(problem.terms, problem.limits, index)), key=score)
    assert score(problem.index(result.policy)) == pytest.approx(score(best), rel=1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_keeps_the_contract_and_is_within_a_hundredth_of_the_optimum(kind):
    report = check_method(Fisher(samples=256), kinds=(kind,), limit=0.01)
    assert all(row.uniform > 0.2 for row in report.rows)


@pytest.mark.parametrize(("kind", "seed"), [("linear", 1), ("linear", 2), ("joint", 1)])
def test_sensitive_sites_get_the_bits_wherever_they_are(kind, seed):
    plant = planted(kind, seed)
    policy = search(plant.problem, Fisher(samples=256)).policy
    most, *_, least = plant.sensitive
    assert policy[most].w * policy[most].a > policy[least].w * policy[least].a
    assert plant.gap(policy) < 0.01


def test_options_and_networks_that_do_not_fit(linear, images):
    with pytest.raises(RecipeError, match="fisher: samples=0, group=8; give at least 1 of each"):
        Fisher(samples=0)
    for options, message in (
        ({"block": "kernal"}, r"fisher: block='kernal' is unknown; did you mean 'kernel'\?"),
        ({"labels": "foo"}, "fisher: labels='foo' is unknown; known: model, given"),
        ({"errors": "bar"}, "fisher: errors='bar' is unknown; known: nearest, second-order"),
    ):
        with pytest.raises(RecipeError, match=message):
            Fisher(**options)
    with torch.no_grad():
        linear[1].bias[0] = math.inf
    with pytest.raises(TrainingError, match="fisher: the gradients at site '1' are not finite"):
        fisher_scores(problem_of(linear, images, labels=torch.zeros(64, dtype=torch.long)), Fisher(labels="given"))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.weight)


@pytest.mark.parametrize("a", [(32,), (2, 4)])
def test_a_functional_call_scores_as_the_layer_it_stands_for(images, a):
    torch.manual_seed(0)
    call = Functional()
    layer = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False))
    layer[1].weight.data.copy_(call.weight)
    scores = []
    for model in (call, layer):
        traced = trace(model, images[:1])
        problem = problem_of(model, images, build_choices(traced, (2, 4), a, pin_first="free", pin_last="free"))
        scores += fisher_scores(problem).values()
    assert torch.equal(*scores)
    assert bool((scores[0] > 0).all())


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.reshape(len(x), 2, 3).repeat(1, 1, 2)
        return self.head((self.left(x) @ self.right(x).transpose(1, 2) @ x).mean(1))


def test_products_of_two_activations_are_scored_on_both_operands(images):
    torch.manual_seed(0)
    model = Product()
    traced = trace(model, images[:1])
    products = [site.name for site in traced.sites if site.operands == 2]
    scores = fisher_scores(problem_of(model, images, build_choices(traced, (2, 8), (2, 4, 32))))
    assert len(products) == 2
    for name in products:
        two, four, none = scores[name].tolist()
        assert two > four > none == 0.0
