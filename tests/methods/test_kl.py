"""KL: every score is the loss of that one change, whatever is left out on the way; near-optimal on planted problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitwright.costs import Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.errors import RecipeError, TrainingError
from bitwright.methods.kl import KL
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.quant import quantize
from bitwright.quant.reference import ReferenceLoss, divergence
from bitwright.sites import trace
from bitwright.testing import NETWORKS, check_method, planted


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_score_is_the_loss_of_the_policy_that_changes_one_site(kind):
    problem = planted(kind, seed=1).problem
    scores = KL().scores(problem)
    loss = ReferenceLoss(problem.model, problem.data.selection, problem.data.fit, problem.sites, problem.seed)
    everything = Policy((name, Bits(32, 32)) for name in problem.trace.names)
    for name, allowed in problem.choices.items():
        for score, bits in zip(scores[name].tolist(), allowed, strict=True):
            assert score == pytest.approx(loss(everything.replace({name: bits})), rel=1e-5, abs=1e-9)


def test_without_correction_batchnorm_keeps_its_float_statistics():
    problem = planted("conv", seed=0).problem
    plain, corrected = KL(batchnorm=False).scores(problem), KL().scores(problem)
    assert any(not torch.allclose(plain[name], corrected[name], rtol=1e-3) for name in plain)
    loss = ReferenceLoss(problem.model, problem.data.selection, problem.data.fit, problem.sites, problem.seed)
    everything = Policy((name, Bits(32, 32)) for name in problem.trace.names)
    name = problem.trace.names[2]
    network = quantize(problem.model, everything.replace({name: Bits(2, 32)}), sites=problem.sites).eval()
    expected = float(divergence(loss.outputs, loss._outputs(network)))
    assert float(plain[name][problem.choices[name].index(Bits(2, 32))]) == pytest.approx(expected, rel=1e-5)


def test_added_pairs_are_the_sum_of_each_operand_alone_and_cost_fewer_passes():
    one, other = planted("joint", seed=0).problem, planted("joint", seed=0).problem
    measured, added = KL().scores(one), KL(pairs="added").scores(other)
    assert other.sample_passes < one.sample_passes
    everything = Policy((name, Bits(32, 32)) for name in one.trace.names)
    loss = ReferenceLoss(one.model, one.data.selection, one.data.fit, one.sites, one.seed)
    name = one.trace.names[1]
    parts = [loss(everything.replace({name: bits})) for bits in (Bits(2, 32), Bits(32, 4))]
    place = one.choices[name].index(Bits(2, 4))
    assert float(added[name][place]) == pytest.approx(sum(parts), rel=1e-5)
    assert float(measured[name][place]) == pytest.approx(float(added[name][place]), rel=0.5)


def test_passes_begin_at_the_changed_site():
    problem = planted("conv", seed=0).problem
    KL(batchnorm=False, images=128).scores(problem)
    evaluations = sum(map(len, problem.choices.values()))
    assert 128 * evaluations * 0.3 < problem.sample_passes < 128 * (evaluations + 2) * 0.85


def test_a_choice_that_changes_nothing_scores_nothing():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(32, 6, 1, 1)
    split = TensorSplit(x, torch.zeros(32, dtype=torch.long), classes=3)
    traced = trace(net, x[:1])
    choices = build_choices(traced, (4, 32), (32,), pin_first="free", pin_last="free")
    problem = Problem(net, traced, choices, Budget(WeightBits(), 10**6, ""), SearchData(split, split))
    for score in KL().scores(problem).values():
        assert float(score[0]) > 1e-6
        assert float(score[1]) == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        net[3].bias[0] = math.nan
    with pytest.raises(TrainingError, match="kl: site '1' at W4A32 gives outputs that are not finite"):
        KL().scores(problem)


@pytest.mark.parametrize(("options", "kinds"), [(KL(), NETWORKS), (KL(batchnorm=False, images=128, pairs="added"), ("joint",))])
def test_keeps_the_contract_and_is_within_a_hundredth_of_the_optimum(options, kinds):
    report = check_method(options, kinds=kinds, limit=0.01)
    assert all(row.uniform > 0.2 for row in report.rows)


def test_options_that_do_not_fit():
    with pytest.raises(RecipeError, match="kl: images=0; give at least 1"):
        KL(images=0)
    with pytest.raises(RecipeError, match="kl: pairs='add' is unknown; did you mean 'added'"):
        KL(pairs="add")
