"""The random baseline: feasible policies of nearly equal cost, drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.allocation import repair
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RecipeError
from bitwright.policy import Policy
from bitwright.problem import Problem

DRAWS = 4096
"""Policies drawn at once; the first of them inside the band is proposed."""
Shares = list[NDArray[np.float64]]
Probabilities = list[NDArray[np.float64]]


@dataclass
class State:
    """How many policies were proposed."""

    proposed: int = 0


@dataclass(frozen=True)
class Random(SearchMethod[State]):
    r"""Propose random feasible policies whose cost is close below the limit.

    Uniform choices conditioned on their total cost are, for many sites, independent draws from the tilted distributions
    :math:`p_i(j) \propto \exp(-\sum_k \lambda_k c_{kij})` (maximum entropy; Jaynes, 1957), with :math:`\lambda` such that the
    expected cost is the one asked for. Policies are drawn from these until one lies in the band; inside a narrow band
    the tilt is constant, so policies there are equally likely. Where 4096 draws miss the band (few sites, or a limit above
    what the widest choices cost), the feasible draw that uses most of its budgets is taken.

    Attributes:
        count: policies to propose.
        within: width of the band below the limit, as a share of it, for the budget that binds.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    count: int = 1
    within: float = 0.02

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.within < 1:
            raise RecipeError(f"random: count={self.count}, within={self.within}; give a count of at least 1 and a share between 0 and 1")

    def start(self, problem: Problem) -> State:
        """Return the state before the first draw."""
        return State()

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Propose one policy, from a generator seeded by the problem and its number."""
        generator = np.random.default_rng([problem.seed, state.proposed])
        return State(state.proposed + 1), Proposal(draw(problem, tilted(problem, self.within), generator, self.within))

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether all were proposed."""
        return state.proposed >= self.count


def draw(problem: Problem, probabilities: Probabilities, generator: np.random.Generator, within: float) -> Policy:
    """Return a random feasible policy, if possible in the band ``within`` below the limit; see `tilted`."""
    columns = [generator.choice(len(p), size=DRAWS, p=p) for p in probabilities]
    chosen = np.stack(columns, 1)
    feasible = np.ones(DRAWS, dtype=bool)
    used = np.zeros(DRAWS)
    for site_terms, borders, limit in zip(problem.terms, problem.borders, problem.limits, strict=True):
        totals = np.sum([column[index] for column, index in zip(site_terms, columns, strict=True)], axis=0)
        totals = totals + sum(border.costs(columns) for border in borders)
        feasible &= totals <= limit
        used = np.maximum(used, totals / max(1, limit))
    if not feasible.any():
        return repair(problem.policy([int(j) for j in chosen[0]]), problem)
    inside = feasible & (used >= 1 - within)
    best = np.argmax(inside) if inside.any() else np.argmax(np.where(feasible, used, -np.inf))
    return problem.policy([int(j) for j in chosen[best]])


def tilted(problem: Problem, within: float) -> Probabilities:
    """Return for each site the probabilities of its choices, such that the expected cost lies in the middle of the band."""
    limits = np.asarray([max(1, limit) for limit in problem.limits], dtype=np.float64)
    shares = [np.stack([site_terms[i] for site_terms in problem.terms], 1) / limits for i in range(len(problem.sites))]
    return _probabilities(shares, _tilts(shares, 1 - within / 2))


def _probabilities(shares: Shares, tilts: NDArray[np.float64]) -> Probabilities:
    logits = [-share @ tilts for share in shares]
    weights = [np.exp(logit - logit.max()) for logit in logits]
    return [weight / weight.sum() for weight in weights]


def _tilts(shares: Shares, target: float) -> NDArray[np.float64]:
    """Return the tilts at which the expected share of every limit is at most ``target``: the minimum of a convex dual.

    Args:
        shares: per site what each choice takes of each limit, ``[choice, budget]``.
        target: the share.
    """
    from scipy.optimize import minimize  # noqa: PLC0415  (scipy is slow to import)
    from scipy.special import logsumexp  # noqa: PLC0415

    def dual(tilts: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value = sum(float(logsumexp(-share @ tilts)) for share in shares) + target * tilts.sum()
        expected = np.sum([share.T @ p for share, p in zip(shares, _probabilities(shares, tilts), strict=True)], axis=0)
        return float(value), target - expected

    # Where even the cheapest choices miss the target the tilts would run away: they are bounded, and so are the steps.
    bounds = [(0.0, 1e5)] * shares[0].shape[1]
    answer = minimize(dual, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    return np.asarray(answer.x, dtype=np.float64)
