"""The random baseline: feasible, close below the limit, equally likely policies, seeded."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from bitwright import models
from bitwright.costs import parse_budget
from bitwright.driver import search
from bitwright.errors import RecipeError
from bitwright.methods.random import Random, draw, tilted
from bitwright.policy import Bits
from bitwright.problem import Problem, build_choices
from bitwright.sites import trace
from bitwright.testing import check_method, table_problem


@pytest.fixture(scope="module")
def resnet20():
    return trace(models.build("cifar_resnet20"), torch.zeros(1, 3, 32, 32))


def problem_of(traced, budgets, weights=range(1, 9), activations=(32,), seed=0):
    choices = build_choices(traced, weights, activations)
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    parsed = [parse_budget(text, traced.sites, pins=pins) for text in budgets]
    return Problem(torch.nn.Identity(), traced, choices, parsed, seed=seed, evaluate=lambda policy: 1.0)


@pytest.mark.parametrize(
    ("budgets", "activations"),
    [(["weight_bits<=2"], (32,)), (["bitops<=W3A3"], (2, 3, 4, 6, 8)), (["bitops<=W3A3", "weight_bits<=3"], (2, 3, 4, 6, 8))],
)
def test_policies_of_a_real_network_are_feasible_and_within_two_percent_of_a_limit(resnet20, budgets, activations):
    problem = problem_of(resnet20, budgets, activations=activations)
    result = search(problem, Random(count=20))
    assert len({trial.policy for trial in result.history}) == 20
    for trial in result.history:
        shares = [cost / budget.limit for cost, budget in zip(trial.costs, problem.budgets, strict=True)]
        assert not trial.repaired
        assert 0.98 <= max(shares) <= 1


def test_every_width_is_drawn_and_pins_are_kept(resnet20):
    result = search(problem_of(resnet20, ["weight_bits<=2"]), Random(count=20))
    assert {bits.w for trial in result.history for bits in trial.policy.values()} == set(range(1, 9))
    assert all(trial.policy[resnet20.first] == Bits(8, 32) for trial in result.history)


def test_policies_in_the_band_are_equally_likely():
    # Five sites of equal cost, widths 1 to 3, sum of costs exactly 9 or 10: 45 + 51 policies.
    problem = table_problem([[0.0] * 3] * 5, [[[1, 2, 3]] * 5], [10])
    generator, probabilities = np.random.default_rng(0), tilted(problem, 0.1)
    seen = Counter(draw(problem, probabilities, generator, 0.1) for _ in range(2000))
    assert {sum(bits.w for bits in policy.values()) for policy in seen} == {9, 10}
    assert len(seen) == 96
    for total in (9, 10):
        drawn = [n for policy, n in seen.items() if sum(bits.w for bits in policy.values()) == total]
        expected = sum(drawn) / len(drawn)
        chi_square = sum((n - expected) ** 2 / expected for n in drawn)
        assert abs(chi_square - (len(drawn) - 1)) < 4.5 * math.sqrt(2 * (len(drawn) - 1))


def test_where_the_band_is_empty_the_most_that_fits_is_taken():
    problem = table_problem([[0.0] * 2] * 2, [[[1, 50], [1, 50]]], [99])
    assert search(problem, Random()).costs == (51,)
    loose = table_problem([[0.0] * 2] * 2, [[[1, 50], [1, 50]]], [1000])
    assert search(loose, Random()).costs == (100,)


def test_where_no_draw_fits_the_nearest_policy_is_proposed():
    # 30 sites must all take their only cheap choice of 5: no draw of 4096 does.
    columns = [[[1000, 1000, 1, 1000, 1000]] * 30]
    result = search(table_problem([[0.0] * 5] * 30, columns, [30]), Random())
    assert (result.costs, result.history[0].repaired) == ((30,), False)


def test_the_seed_and_the_number_decide(resnet20):
    one, two = (search(problem_of(resnet20, ["weight_bits<=2"]), Random(count=count)).history for count in (3, 5))
    assert [trial.policy for trial in one] == [trial.policy for trial in two[:3]]
    other = search(problem_of(resnet20, ["weight_bits<=2"], seed=1), Random(count=3)).history
    assert [trial.policy for trial in one] != [trial.policy for trial in other]


@pytest.mark.parametrize("options", [{"count": 0}, {"within": 0.0}, {"within": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(RecipeError, match=r"random: count=.*; give a count of at least 1 and a share between 0 and 1"):
        Random(**options)


@pytest.mark.parametrize("kind", ["table", "linear"])
def test_keeps_the_contract(kind):
    check_method(Random(count=4), kinds=(kind,), limit=math.inf)
