"""EdMIPS: the contract, the composite of all widths, and the reading of the policy."""

from __future__ import annotations

import math

import pytest
import torch

from bitwright.costs import Budget
from bitwright.driver import search
from bitwright.errors import RecipeError
from bitwright.methods._softmax import shares, widest_first
from bitwright.methods.edmips import EdMIPS
from bitwright.problem import Problem
from bitwright.relaxation import Decisions
from bitwright.testing import Kind, check_method, planted

SHORT = {"max_steps": 300, "epochs": 1000, "batch_size": 64}


def test_contract() -> None:
    check_method(EdMIPS(**(SHORT | {"max_steps": 12})), kinds=("conv", "joint"), limit=math.inf)


@pytest.mark.parametrize(("kind", "gap"), [("linear", 0.05), ("joint", 0.05), ("conv", 0.5)])
def test_how_near_the_planted_optimum(kind: Kind, gap: float) -> None:
    """On convolutions a mixture of several low widths is more precise than any of them, so 1 bit looks better than it is."""
    plant = planted(kind, 0)
    assert plant.gap(search(plant.problem, EdMIPS(**SHORT)).history[-1].proposed) <= gap


@pytest.mark.parametrize("seed", [0, 1])
def test_a_loose_budget_is_spent(seed: int) -> None:
    """The pressure of a budget rests where it is kept, and what the most probable policy leaves of it goes to wider candidates."""
    plant = planted("linear", seed)
    problem, best = plant.problem, plant.problem.policy([len(own) - 1 for own in plant.problem.choices.values()])
    limit = round(0.6 * problem.costs(best)[0])
    budget = Budget(problem.budgets[0].cost, limit, f"weight_bits<={limit}")
    loose = Problem(problem.model, problem.trace, problem.choices, budget, problem.data, seed=seed, evaluate=problem.loss)
    found = search(loose, EdMIPS(**(SHORT | {"max_steps": 60})))
    assert 0.95 * limit <= found.costs[0] <= limit
    assert found.uniform is not None
    assert found.loss <= found.uniform.loss


def test_the_composite_is_the_softmax_weighted_sum() -> None:
    plant = planted("joint", 0)
    method = EdMIPS(**SHORT)
    state = method.start(plant.problem)
    net = state.net
    assert net is not None
    torch.manual_seed(0)
    state.alpha += torch.randn_like(state.alpha)
    p = shares(state.alpha, net.decisions, 1.0)
    net.set_gates(*widest_first(method.gates(state, p), net.decisions))
    row = next(r for r in net.decisions.free if net.decisions.rows[r].kind == "w")
    widths = net.decisions.rows[row].widths
    layer = net.network.get_submodule(plant.problem.trace[net.decisions.rows[row].sites[0]].layers[0])
    expected = sum(float(p[row, i]) * layer.weight_quantizer.at_width(layer.weight, torch.tensor(w)) for i, w in enumerate(widths))
    assert torch.allclose(layer.quantized_weight(), expected, atol=1e-5)


def test_shares_leave_out_candidates_that_a_row_does_not_have() -> None:
    decisions = Decisions(planted("joint", 0).problem, "layer")
    p = shares(torch.zeros(len(decisions.rows), decisions.widest, dtype=torch.float64), decisions, 1.0)
    for row, own in zip(decisions.rows, p, strict=True):
        assert own[: len(row.widths)].sum() == pytest.approx(1)
        assert torch.all(own[len(row.widths) :] == 0)


def test_argmax_is_each_rows_most_probable_width_and_is_repaired() -> None:
    plant = planted("linear", 0)
    early = search(plant.problem, EdMIPS(**(SHORT | {"max_steps": 2}), final="argmax")).history[-1]
    assert plant.problem.feasible(early.policy)
    late = search(plant.problem, EdMIPS(**(SHORT | {"max_steps": 2}))).history[-1]
    assert not late.repaired


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="edmips: final='best' is unknown"):
        EdMIPS(final="best")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="descent in"):
        EdMIPS(descent=0)
