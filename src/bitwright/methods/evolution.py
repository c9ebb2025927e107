"""Evolution: NSGA-II over policies (Deb, Pratap, Agarwal, Meyarivan; 2002), by Optuna.

A policy's genes are the widths of its sites: one gene for the weights and one for the activations, where there is a choice. Children
take each gene from one of two parents, each chosen by a tournament, and now and then a gene is drawn anew; the best half of parents
and children, by non-dominated sorting and crowding distance, are the next parents. All of this is Optuna's `NSGAIISampler`.

Budgets are kept by repair: notches of a child that breaks one are taken down at random until it holds, and what then still fits is
taken up again, *before* the child is judged; it enters the population as such (Michalewicz and Arabas, 1994, on knapsack problems). So
no evaluation is spent on what cannot be returned, and no constraint is left for the selection to handle. A child that was judged before is
changed gene by gene until it is new. The first generation is the uniform policy and random policies close below the limits.

Optuna is asked for every child, and told its values, in a study in memory. What it was told is part of the state, from which the study
is made again after a resume; its sampler is seeded anew at every step. So nothing of Optuna's is saved, and a resumed search is the same
search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bitwright.allocation import repair
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import BitwrightError, RecipeError
from bitwright.methods.random import draw, tilted
from bitwright.notches import Notches, notches
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem

NEAR = 0.02
"""How close below the limits the first generation's random policies are, as a share."""
CHANGES = 100
"""Genes drawn anew, one after the other, to make a child that was not judged before."""


@dataclass
class State:
    """All that was judged.

    ``index``: int64 [trial, site], the choices; ``values``: float64 [trial, objective]; ``attributes``: what Optuna noted of each trial;
    ``asked``: the same of the child whose loss is still to be told; ``repeats``: children in a row that could not be made new.
    """

    index: Tensor
    values: Tensor
    attributes: list[dict[str, Any]]
    asked: dict[str, Any]
    repeats: int = 0

    def __post_init__(self) -> None:
        self.engine: _Engine | None = None


@dataclass(frozen=True)
class Evolution(SearchMethod[State]):
    """Options of the evolutionary search.

    Attributes:
        trials: policies judged; fewer where a whole generation brings nothing new.
        population: policies of a generation.
        objectives: ``loss`` breeds for the least loss within the budgets, ``front`` for low costs as well: the Pareto front below the
            limits.
        mutation: probability that a gene is drawn anew; None is one gene in a child on average.
        crossover: probability that a child has two parents.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    trials: int = 400
    population: int = 20
    objectives: Literal["loss", "front"] = "loss"
    mutation: float | None = None
    crossover: float = 0.9

    def __post_init__(self) -> None:
        if self.trials < 1 or self.population < 2:
            raise RecipeError(f"evolution: trials={self.trials}, population={self.population}; give at least 1 and 2")
        if self.objectives not in ("loss", "front"):
            raise RecipeError(f"evolution: objectives='{self.objectives}'; give 'loss' or 'front'")
        if not 0 <= self.crossover <= 1 or not 0 <= (self.mutation or 0) <= 1:
            raise RecipeError(f"evolution: mutation={self.mutation}, crossover={self.crossover}; give probabilities from 0 to 1")

    def start(self, problem: Problem) -> State:
        """Return the state before the first policy; raises `BitwrightError` where Optuna is not installed."""
        _optuna()
        none = torch.zeros(0, len(problem.sites), dtype=torch.int64)
        return State(none, torch.zeros(0, self._count(problem), dtype=torch.float64), [], {})

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Tell Optuna what became of the last child, and propose the next."""
        if state.engine is None:
            state.engine = _Engine(problem, self, state)
        if told is not None:
            values = [told.loss, *_shares(problem, told.costs)][: self._count(problem)]
            state.engine.tell(told.policy, values, state.asked)
            state.index = torch.cat([state.index, torch.tensor([problem.index(told.policy)])])
            state.values = torch.cat([state.values, torch.tensor([values], dtype=torch.float64)])
            state.attributes.append(state.asked)
        seed = int(torch.randint(2**31, ()))
        genes, state.asked = state.engine.ask(seed)
        policy = self._policy(problem, state.engine, genes, np.random.default_rng(seed))
        state.repeats = state.repeats + 1 if policy in state.engine.judged else 0
        return state, Proposal(policy)

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether as many policies were proposed as were asked for, or no new one can be found."""
        proposed = len(state.attributes) + 1
        return proposed >= self.trials or state.repeats >= self.population or len(problem.pins) == len(problem.sites)

    def _count(self, problem: Problem) -> int:
        return 1 if self.objectives == "loss" else 1 + len(problem.budgets)

    def _policy(self, problem: Problem, engine: _Engine, genes: dict[str, int], generator: np.random.Generator) -> Policy:
        """Return a member of the first generation, or the child of some genes: within the budgets, and new where that is easy."""
        uniform = problem.uniform()
        if not engine.told and uniform is not None:
            return uniform
        if engine.told < self.population:
            return draw(problem, tilted(problem, NEAR), generator, NEAR)
        fill = self.objectives == "loss"
        policy = _within(problem, engine.steps, _decoded(problem, engine.space, genes), generator, fill=fill)
        for _ in range(CHANGES):
            if policy not in engine.judged:
                break
            name = list(engine.space)[generator.integers(len(engine.space))]
            genes = _encoded(engine.space, policy) | {name: int(generator.integers(len(engine.space[name])))}
            policy = _within(problem, engine.steps, _decoded(problem, engine.space, genes), generator, fill=fill)
        return policy


def _within(problem: Problem, steps: Notches, policy: Policy, generator: np.random.Generator, *, fill: bool) -> Policy:
    """Return a policy within the budgets: random notches go down until it fits, and then, to ``fill`` it, up while one fits."""
    index = list(problem.index(policy))
    limits = np.asarray(problem.limits, dtype=np.int64)
    down = True
    while True:
        totals = np.asarray(problem.totals(index), dtype=np.int64)
        over = totals > limits
        down = down and bool(over.any())
        here = (np.asarray(index)[steps.site] == steps.source) & (steps.down == down)
        open_ = np.flatnonzero(here)
        added = steps.added(problem, index, open_)
        open_ = open_[(added[over] < 0).any(0) if down else (totals[:, None] + added <= limits[:, None]).all(0)]
        if not down and (not fill or not len(open_)):
            return problem.policy(index)
        if not len(open_):
            return repair(problem.policy(index), problem)
        step = int(generator.choice(open_))
        index[int(steps.site[step])] = int(steps.target[step])


def _shares(problem: Problem, costs: Sequence[int]) -> list[float]:
    return [cost / max(1, budget.limit) for cost, budget in zip(costs, problem.budgets, strict=True)]


# ---- genes


def _space(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the genes and their widths; ``w0`` is of the weights and ``a0`` of the activations of the first site."""
    widths = {
        f"{'wa'[operand]}{i}": tuple(sorted({bits[operand] for bits in allowed}))
        for i, allowed in enumerate(problem.choices.values())
        for operand in (0, 1)
    }
    return {name: allowed for name, allowed in widths.items() if len(allowed) > 1}


def _encoded(space: dict[str, tuple[int, ...]], policy: Policy) -> dict[str, int]:
    bits = list(policy.values())
    return {name: widths.index(bits[int(name[1:])]["wa".index(name[0])]) for name, widths in space.items()}


def _decoded(problem: Problem, space: dict[str, tuple[int, ...]], genes: dict[str, int]) -> Policy:
    """Return the policy of some genes; where a target allows only some pairs of widths, each site takes the nearest."""
    policy = {}
    for i, (site, allowed) in enumerate(problem.choices.items()):
        wanted = [space[gene][genes[gene]] if (gene := f"{operand}{i}") in space else allowed[0][k] for k, operand in enumerate("wa")]
        policy[site] = min(allowed, key=lambda bits: _distance(bits, wanted))
    return Policy(policy)


def _distance(bits: Bits, wanted: Sequence[int]) -> tuple[float, Bits]:
    return sum(abs(float(np.log2(have / want))) for have, want in zip(bits, wanted, strict=True)), bits


# ---- Optuna


def _optuna() -> ModuleType:
    try:
        import optuna  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError:
        raise BitwrightError("method 'evolution' needs Optuna, which is not installed; pip install 'bitwright[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _Engine:
    """Optuna's study of a search; it can be made again from the state at any step."""

    def __init__(self, problem: Problem, method: Evolution, state: State):
        self.optuna, self.problem, self.method = _optuna(), problem, method
        self.space, self.steps = _space(problem), notches(problem)
        integers = self.optuna.distributions.IntDistribution
        self.distributions = {name: integers(0, len(widths) - 1) for name, widths in self.space.items()}
        self.told, self.judged = 0, set[Policy]()
        self.study = self.optuna.create_study(directions=["minimize"] * state.values.shape[1], sampler=self._sampler(0))
        for index, values, attributes in zip(state.index.tolist(), state.values.tolist(), state.attributes, strict=True):
            self.tell(problem.policy(index), values, attributes)

    def _sampler(self, seed: int) -> Any:
        chances = {"mutation_prob": self.method.mutation, "crossover_prob": self.method.crossover}
        return self.optuna.samplers.NSGAIISampler(seed=seed, population_size=self.method.population, **chances)

    def tell(self, policy: Policy, values: Sequence[float], attributes: dict[str, Any]) -> None:
        """Add a judged policy to the study, as of the generation that it was asked for."""
        trial = self.optuna.trial.create_trial(
            params=_encoded(self.space, policy), distributions=self.distributions, values=list(values), system_attrs=attributes
        )
        self.study.add_trial(trial)
        self.told += 1
        self.judged.add(policy)
        if self.told % self.method.population == 0:
            # Optuna orders the next parents otherwise when it chooses them than when it looks them up later. An asking of which nothing is
            # kept makes it choose them here, whether the study was made just now or long ago.
            self.ask(0)

    def ask(self, seed: int) -> tuple[dict[str, int], dict[str, Any]]:
        """Return a child's genes, and what Optuna noted of it."""
        self.study.sampler = self._sampler(seed)
        trial = self.study.ask(self.distributions)
        noted = self.study.get_trials(deepcopy=False)[trial.number].system_attrs
        # The child may be changed before it is judged: this one is given up, and what it becomes is added as a trial of its own.
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        return dict(trial.params), dict(noted)
