"""The public test kit: planted optima are optima, and a method that breaks its contract is found out."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bitwright.allocation import allocate
from bitwright.driver import Proposal, SearchMethod
from bitwright.policy import Bits
from bitwright.quant.reference import ReferenceLoss
from bitwright.testing import NETWORKS, Report, Row, check_method, planted, table_problem


@dataclass
class Place:
    at: int = 0


@dataclass(frozen=True)
class Cheapest(SearchMethod[Place]):
    """The stub that every suite must fail: it proposes the cheapest policy."""

    ranking: ClassVar = "loss"

    steps: int = 1

    def start(self, problem):
        return Place()

    def step(self, problem, state, told):
        return Place(state.at + 1), Proposal(problem.cheapest())

    def done(self, problem, state):
        return state.at >= self.steps


@dataclass(frozen=True)
class CheapestLast(Cheapest):
    ranking: ClassVar = "last"


@dataclass
class Table:
    rows: list[list[float]]
    proposed: bool = False


@dataclass(frozen=True)
class OneAtATime(SearchMethod[Table]):
    """Measures the loss of every choice of every site, the others at their widest, one per step; then allocates exactly."""

    ranking: ClassVar = "loss"

    def start(self, problem):
        return Table([])

    def step(self, problem, state, told):
        if len(state.rows) < len(problem.sites):
            widest = [len(allowed) - 1 for allowed in problem.choices.values()]
            i = len(state.rows)
            state.rows.append([problem.loss(problem.policy([*widest[:i], j, *widest[i + 1 :]])) for j in range(widest[i] + 1)])
            return state, None
        state.proposed = True
        return state, Proposal(problem.policy(allocate(state.rows, problem.terms, problem.limits)))

    def done(self, problem, state):
        return state.proposed


solved = functools.cache(planted)  # for tests that only ask


# ---- planted problems


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_of_a_table_is_that_of_brute_force(seed):
    plant = planted("table", seed)
    problem = plant.problem
    sites = list(problem.choices)[:4]
    # Brute force over four sites, the rest as in the optimum: nothing feasible there may be better.
    for widths in itertools.product(*(problem.choices[name] for name in sites)):
        policy = plant.optimum.replace(dict(zip(sites, widths, strict=True)))
        assert not problem.feasible(policy) or problem.loss(policy) >= plant.best - 1e-12
    assert problem.feasible(plant.optimum)
    assert plant.gap(plant.optimum) == 0.0
    assert plant.gap(problem.cheapest()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_loss_of_a_planted_network_is_the_reference_loss(kind):
    plant = solved(kind, 1)
    problem = plant.problem
    reference = ReferenceLoss(problem.model, problem.data.selection, problem.data.fit, problem.sites, problem.seed)
    for policy in (plant.optimum, problem.cheapest(), problem.policy([len(c) - 1 for c in problem.choices.values()])):
        assert problem.loss(policy) == reference(policy)


@pytest.mark.parametrize("kind", NETWORKS)
def test_planted_networks_answer_as_their_labels_say_and_hide_where_they_are_sensitive(kind):
    plants = [solved(kind, seed) for seed in (0, 1)]
    assert len({plant.sensitive for plant in plants}) > 1
    for plant in plants:
        problem = plant.problem
        x, y = problem.data.fit.batch(torch.arange(len(problem.data.fit)))
        with torch.no_grad():
            answers = problem.model(x).argmax(1)
        assert torch.equal(answers, y)
        assert len(y.unique()) >= 4
        widest = problem.policy([len(c) - 1 for c in problem.choices.values()])
        fall = [problem.loss(widest.replace({name: problem.choices[name][0]})) for name in (plant.sensitive[0], plant.sensitive[-1])]
        assert fall[0] > 5 * fall[1]
        assert plant.gap(problem.uniform()) > 0.2


def test_the_gap_counts_what_is_over_a_limit():
    plant = planted("table", 0)
    widest = plant.problem.policy([len(c) - 1 for c in plant.problem.choices.values()])
    cost, budget = plant.problem.costs(widest), plant.problem.budgets
    assert plant.problem.loss(widest) < plant.best
    assert plant.gap(widest) == pytest.approx(max(c / b.limit - 1 for c, b in zip(cost, budget, strict=True)))


def test_a_table_problem_is_what_it_was_given():
    problem = table_problem([[4.0, 1.0], [0.5, 0.1]], [[[1, 2], [3, 5]], [[7, 8], [9, 10]]], [5, 16])
    policy = problem.policy((1, 0))
    assert problem.loss(policy) == 1.5
    assert problem.costs(policy) == (5, 17)
    assert policy["0"] == Bits(2, 32)


# ---- methods that keep the contract


@pytest.mark.parametrize("seed", range(3))
def test_a_measured_table_and_exact_allocation_have_no_gap_on_tables(seed):
    report = check_method(OneAtATime(), kinds=("table",), seeds=(seed,))
    assert report.rows[0].gap <= 1e-9
    assert report.rows[0].uniform > 0.1


@pytest.mark.parametrize("kind", NETWORKS)
def test_and_next_to_none_on_networks(kind):
    assert check_method(OneAtATime(), kinds=(kind,), limit=0.01).rows[0].gap <= 0.01


def test_the_report_is_a_table():
    text = str(Report("mine", (Row("linear-0", 0.0123, 0.5, 10, 1.5),)))
    assert text.splitlines()[1].split() == ["linear-0", "1.230", "50.00", "10", "1.50"]


# ---- methods that do not


@pytest.mark.parametrize("method", [Cheapest(), CheapestLast()])
def test_the_stub_that_proposes_the_cheapest_policy_fails(method):
    for kind in ("table", "linear"):
        with pytest.raises(AssertionError, match=rf"{kind}-0: its proposal is 100 % from the optimum, more than"):
            check_method(method, kinds=(kind,))


def test_hiding_behind_repair_does_not_help():
    @dataclass(frozen=True)
    class Widest(Cheapest):
        def step(self, problem, state, told):
            return Place(1), Proposal(problem.policy([len(c) - 1 for c in problem.choices.values()]))

    with pytest.raises(AssertionError, match="from the optimum"):
        check_method(Widest(), kinds=("table",))


@dataclass
class Unfrozen(Cheapest.__mro__[1][Place]):  # type: ignore[misc]
    ranking: ClassVar = "best"

    def start(self, problem):
        return Place()

    def step(self, problem, state, told):
        return Place(1), Proposal(problem.cheapest())

    def done(self, problem, state):
        return True


def test_options_that_can_change_and_an_unknown_ranking():
    with pytest.raises(AssertionError, match="its options are no frozen dataclass") as caught:
        check_method(Unfrozen(), kinds=("table",), limit=math.inf)
    assert "its ranking is neither 'loss' nor 'last'" in str(caught.value)


@dataclass
class Weights:
    at: int
    noise: Tensor


class Meddler(SearchMethod[Weights]):
    """Three steps that propose by a random draw; subclasses break one rule each."""

    ranking: ClassVar = "loss"

    def start(self, problem):
        return Weights(0, torch.zeros(len(problem.sites)))

    def step(self, problem, state, told):
        self.meddle(problem, state)
        state.at += 1
        state.noise += torch.rand(len(problem.sites))
        index = [int(1000 * n) % len(c) for n, c in zip(state.noise, problem.choices.values(), strict=True)]
        return state, Proposal(problem.policy(index))

    def done(self, problem, state):
        return state.at >= 3

    def meddle(self, problem, state):
        pass


@dataclass(frozen=True)
class Innocent(Meddler):
    pass


@dataclass(frozen=True)
class HiddenState(Meddler):
    seen: ClassVar = []

    def meddle(self, problem, state):
        self.seen.append(1)
        state.noise += 0.137 * len(self.seen)


@dataclass(frozen=True)
class ForgetsInState(Meddler):
    def step(self, problem, state, told):
        state, proposal = super().step(problem, state, told)
        state.at += 0
        kept = Weights(state.at, state.noise)
        kept.hidden = getattr(state, "hidden", 0) + 1
        kept.noise = kept.noise + 0.1 * kept.hidden
        return kept, proposal


@dataclass(frozen=True)
class TouchesWeights(Meddler):
    def meddle(self, problem, state):
        with torch.no_grad():
            next(problem.model.parameters()).mul_(1.5)


@dataclass(frozen=True)
class LeavesHooks(Meddler):
    def meddle(self, problem, state):
        problem.model.register_forward_hook(lambda *_: None)


@dataclass(frozen=True)
class ChangesMode(Meddler):
    def meddle(self, problem, state):
        problem.model.train()


@dataclass(frozen=True)
class LeavesGradients(Meddler):
    def meddle(self, problem, state):
        x, _ = problem.data.fit.batch(torch.arange(2))
        problem.model(x).sum().backward()


def test_a_random_method_keeps_the_contract():
    assert check_method(Innocent(), kinds=("linear",), limit=math.inf).rows[0].steps == 3


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HiddenState(), "stopped and resumed, its history is another"),
        (ForgetsInState(), "stopped and resumed, its final state is another"),
        (TouchesWeights(), "after the search the network's weights or buffers are others"),
        (LeavesHooks(), "after the search hooks are left on the network"),
        (ChangesMode(), "after the search modules of the network are in another mode"),
        (LeavesGradients(), "after the search the network holds gradients"),
    ],
)
def test_each_broken_rule_is_named(method, message):
    with pytest.raises(AssertionError, match=message):
        check_method(method, kinds=("linear",), limit=math.inf)
