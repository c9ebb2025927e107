"""Is the loss additive? Right where it is, a warning where it is not, and policies drawn as they should be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from bitwright.additivity import THRESHOLD, WITHIN, Additivity, Point, check_additivity
from bitwright.correlation import Correlation
from bitwright.errors import BitwrightError, RunError
from bitwright.methods.fisher import Fisher
from bitwright.methods.kl import KL
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.sensitivity import Sensitivity, fingerprint
from bitwright.testing import planted, table_problem

SITES, WIDTHS = 10, 6


@pytest.fixture
def problem():
    """A problem whose loss is the sum of a table, under one budget."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((SITES, WIDTHS)), axis=1)[:, ::-1] * np.exp(rng.normal(size=(SITES, 1)))
    terms = [np.sort(rng.integers(1, 100, (SITES, WIDTHS)), axis=1)]
    return table_problem(list(values), [list(terms[0])], [int(terms[0][:, 2].sum())])


def table_of(problem, change=lambda value: value):
    """Return a table of what each choice adds to the loss, changed."""
    widest = {name: allowed[-1] for name, allowed in problem.choices.items()}
    base = problem.loss(widest)
    values = {
        name: {bits: change(problem.loss(widest | {name: bits}) - base) for bits in allowed} for name, allowed in problem.choices.items()
    }
    return Sensitivity("kl", values, fingerprint(problem, None))


def test_a_sum_is_additive(problem):
    found = check_additivity(problem, table_of(problem), 16)
    assert found.spearman.value == found.near_budget.value == 1.0
    assert found.pearson.value == pytest.approx(1.0)
    assert found.warning is None
    assert json.loads(json.dumps(found.to_dict()))["warning"] is None


def test_half_of_the_policies_lie_close_below_the_budget_and_none_twice(problem):
    asked = []
    loss = problem.loss

    def noted(policy):
        asked.append(policy)
        return loss(policy)

    watched = Problem(problem.model, problem.trace, problem.choices, problem.budgets, evaluate=noted)
    found = check_additivity(watched, table_of(problem), 20)
    assert [point.drawn for point in found.points] == ["budget"] * 10 + ["choices"] * 10
    shares = [problem.costs(policy)[0] / problem.budgets[0].limit for policy in asked]
    assert all(1 - WITHIN <= share <= 1 for share in shares[:10])
    assert any(share > 1 for share in shares[10:])
    assert len(set(asked)) == len(asked) == 20
    for point, policy in zip(found.points, asked, strict=True):
        assert point.measured == loss(policy)
        assert point.predicted == pytest.approx(loss(policy) - loss({n: allowed[-1] for n, allowed in problem.choices.items()}))


def test_where_few_policies_lie_close_to_the_budget_the_others_are_drawn_over_all_choices():
    small = table_problem([[1.0, 0.5]] * 4, [[[2, 4]] * 4], [8])  # the cheapest policy alone keeps the budget
    found = check_additivity(small, table_of(small))
    assert [point.drawn for point in found.points] == ["budget"] + ["choices"] * 15
    assert found.near_budget is None
    assert found.warning is None
    assert found.to_dict()["near_budget"] is None
    with pytest.raises(BitwrightError, match="asked for 40 policies, and the choices make only 16 different ones; ask for 16 or fewer"):
        check_additivity(small, table_of(small), 40)


def test_the_same_seed_draws_the_same_policies(problem):
    table = table_of(problem)
    assert check_additivity(problem, table, 12) == check_additivity(problem, table, 12)
    other = Problem(problem.model, problem.trace, problem.choices, problem.budgets, seed=1, evaluate=problem.loss)
    assert check_additivity(other, table, 12).points != check_additivity(problem, table, 12).points


def test_a_table_that_foretells_nothing_is_a_warning(problem):
    rng = np.random.default_rng(3)
    found = check_additivity(problem, table_of(problem, lambda value: float(rng.random())), 40)
    assert found.spearman.value < THRESHOLD
    assert found.warning is not None
    assert "over 40 random policies the rank correlation of the loss foretold by 'kl' with the loss measured is" in found.warning
    assert f"below {THRESHOLD}" in found.warning


def test_what_fails_close_to_the_budget_alone_is_a_warning_once_it_is_sure():
    fine, unsure, sure = (Correlation(value, value - 0.1, high, 20) for value, high in ((0.95, 0.99), (0.7, 0.85), (0.3, 0.7)))
    points = (Point("budget", 1.0, 1.0),)
    assert Additivity("kl", points, fine, fine, unsure).warning is None
    assert "over 20 policies close to the budget" in str(Additivity("kl", points, fine, fine, sure).warning)
    assert "over 20 random policies" in str(Additivity("kl", points, unsure, fine, sure).warning)


def test_on_a_real_network_measured_sensitivities_foretell_the_loss():
    problem = planted("linear", seed=0).problem
    for method in (KL(), Fisher(samples=128)):
        found = check_additivity(problem, method.sensitivity(problem), 24)
        assert found.measure == method.name
        assert found.spearman.value > 0.95
        assert found.warning is None


def test_what_cannot_be_checked(problem):
    table = table_of(problem)
    with pytest.raises(BitwrightError, match="additivity: 7 policies tell nothing; draw at least 8"):
        check_additivity(problem, table, 7)
    few = Problem(problem.model, problem.trace, {n: (Bits(1, 32),) for n in problem.choices}, problem.budgets, evaluate=problem.loss)
    with pytest.raises(BitwrightError, match="asked for 8 policies, and the choices make only 1 different ones; give more choices"):
        check_additivity(few, table, 8)
    free = Problem(problem.model, problem.trace, problem.choices, [], evaluate=problem.loss)
    with pytest.raises(BitwrightError, match="drawn close to the budgets, and there are none; give one"):
        check_additivity(free, table, 8)
    with pytest.raises(RunError, match="another network"):
        check_additivity(problem, dataclasses.replace(table, fingerprint={**table.fingerprint, "model": "0"}), 8)
