"""Notches: the steps between a site's adjacent choices, for searches that move one site one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.policy import Bits
from bitwright.problem import Problem

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Notches:
    """Every step of a problem, down and up, in flat arrays of one entry a step.

    A step goes from one choice of a site to the next narrower, or the next wider. Choices are compared by both widths: on a full
    grid a step changes either the weight or the activation width; where a target allows only some pairs, it may change both.
    Choices that save nothing are passed over: a narrower choice is left out where a wider one costs no more in any budget.

    Attributes:
        site: position of the site among the problem's.
        source: position of the choice that the step leaves, among the site's.
        target: position of the choice that it reaches.
        cost: what it adds to each budget, ``[budget, step]``, borders left out (`added`).
        down: whether it narrows.
        kind: which widths it changes: 0 weights, 1 activations, 2 both; 3 more when it widens.
        widest: per site, the position of its widest useful choice (by the product of the widths).
    """

    site: Ints
    source: Ints
    target: Ints
    cost: Ints
    down: Bools
    kind: Ints
    widest: tuple[int, ...]

    def added(self, problem: Problem, index: Sequence[int], steps: Ints) -> Ints:
        """Return what some steps add to each budget, ``[budget, step]``, at the policy where they are taken: with its borders."""
        if not any(problem.borders):
            return self.cost[:, steps]
        here = np.asarray(problem.totals(index), dtype=np.int64)
        reached = np.empty((len(here), len(steps)), dtype=np.int64)
        for k, step in enumerate(steps):
            after = list(index)
            after[int(self.site[step])] = int(self.target[step])
            reached[:, k] = problem.totals(after)
        return reached - here[:, None]


def notches(problem: Problem) -> Notches:
    """Return every step between adjacent choices of a problem.

    >>> from bitwright.testing import table_problem
    >>> steps = notches(table_problem([[3.0, 2.0, 1.0]], [[[10, 20, 20]]], [20]))
    >>> [(int(a), int(b)) for a, b in zip(steps.source, steps.target)]  # the second choice costs as much as the third
    [(2, 0), (0, 2)]
    """
    rows: list[tuple[int, int, int, int]] = []
    widest = []
    for i, allowed in enumerate(problem.choices.values()):
        widths = np.asarray(allowed, dtype=np.int64)
        kept = _useful(widths, np.asarray([site_terms[i] for site_terms in problem.terms]).reshape(-1, len(allowed)))
        widest.append(int(kept[np.argmax(widths[kept].prod(1))]))
        for low, high in _adjacent(widths[kept]):
            kind = _kind(allowed[kept[low]], allowed[kept[high]])
            rows += [(i, int(kept[high]), int(kept[low]), kind), (i, int(kept[low]), int(kept[high]), kind + 3)]
    site, source, target, kinds = np.asarray(rows, dtype=np.int64).reshape(-1, 4).T
    cost = [[site_terms[i][t] - site_terms[i][s] for i, s, t, _ in rows] for site_terms in problem.terms]
    added = np.asarray(cost, dtype=np.int64).reshape(len(problem.terms), len(rows))
    return Notches(site, source, target, added, kinds < 3, kinds, tuple(widest))


def _useful(widths: Ints, costs: Ints) -> Ints:
    """Return the positions of the choices for which no wider one costs as little in every budget."""
    cheaper = (costs[:, None, :] <= costs[:, :, None]).all(0)
    return np.flatnonzero(~(_under(widths) & cheaper).any(1))


def _under(widths: Ints) -> Bools:
    """Return ``[i, j]``: choice i is no wider than choice j in either width, and narrower in one."""
    no_wider = (widths[:, None] <= widths[None, :]).all(2)
    return np.asarray(no_wider & ~no_wider.T)


def _adjacent(widths: Ints) -> Sequence[tuple[int, int]]:
    """Return the pairs (narrower, wider) with nothing between."""
    under = _under(widths).astype(np.int64)
    return [(int(low), int(high)) for low, high in np.argwhere((under == 1) & (under @ under == 0))]


def _kind(low: Bits, high: Bits) -> int:
    return 0 if low.a == high.a else 1 if low.w == high.w else 2
