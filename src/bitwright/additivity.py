"""Is the loss additive here? What a table of sensitivities foretells of random policies, against what is measured.

Every allocation assumes that the losses of sites changed one at a time add up. Half of the policies are drawn close below the
budgets, where an allocation has to choose, and half uniformly over all choices.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from bitwright.correlation import Correlation, pairs_in_order, pearson, spearman
from bitwright.errors import BitwrightError
from bitwright.methods.random import draw, tilted
from bitwright.policy import Policy
from bitwright.problem import Problem
from bitwright.sensitivity import Sensitivity

FILE = "additivity.json"
"""Where `bitwright profile --check-additivity` leaves the result in a run directory."""
THRESHOLD = 0.8
"""A lower rank correlation is a warning: more than one in five pairs of policies is then ordered wrongly (`pairs_in_order`)."""
WITHIN = 0.05
"""Width of the band below the budgets that half of the policies are drawn from, as a share of the limit."""
LEAST = 8
POLICIES = 40
"""Policies that are drawn unless told otherwise, where the choices make so many."""
FRUITLESS = 100
"""Draws close below the budgets that bring nothing new, after which the rest are drawn over all choices."""
Drawn = Literal["budget", "choices"]


@dataclass(frozen=True)
class Point:
    """One policy: how it was drawn, the loss foretold and the loss measured."""

    drawn: Drawn
    predicted: float
    measured: float


@dataclass(frozen=True)
class Additivity:
    """What the check found.

    Attributes:
        measure: of the table.
        points: the policies.
        spearman: rank correlation over all of them.
        pearson: linear correlation over all of them.
        near_budget: rank correlation over those close below the budgets; None where too few different ones lie there.
    """

    measure: str
    points: tuple[Point, ...]
    spearman: Correlation
    pearson: Correlation
    near_budget: Correlation | None

    @property
    def warning(self) -> str | None:
        """What to say if the rank correlation is below `THRESHOLD`, or surely so (its whole interval) close to the budgets."""
        low = [(self.spearman, "random policies")] if self.spearman.value < THRESHOLD else []
        near = self.near_budget
        low += [(near, "policies close to the budget")] if near is not None and near.high < THRESHOLD else []
        if not low:
            return None
        found, which = low[0]
        return (
            f"The loss is not additive here: over {found.n} {which} the rank correlation of the loss foretold by '{self.measure}' with "
            f"the loss measured is {found}, below {THRESHOLD}; about {1 - pairs_in_order(found.value):.0%} of their pairs are ordered "
            "wrongly, so do not rely on an allocation by it: take another measure, or a method that evaluates whole policies."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able data: the content of additivity.json."""
        return {**asdict(self), "threshold": THRESHOLD, "warning": self.warning}


def check_additivity(problem: Problem, table: Sensitivity, policies: int | None = None) -> Additivity:
    """Compare the loss that a table foretells of random policies with the loss of those policies (`Problem.loss`).

    Args:
        problem: sites, choices, budgets and data.
        table: its sensitivities.
        policies: how many to draw; each is evaluated once. By default `POLICIES`, or all where the choices make fewer.

    Raises:
        BitwrightError: too few policies, or the problem does not have so many.
        RunError: the table is stale.
    """
    if policies is not None and policies < LEAST:
        raise BitwrightError(f"additivity: {policies} policies tell nothing; draw at least {LEAST}")
    if not problem.budgets:
        raise BitwrightError("additivity: half of the policies are drawn close to the budgets, and there are none; give one")
    count = _count(problem, policies)
    table.check(problem)
    table.scores(problem)  # raises where a choice has no value
    points = tuple(Point(drawn, table.predict(policy), problem.loss(policy)) for drawn, policy in _drawn(problem, count))
    x, y = [point.predicted for point in points], [point.measured for point in points]
    near = [point for point in points if point.drawn == "budget"]
    close = None
    if len(near) >= LEAST // 2:
        close = spearman([point.predicted for point in near], [point.measured for point in near], problem.seed)
    return Additivity(table.measure, points, spearman(x, y, problem.seed), pearson(x, y, problem.seed), close)


def _count(problem: Problem, asked: int | None) -> int:
    """Return how many policies to draw: as many as were asked for, or what there are up to `POLICIES`."""
    most = math.prod(len(allowed) for allowed in problem.choices.values())
    if most < (LEAST if asked is None else asked):
        way = "give more choices" if most < LEAST else f"ask for {most} or fewer, or give more choices"
        raise BitwrightError(f"additivity: asked for {asked or POLICIES} policies, and the choices make only {most} different ones; {way}")
    return min(POLICIES, most) if asked is None else asked


def _drawn(problem: Problem, count: int) -> list[tuple[Drawn, Policy]]:
    """Draw different policies, half of them close below the budgets, or fewer where there are not so many."""
    generator = np.random.default_rng([problem.seed, count])
    probabilities = tilted(problem, WITHIN)
    found: dict[Policy, Drawn] = {}
    fruitless = 0
    while len(found) < count:
        drawn: Drawn = "budget" if len(found) < count // 2 and fruitless < FRUITLESS else "choices"
        uniform = [int(generator.integers(len(allowed))) for allowed in problem.choices.values()]
        policy = draw(problem, probabilities, generator, WITHIN) if drawn == "budget" else problem.policy(uniform)
        fruitless += drawn == "budget" and policy in found
        found.setdefault(policy, drawn)
    return [(drawn, policy) for policy, drawn in found.items()]
