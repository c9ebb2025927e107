"""Evolution: genes, repair, seeds, Optuna's study made again from the state."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.costs import parse_budget
from bitwright.driver import Stop, Trial, search
from bitwright.errors import BitwrightError, RecipeError
from bitwright.methods.evolution import Evolution, _decoded, _encoded, _Engine, _space, _within
from bitwright.notches import notches
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, build_choices
from bitwright.sites import trace
from bitwright.testing import check_method, planted, table_problem

pytest.importorskip("optuna")

SMALL = Evolution(trials=60, population=10)


def _network_problem(pairs=None, budget="bitops<=W3A5"):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    traced = trace(model, torch.zeros(1, 8))
    choices = build_choices(traced, (2, 4, 8), (4, 8), pin_first="free", pin_last="free")
    choices = choices if pairs is None else dict.fromkeys(choices, tuple(Bits(*pair) for pair in pairs))
    limits = [parse_budget(budget, traced.sites, pins={})]
    return Problem(model, traced, choices, limits, evaluate=lambda policy: sum(1 / (b.w * b.a) for b in policy.values()))


def test_genes_and_back():
    problem = _network_problem()
    space = _space(problem)
    assert space == {f"{operand}{i}": {"w": (2, 4, 8), "a": (4, 8)}[operand] for i in range(4) for operand in "wa"}
    policy = Policy({"0": (2, 8), "1": (8, 4), "2": (4, 4), "3": (8, 8)})
    assert _encoded(space, policy) == {"w0": 0, "a0": 1, "w1": 2, "a1": 0, "w2": 1, "a2": 0, "w3": 2, "a3": 1}
    assert _decoded(problem, space, _encoded(space, policy)) == policy


def test_genes_that_name_no_choice_take_the_nearest():
    problem = _network_problem(pairs=[(2, 2), (4, 4), (8, 8)])
    genes = dict.fromkeys(_space(problem), 0) | {"w0": 2, "a0": 1}
    assert _decoded(problem, _space(problem), genes)["0"] == Bits(4, 4)  # W8A4 is a factor of 2 from it, and as far from W8A8


@pytest.mark.parametrize("fill", [True, False])
def test_a_policy_is_brought_within_the_budgets(fill):
    plant = planted("table", 0)
    problem, generator = plant.problem, np.random.default_rng(0)
    widest = problem.policy([len(allowed) - 1 for allowed in problem.choices.values()])
    steps, found = notches(problem), set()
    for _ in range(20):
        policy = _within(problem, steps, widest, generator, fill=fill)
        assert problem.feasible(policy)
        found.add(policy)
        if fill:  # nothing fits that is one notch wider
            index = problem.index(policy)
            wider = [[*index[:i], j + 1, *index[i + 1 :]] for i, j in enumerate(index) if j + 1 < 5]
            assert not any(problem.feasible(problem.policy(other)) for other in wider)
    assert len(found) > 10
    fits = problem.cheapest()
    assert (_within(problem, steps, fits, generator, fill=fill) == fits) is not fill


def test_where_no_notch_down_helps_the_nearest_policy_is_taken():
    # Narrower is dearer in the second budget, so that going down alone cannot keep both.
    problem = table_problem([[0.2, 0.1, 0.0]] * 2, [[[1, 3, 10]] * 2, [[9, 3, 4]] * 2], [6, 6])
    policy = _within(problem, notches(problem), problem.policy((0, 0)), np.random.default_rng(0), fill=True)
    assert problem.index(policy) == (1, 1)


def test_the_first_generation_begins_with_the_uniform_policy_and_lies_close_below_the_limit():
    problem = _network_problem()
    history = search(problem, Evolution(trials=11, population=10)).history
    assert history[0].policy == problem.uniform()
    assert not any(trial.repaired for trial in history)
    assert np.mean([trial.costs[0] / problem.budgets[0].limit for trial in history[1:10]]) > 0.85


def test_policies_are_new_while_there_are_new_ones():
    plant = planted("table", 0)
    history = search(plant.problem, Evolution(trials=100, population=10)).history
    assert len({trial.policy for trial in history}) == 100


def test_the_search_ends_where_nothing_new_is_left():
    problem = table_problem([[1.0, 0.0]] * 3, [[[1, 2]] * 3], [5])  # the uniform policy, and three that fill the room
    result = search(problem, Evolution(trials=100, population=5))
    assert result.status == "done"
    assert len(result.history) < 20
    assert len({trial.policy for trial in result.history}) == 4


def test_a_pinned_problem_has_one_answer():
    problem = table_problem([[1.0], [2.0]], [[[1], [1]]], [2])
    result = search(problem, Evolution())
    assert (result.policy, result.steps) == (problem.policy((0, 0)), 1)


def test_selection_breeds_better_generations():
    plant = planted("table", 1)
    losses = [trial.loss for trial in search(plant.problem, Evolution(trials=100, population=20)).history]
    assert np.mean(losses[80:]) < np.mean(losses[:20]) - 0.25 * np.ptp(losses[:20])


def test_the_front_reaches_below_the_limits():
    problem = _network_problem()
    spans = {}
    for objectives in ("loss", "front"):
        history = search(problem, Evolution(trials=80, population=10, objectives=objectives)).history[10:]
        spans[objectives] = np.mean([trial.costs[0] for trial in history]) / problem.budgets[0].limit
    assert spans["front"] < 0.9 < spans["loss"]


def test_several_budgets_are_objectives_of_the_front():
    plant = planted("table", 0)
    method = Evolution(trials=30, population=5, objectives="front")
    assert method.start(plant.problem).values.shape == (0, 3)
    assert all(plant.problem.feasible(trial.proposed) for trial in search(plant.problem, method).history)


@pytest.mark.parametrize("trials", [7, 10, 19, 20, 21])
def test_a_study_made_again_asks_for_the_same_children(trials):
    """At every place in a generation: its parents are the same ones, in the same order."""
    problem = planted("table", 2).problem
    method = Evolution(trials=1000, population=10)
    with torch.random.fork_rng():
        state, told = method.start(problem), None
        for k in range(trials):
            torch.manual_seed(k)
            state, proposal = method.step(problem, state, told)
            policy = proposal.policy
            told = Trial(k + 1, policy, policy, problem.costs(policy), problem.loss(policy), repaired=False, seconds=0.0)
        again = _Engine(problem, method, state)
        again.tell(told.policy, [told.loss], state.asked)
        state.engine.tell(told.policy, [told.loss], state.asked)
        asked = [(state.engine.ask(seed), again.ask(seed)) for seed in range(12)]
    assert all(live == rebuilt for live, rebuilt in asked)
    assert len({str(live) for live, _ in asked}) > 6


def test_without_optuna_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BitwrightError, match=r"method 'evolution' needs Optuna, which is not installed; pip install 'bitwright\[search\]'"):
        search(planted("table", 0).problem, Evolution())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "evolution: trials=0, population=20; give at least 1 and 2"),
        ({"population": 1}, "evolution: trials=400, population=1; give at least 1 and 2"),
        ({"objectives": "cost"}, "evolution: objectives='cost'; give 'loss' or 'front'"),
        ({"mutation": 1.5}, r"evolution: mutation=1.5, crossover=0.9; give probabilities from 0 to 1"),
        ({"crossover": -0.1}, r"evolution: mutation=None, crossover=-0.1; give probabilities from 0 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Evolution(**options)


def test_a_stopped_search_returns_the_best_so_far():
    result = search(planted("table", 0).problem, SMALL, stop=Stop(steps=12))
    assert result.status == "stopped"
    assert result.loss == min(trial.loss for trial in result.history)


def test_keeps_the_contract():
    check_method(Evolution(trials=120))  # as by default, where a search of the table takes 400


def test_the_front_keeps_the_contract():
    check_method(Evolution(trials=30, population=8, objectives="front"), kinds=("table",), limit=0.5)
