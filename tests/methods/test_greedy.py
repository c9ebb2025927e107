"""Greedy: known walks, the queue of stale figures, refill, exchanges, several budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitwright.driver import Stop, search
from bitwright.errors import RecipeError
from bitwright.methods.greedy import Greedy
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.testing import check_method, planted, table_problem

PLAIN = Greedy(exchanges=0)


def _asked(problem, method):
    """Search, and return the result with the widths of every policy whose loss was asked, in order, the uniform one left out."""
    asked, evaluate = [], problem._evaluator

    def noted(policy):
        asked.append(tuple(bits.w for bits in policy.values()))
        return evaluate(policy)

    problem._evaluate = noted
    problem.__dict__.pop("_evaluator")
    problem.uniform = lambda: None
    return search(problem, method), asked


def _convex(sites, choices=7, seed=0):
    """Return a table like those of real networks: each bit less loses four times as much, some sites far more than others."""
    scale = np.exp(np.random.default_rng(seed).normal(0, 2, sites))
    values = [s * 4.0 ** -np.arange(choices) for s in scale]
    return table_problem(values, [[list(range(1, choices + 1))] * sites], [3 * sites], seed=seed)


def test_a_walk_down_by_hand():
    # Two sites, widths 1 to 3 at cost 1 to 3, at most 4 of the 6 that the widest cost. Down from (3, 3): 1.0 or 0.5 for one
    # unit of two missing: the second site. Then 1.0 for the first or 4.5 for the second: the first.
    problem = table_problem([[9.0, 1.0, 0.0], [5.0, 0.5, 0.0]], [[[1, 2, 3], [1, 2, 3]]], [4])
    result, asked = _asked(problem, PLAIN)
    # Stale figures keep their place: 1.0 of the first site waits until it is in front, and is then measured anew.
    assert asked == [(3, 3), (2, 3), (3, 2), (3, 1), (2, 2)]
    assert result.policy == problem.policy((1, 1))
    assert [trial.loss for trial in result.history] == [pytest.approx(5.0), pytest.approx(1.5)]  # of (3, 1), which fits too


def test_a_step_counts_for_no_more_than_what_is_missing():
    # One unit is missing. The first site saves 10 units for a loss of 2, the second one unit for a loss of 1.
    problem = table_problem([[2.0, 0.0], [1.0, 0.0]], [[[1, 11], [1, 2]]], [12])
    assert search(problem, PLAIN).policy == problem.policy((1, 0))


def test_only_exceeded_budgets_count():
    # The second budget holds anyway: what the first site saves of it is worth nothing.
    problem = table_problem([[2.0, 0.0], [1.5, 0.0]], [[[1, 2], [1, 2]], [[0, 100], [0, 1]]], [3, 1000])
    assert search(problem, PLAIN).policy == problem.policy((1, 0))


def test_the_refill_spends_what_a_coarse_step_left():
    # The first site's only step saves 10 of the 2 units missing, and leaves room for the second site's to be taken back.
    problem = table_problem([[0.1, 0.0], [0.5, 0.1, 0.0]], [[[1, 11], [1, 2, 3]]], [4])
    result = search(problem, PLAIN)
    assert result.policy == problem.policy((0, 2))


def test_an_exchange_leaves_a_local_end():
    # One unit is missing at first: the second site gives it cheapest and ends at (3, 1, 2). But the first site's step, a little
    # dearer, would have let the second keep two units.
    problem = table_problem([[1.2, 0.0], [3.0, 1.0, 0.0]], [[[1, 3], [1, 2, 3]]], [4])
    assert search(problem, PLAIN).loss == pytest.approx(1.2)
    tight = table_problem([[0.0, -5.0], [1.0, 0.0], [1.0, 0.0]], [[[1, 3], [1, 2], [1, 2]]], [5])
    ends = {search(tight, Greedy(exchanges=n)).loss for n in (0, 4)}
    assert min(ends) == pytest.approx(-3.0)


def test_exchanges_earn_their_place_on_tables():
    plants = [planted("table", seed) for seed in range(3)]
    gaps = {n: [plant.gap(search(plant.problem, Greedy(exchanges=n)).policy) for plant in plants] for n in (0, 32)}
    assert np.mean(gaps[0]) > 0.03
    assert np.mean(gaps[32]) < 0.01


def test_the_queue_saves_evaluations_and_ends_where_the_full_rounds_end():
    lazy, full = _convex(10), _convex(10)
    answers = [search(problem, Greedy(exchanges=0, lazy=lazy is problem)) for problem in (lazy, full)]
    assert answers[0].policy == answers[1].policy
    assert lazy.evaluations < full.evaluations / 3


def test_a_figure_that_came_out_too_high_is_looked_at_again():
    # The first site costs nothing, the nine others 0.1 a notch. But where the first is measured, with all others at their widest,
    # something makes it 0.12.
    plain = table_problem([[0.0] * 8, *[[0.1 * (7 - j) for j in range(8)]] * 9], [[list(range(1, 9))] * 10], [50])

    def loss(policy):
        return plain.loss(policy) + (0.12 if [bits.w for bits in policy.values()] == [7] + [8] * 9 else 0.0)

    problem = Problem(plain.model, plain.trace, plain.choices, plain.budgets, evaluate=loss)
    assert search(problem, PLAIN).policy["0"].w == 1


def test_fifty_sites_take_a_few_hundred_evaluations():
    problem = _convex(50, 5)
    result = search(problem, Greedy())
    assert problem.evaluations < 700  # there are more than a hundred rounds, and a full one would take fifty
    assert result.costs[0] == 150


@pytest.mark.parametrize("begin", ["widest", "cheapest"])
def test_both_ends_reach_the_optimum_of_a_convex_table(begin):
    problem = _convex(12)
    from bitwright.allocation import allocate

    values = [[problem.loss(problem.policy([j if k == i else 0 for k in range(12)])) for j in range(7)] for i in range(12)]
    best = problem.loss(problem.policy(allocate(values, problem.terms, problem.limits)))
    assert search(problem, Greedy(begin=begin)).loss == pytest.approx(best)


def test_from_the_cheapest_every_policy_fits():
    result = search(_convex(6), Greedy(begin="cheapest"))
    assert not any(trial.repaired for trial in result.history)
    assert result.history[0].policy == _convex(6).cheapest()


def test_where_the_widest_policy_fits_it_is_the_answer():
    problem = table_problem([[1.0, 0.0]] * 3, [[[1, 2]] * 3], [6])
    result = search(problem, Greedy())
    assert result.policy == problem.policy((1, 1, 1))
    assert problem.evaluations == 1


def test_where_no_step_is_left_the_nearest_policy_that_fits_goes_on():
    # Narrower is dearer in the second budget: going down never keeps both, and only the middle does.
    problem = table_problem([[0.2, 0.1, 0.0], [9.0, 5.0, 0.0]], [[[1, 3, 10]] * 2, [[9, 3, 4]] * 2], [6, 6])
    result = search(problem, Greedy())
    assert result.policy == problem.policy((1, 1))


def test_a_pinned_problem_has_one_answer():
    problem = table_problem([[1.0], [2.0]], [[[1], [1]]], [2])
    assert search(problem, Greedy()).policy == problem.policy((0, 0))


def test_steps_change_weights_and_activations():
    plant = planted("joint", 0)
    result, asked = None, set()
    result = search(plant.problem, Greedy())
    for trial in result.history:
        asked |= set(trial.policy.values())
    assert {bits.a for bits in asked} == {4, 8}
    assert result.policy == plant.optimum


def test_a_stopped_search_returns_the_best_that_fitted():
    problem = _convex(10)
    result = search(problem, Greedy(), stop=Stop(steps=3))
    assert result.status == "stopped"
    assert problem.feasible(result.policy)


def test_choices_that_save_nothing_are_not_taken():
    # 7 bits cost as much as 8 do.
    problem = table_problem([[4.0, 0.2, 0.0]] * 2, [[[1, 2, 2]] * 2], [3])
    _, asked = _asked(problem, Greedy())
    assert not any(2 in widths for widths in asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": "middle"}, "greedy: begin='middle'; give 'widest' or 'cheapest'"),
        ({"exchanges": -1}, "greedy: exchanges=-1; give 0 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Greedy(**options)


def test_keeps_the_contract():
    check_method(Greedy())


@pytest.mark.parametrize("options", [{"begin": "cheapest"}, {"lazy": False, "exchanges": 0}])
def test_keeps_the_contract_with_other_options(options):
    check_method(Greedy(**options), kinds=("table", "joint"), limit=0.05)


def test_the_widths_of_a_walk_are_choices():
    problem = _convex(5)
    _, asked = _asked(problem, Greedy())
    assert {w for widths in asked for w in widths} <= {bits.w for allowed in problem.choices.values() for bits in allowed}
    assert all(problem.feasible(t.policy) and not math.isnan(t.loss) for t in search(problem, Greedy()).history)
    assert Bits(1, 32) in problem.choices["0"]
