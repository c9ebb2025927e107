"""A search method of your own, in one file: descend from the widest policy, always by the cheapest loss per unit of cost.

bitwright search --method examples.own_method:Descent …      # or --set search.method=own_method:Descent in a recipe
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.policy import Policy
from bitwright.problem import Problem


@dataclass
class State:
    """All that the search holds: the choice of each site. The driver saves it, so a killed search goes on."""

    index: list[int]


@dataclass(frozen=True)
class Descent(SearchMethod[State]):
    """Lower one site at a time until the budget holds; ``tries`` sites are compared at each step."""

    ranking: ClassVar[Literal["loss", "last"]] = "last"

    tries: int = 4

    def start(self, problem: Problem) -> State:
        """Start at the widest choice of every site."""
        return State([len(allowed) - 1 for allowed in problem.choices.values()])

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Lower the site that loses least for what it saves, and propose what comes out."""
        policy = problem.policy(state.index)
        if not problem.feasible(policy):
            state.index = min(self._lowered(problem, state), key=lambda index: self._price(problem, policy, problem.policy(index)))
        return state, Proposal(problem.policy(state.index))

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether the budget holds."""
        return problem.feasible(problem.policy(state.index))

    def _lowered(self, problem: Problem, state: State) -> list[list[int]]:
        """Return the indices with one site a choice lower, the sites that save most first."""
        lower = [[*state.index[:k], i - 1, *state.index[k + 1 :]] for k, i in enumerate(state.index) if i > 0]
        return sorted(lower, key=lambda index: problem.costs(problem.policy(index)))[: self.tries]

    def _price(self, problem: Problem, before: Policy, after: Policy) -> float:
        saved = problem.costs(before)[0] - problem.costs(after)[0]
        return problem.loss(after) / max(1, saved)
