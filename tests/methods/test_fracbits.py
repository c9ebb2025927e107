"""FracBits: the contract, the interpolation, and the shift that makes rounded widths fit."""

from __future__ import annotations

import math

import pytest
import torch

from bitwright.driver import search
from bitwright.errors import RecipeError
from bitwright.methods.fracbits import FracBits, interpolated, nearest_candidates, neighbours, shift_to_fit
from bitwright.relaxation import Decisions
from bitwright.testing import Kind, check_method, planted

SHORT = {"max_steps": 150, "epochs": 1000, "batch_size": 64}


def test_contract() -> None:
    check_method(FracBits(**(SHORT | {"max_steps": 12})), kinds=("conv", "joint"), limit=math.inf)


@pytest.mark.parametrize(("kind", "gap"), [("linear", 0.4), ("joint", 0.05), ("conv", 0.4)])
def test_how_near_the_planted_optimum(kind: Kind, gap: float) -> None:
    """Interpolated widths are more precise than they will be once fixed (what SDQ's authors argue): the gap is no small one."""
    plant = planted(kind, 0)
    assert plant.gap(search(plant.problem, FracBits(**(SHORT | {"max_steps": 300}))).history[-1].proposed) <= gap


@pytest.fixture
def decisions() -> Decisions:
    return Decisions(planted("linear", 0).problem, "layer")


def test_interpolation_between_neighbours(decisions: Decisions) -> None:
    bits = torch.full((len(decisions.rows),), 5.0, dtype=torch.float64)
    p = interpolated(bits, decisions)
    free = decisions.free[0]
    assert decisions.rows[free].widths == (1, 2, 3, 4, 8)
    assert p[free].tolist() == pytest.approx([0, 0, 0, 0.75, 0.25])
    assert neighbours(bits, decisions)[free] == 4
    assert torch.allclose(p.sum(1), torch.ones(len(p), dtype=torch.float64))


def test_the_cost_is_interpolated_and_has_a_gradient(decisions: Decisions) -> None:
    bits = torch.full((len(decisions.rows),), 2.5, dtype=torch.float64).requires_grad_()
    cost = decisions.expected_costs(interpolated(bits, decisions))[0]
    (slope,) = torch.autograd.grad(cost, bits)
    step = bits.detach() + 0.25
    assert float(decisions.expected_costs(interpolated(step, decisions))[0]) == pytest.approx(cost.item() + 0.25 * slope.sum().item())


def test_rounding(decisions: Decisions) -> None:
    free = decisions.free[0]
    rounded = {
        value: nearest_candidates(torch.full((len(decisions.rows),), value), decisions)[free] for value in (0.2, 1.6, 2.5, 6.0, 6.1, 9.0)
    }
    assert rounded == {0.2: 0, 1.6: 1, 2.5: 1, 6.0: 3, 6.1: 4, 9.0: 4}


@pytest.mark.parametrize("start", [1.0, 3.3, 8.0])
def test_the_shift_is_the_largest_that_fits(decisions: Decisions, start: float) -> None:
    torch.manual_seed(0)
    bits = start + torch.rand(len(decisions.rows), dtype=torch.float64)
    shift = shift_to_fit(bits, decisions, rounded=True)
    problem = decisions.problem
    assert problem.feasible(decisions.policy(nearest_candidates(bits + shift, decisions)))
    assert not problem.feasible(decisions.policy(nearest_candidates(bits + shift + 1e-6, decisions)))


def test_a_budget_that_holds_everything_needs_no_shift_down() -> None:
    problem = planted("linear", 0).problem
    loose = Decisions(problem, "layer")
    loose.limits = [limit * 100 for limit in loose.limits]
    assert shift_to_fit(torch.ones(len(loose.rows), dtype=torch.float64), loose, rounded=False) > 7


def test_proposals_keep_the_budget_unrepaired() -> None:
    plant = planted("joint", 1)
    result = search(plant.problem, FracBits(**(SHORT | {"max_steps": 60})))
    assert not any(trial.repaired for trial in result.history)


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="bits_lr must be above 0"):
        FracBits(bits_lr=0)
    with pytest.raises(RecipeError, match="fracbits: granularity='kernel' is unknown"):
        FracBits(granularity="kernel")  # type: ignore[arg-type]
