"""The uniform baseline: the widest single width that keeps the budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import BudgetError
from bitwright.problem import Problem


@dataclass
class State:
    """Whether the one proposal was made."""

    proposed: bool = False


@dataclass(frozen=True)
class Uniform(SearchMethod[State]):
    """Propose the widest policy of one width pair that keeps every budget; see `Problem.uniform` for what widest means."""

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    def start(self, problem: Problem) -> State:
        """Return the state before the proposal."""
        return State()

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Propose the uniform point; raises `BudgetError` where no single width keeps every budget."""
        policy = problem.uniform()
        if policy is None:
            asked = ", ".join(budget.text for budget in problem.budgets)
            raise BudgetError(f"method 'uniform': no single width keeps {asked}; use a method that mixes widths, or raise the budget")
        return State(proposed=True), Proposal(policy)

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether the proposal was made."""
        return state.proposed
