"""Exact allocation: the cheapest total loss under integer budgets, by HiGHS, and what follows from it.

Every function here sees plain numbers: ``values[site][choice]`` is what one choice adds to the loss,
``terms[row][site][choice]`` is the integer it adds to a cost, ``limits[row]`` is what the costs may sum to. A budget has one row,
or several that all stay within its limit where the cost is a peak (`bitwright.problem.Problem.rows`). ``borders[row]`` is what a row
costs besides where two sites differ in class, as a change of number format between them does (`Border`).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import BudgetError

if TYPE_CHECKING:
    from bitwright.policy import Bits, Policy
    from bitwright.problem import Problem

Values = Sequence[Sequence[float] | NDArray[Any]]
Column = Sequence[int] | NDArray[Any]
Terms = Sequence[Sequence[Column]]
Kept = list[list[int]]
Borders = Sequence[Sequence["Border"]]

SPREAD = 1e5
"""The largest objective coefficient given to HiGHS: its absolute gap of 1e-6 is then 1e-11 of the largest difference."""
TERM_BITS = 20
"""Larger integer terms are scaled down (by a power of two) to this many bits: its row tolerance is then far below one unit in 1e6."""
CUTS = 32
"""How many solutions that only rounding let through are cut off one by one before the limit itself is tightened."""

_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Border:
    """What a row costs where two sites differ in class.

    Attributes:
        sites: places of the two.
        classes: of each of the two, the class of every choice, as a number.
        price: what it costs if the classes of their choices differ.

    >>> Border((0, 1), (np.array([0, 1]), np.array([0, 1])), 300).cost([0, 1])
    300
    """

    sites: tuple[int, int]
    classes: tuple[NDArray[np.int64], NDArray[np.int64]]
    price: int

    def cost(self, chosen: Sequence[int]) -> int:
        """Return the cost of one choice per site."""
        return int(self.costs(chosen))

    def costs(self, columns: Sequence[int] | Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return the cost of several choices per site, an array of them for each."""
        left, right = (classes[columns[i]] for i, classes in zip(self.sites, self.classes, strict=True))
        return np.asarray((left != right) * self.price)


@dataclass(frozen=True)
class _Row:
    """One budget as HiGHS sees it: terms above each site's cheapest, and borders, divided by their common divisor."""

    terms: list[list[int]]
    limit: int
    borders: list[Border]


def allocate(values: Values, terms: Terms, limits: Sequence[int], borders: Borders = ()) -> tuple[int, ...]:
    """Choose one choice per site so that the summed value is least and no summed term exceeds its limit.

    The multiple-choice knapsack problem (Sinha and Zoltners, 1979) as an integer program with one binary per
    (site, choice), solved to a zero gap. A border is a variable between 0 and 1 that is no less than the difference of what its two
    sites have of any class. The limits are then checked with Python integers: a solution that only floating-point tolerance let
    through is cut off and the program solved again.

    Args:
        values: per site, the loss of each choice (any scale; ``inf`` forbids a choice).
        terms: per budget and site, the integer cost of each choice.
        limits: per budget, the largest total allowed.
        borders: per budget, what pairs of sites add to it; none at all by default.

    Returns:
        The index of the chosen choice for every site.

    Raises:
        BudgetError: no choice of choices stays within the limits; or a value is not a number.

    >>> allocate([[4.0, 1.0], [0.5, 0.1]], [[[1, 2], [1, 2]]], [3])
    (1, 0)
    """
    columns = [np.asarray(column, dtype=np.float64) for column in values]
    _check_values(columns)
    borders = borders or [()] * len(terms)
    kept = _undominated(columns, terms, borders)
    rows = _rows(kept, terms, limits, borders)
    while True:
        chosen = _solve(columns, kept, rows)
        if chosen is None:
            raise BudgetError(_unreachable_text(terms, limits))
        narrowed = _narrow(columns, kept, chosen)
        picked = tuple(kept[i][j] for i, j in enumerate(chosen))
        # A forbiddingly large value hides small differences from the solver: drop what cannot be in an optimum, look again.
        if _spread(columns, narrowed) * 100 >= _spread(columns, kept):
            return picked
        kept = narrowed
        rows = _rows(kept, terms, limits, borders)


def total(terms: Sequence[Column], chosen: Sequence[int], borders: Sequence[Border] = ()) -> int:
    """Return the summed term of one choice per site, with the borders between them, as an exact integer.

    >>> total([[1, 2], [10, 20]], (1, 0))
    12
    """
    return sum(int(site[j]) for site, j in zip(terms, chosen, strict=True)) + sum(border.cost(chosen) for border in borders)


def within(terms: Terms, limits: Sequence[int], chosen: Sequence[int]) -> bool:
    """Say whether the chosen choices keep every limit, in exact integers.

    >>> within([[[1, 2], [10, 20]]], [11], (1, 0))
    False
    """
    return all(total(site_terms, chosen) <= limit for site_terms, limit in zip(terms, limits, strict=True))


def ranges(terms: Terms) -> tuple[tuple[int, int], ...]:
    """Return the least and the largest total of every budget, each taken alone.

    >>> ranges([[[1, 2], [10, 20]]])
    ((11, 22),)
    """
    return tuple((sum(int(min(t)) for t in site_terms), sum(int(max(t)) for t in site_terms)) for site_terms in terms)


def nearest_limits(terms: Terms, limits: Sequence[int]) -> tuple[int | None, ...]:
    """Return, per budget, the least limit that can be met while the other limits stay as they are (None: no such limit).

    >>> nearest_limits([[[1, 2], [1, 2]], [[5, 3], [5, 3]]], [2, 8])
    (3, 10)
    """
    found: list[int | None] = []
    for k, site_terms in enumerate(terms):
        others = [i for i in range(len(terms)) if i != k]
        chosen = _try_allocate(site_terms, [terms[i] for i in others], [limits[i] for i in others])
        found.append(None if chosen is None else total(site_terms, chosen))
    return tuple(found)


def reachable(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Return the least and the largest cost of any policy of ``problem``, per budget and in the cost's own unit.

    Of a peak, the largest of several rows, it is exact where each site has one choice that is least in all of them, as narrow
    activations are for memory; else the least is a bound. So are both where a budget has borders: it has none, and all of them.
    """
    both = ranges(problem.terms)
    every = [sum(border.price for border in borders) for borders in problem.borders]
    lows = problem.by_budget(low for low, _ in both)
    highs = problem.by_budget(high + more for (_, high), more in zip(both, every, strict=True))
    return tuple((int(low), int(high)) for low, high in zip(lows, highs, strict=True))


def nearest_limit(problem: Problem, k: int) -> int | None:
    """Return the least limit of budget ``k`` that can be met while the others stay as they are (None: no such limit)."""
    own = [r for r, row in enumerate(problem.rows) if row.budget == k]
    if len(own) == 1 and not any(problem.borders):
        found = nearest_limits(problem.terms, problem.limits)[own[0]]
        return None if found is None else found + problem.rows[own[0]].cost.fixed
    values = [np.zeros(len(allowed)) for allowed in problem.choices.values()]

    def met(limit: int) -> bool:
        limits = [limit - row.cost.fixed if row.budget == k else problem.limits[r] for r, row in enumerate(problem.rows)]
        return _try_allocate(values, problem.terms, limits, problem.borders) is not None

    low, high = reachable(problem)[k]
    if not met(high):
        return None
    while low < high:  # the least limit is in low … high
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return high


def repair(policy: Policy, problem: Problem) -> Policy:
    """Return the feasible policy nearest to ``policy``: the policy itself when it fits.

    The distance between two choices is |log2 of the ratio of their weight widths| + the same for activations, so a step
    from 8 to 4 weighs as much as one from 2 to 1. Among equally near policies the one that uses more of its budgets wins.

    Raises:
        PolicyError: the policy names unknown sites or choices.
        BudgetError: no policy of the problem is feasible.
    """
    if problem.feasible(policy):
        return policy
    values = [_distances(policy[site], problem.choices[site]) for site in problem.choices]
    for site_terms, limit in zip(problem.terms, problem.limits, strict=True):
        for i, column in enumerate(site_terms):
            # A tie-break only: even the whole budget counts for less than the smallest distance (log2 8/7 = 0.19).
            values[i] = values[i] - 1e-4 * np.asarray(column, dtype=np.float64) / max(1, abs(limit)) / len(problem.terms)
    return problem.policy(allocate(values, problem.terms, problem.limits, problem.borders))


def shadow_prices(values: Values, terms: Terms, limits: Sequence[int]) -> tuple[float, ...]:
    """Return, per budget, how much the least loss would fall for one more unit of its limit (of the linear relaxation).

    Raises:
        BudgetError: the limits cannot be met even by fractions of choices.

    >>> shadow_prices([[4.0, 1.0], [0.5, 0.1]], [[[1, 2], [1, 2]]], [2])
    (3.0,)
    """
    from scipy.optimize import linprog  # noqa: PLC0415  (scipy is slow to import)

    columns = [np.asarray(column, dtype=np.float64) for column in values]
    _check_values(columns)
    kept = [[j for j, value in enumerate(column) if math.isfinite(value)] for column in columns]
    rows = _rows(kept, terms, limits, [()] * len(terms))
    matrix, bounds, units = _matrix(rows, kept), [], []
    for row, site_terms in zip(rows, terms, strict=True):
        scale = _scale(row)
        bounds.append(row.limit * scale)
        units.append(scale / _divisor(kept, site_terms, ()))
    equal, _ = _one_per_site(kept)
    with _silence():
        answer = linprog(_objective(columns, kept, 1.0), A_ub=matrix, b_ub=bounds, A_eq=equal, b_eq=np.ones(len(kept)), method="highs")
    if answer.status != 0:
        raise BudgetError(_unreachable_text(terms, limits))
    return tuple(abs(float(price)) * unit for price, unit in zip(answer.ineqlin.marginals, units, strict=True))


# ---- what the solver is given


def _check_values(columns: Sequence[NDArray[np.float64]]) -> None:
    for i, column in enumerate(columns):
        if np.isnan(column).any() or np.isneginf(column).any():
            raise BudgetError(f"allocate: site {i} has a value that is not a number ({column.tolist()}); give finite losses, inf to forbid")
        if not np.isfinite(column).any():
            raise BudgetError(f"allocate: site {i} has no choice with a finite value; allow at least one")


def _undominated(columns: Sequence[NDArray[np.float64]], terms: Terms, borders: Borders) -> Kept:
    """Drop forbidden choices and those that another choice of the site beats in value and in every cost (first index wins a tie).

    Where a site has borders only a choice of the same class beats another one.
    """
    classes: list[list[NDArray[np.int64]]] = [[] for _ in columns]
    for border in itertools.chain(*borders):
        for i, own in zip(border.sites, border.classes, strict=True):
            classes[i].append(own)
    costs = ([np.asarray(site_terms[i]) for site_terms in terms] for i in range(len(columns)))
    return [_undominated_choices(*given) for given in zip(columns, costs, classes, strict=True)]


def _undominated_choices(column: NDArray[np.float64], costs: Sequence[NDArray[Any]], classes: Sequence[NDArray[np.int64]]) -> list[int]:
    candidates = np.flatnonzero(np.isfinite(column))
    axes, alike = ([axis[candidates] for axis in group] for group in ((column, *costs), classes))
    compared = [*(axis[:, None] <= axis[None, :] for axis in axes), *(axis[:, None] == axis[None, :] for axis in alike)]
    no_worse = np.logical_and.reduce(compared).astype(bool)
    # One of two equal choices goes: the later.
    beats = no_worse & (~no_worse.T | np.triu(np.ones_like(no_worse), 1))
    return [int(j) for j in candidates[~beats.any(0)]]


def _divisor(kept: Kept, site_terms: Sequence[Column], borders: Sequence[Border]) -> int:
    lows = [min(int(site[j]) for j in keep) for site, keep in zip(site_terms, kept, strict=True)]
    extra = [int(site[j]) - low for site, keep, low in zip(site_terms, kept, lows, strict=True) for j in keep]
    return math.gcd(*extra, *(border.price for border in borders)) or 1


def _rows(kept: Kept, terms: Terms, limits: Sequence[int], borders: Borders) -> list[_Row]:
    return [_row(kept, site_terms, int(limit), own) for site_terms, limit, own in zip(terms, limits, borders, strict=True)]


def _row(kept: Kept, site_terms: Sequence[Column], limit: int, borders: Sequence[Border]) -> _Row:
    """Reduce a budget exactly: subtract what every choice costs anyway, divide by the common divisor, round the limit down."""
    lows = [min(int(site[j]) for j in keep) for site, keep in zip(site_terms, kept, strict=True)]
    divisor = _divisor(kept, site_terms, borders)
    reduced = [[(int(site[j]) - low) // divisor for j in keep] for site, keep, low in zip(site_terms, kept, lows, strict=True)]
    left = [
        Border(b.sites, (b.classes[0][kept[b.sites[0]]], b.classes[1][kept[b.sites[1]]]), b.price // divisor) for b in borders if b.price
    ]
    return _Row(reduced, (limit - sum(lows)) // divisor, left)


def _scale(row: _Row) -> float:
    largest = max((*(max(site) for site in row.terms), *(border.price for border in row.borders)), default=0)
    return 2.0 ** -max(0, largest.bit_length() - TERM_BITS)


def _matrix(rows: Sequence[_Row], kept: Kept) -> NDArray[np.float64]:
    width = sum(map(len, kept))
    flat = [_scale(row) * np.asarray([term for site in row.terms for term in site], dtype=np.float64) for row in rows]
    return np.asarray(flat).reshape(len(rows), width)


def _one_per_site(kept: Kept) -> tuple[Any, NDArray[np.int64]]:
    from scipy.sparse import csr_matrix  # noqa: PLC0415

    owner = np.repeat(np.arange(len(kept)), [len(keep) for keep in kept])
    return csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(kept), len(owner))), owner


def _spread(columns: Sequence[NDArray[np.float64]], kept: Kept) -> float:
    return max((float(np.ptp(column[keep])) for column, keep in zip(columns, kept, strict=True)), default=0.0)


def _objective(columns: Sequence[NDArray[np.float64]], kept: Kept, scale: float) -> NDArray[np.float64]:
    return np.concatenate([(column[keep] - column[keep].min()) * scale for column, keep in zip(columns, kept, strict=True)])


def _narrow(columns: Sequence[NDArray[np.float64]], kept: Kept, chosen: Sequence[int]) -> Kept:
    """Keep the choices that could be in a policy at least as good as ``chosen``."""
    best = [column[keep].min() for column, keep in zip(columns, kept, strict=True)]
    excess = math.fsum(column[keep[j]] - low for column, keep, low, j in zip(columns, kept, best, chosen, strict=True))
    return [[j for j in keep if column[j] - low <= excess * (1 + 1e-9)] for column, keep, low in zip(columns, kept, best, strict=True)]


# ---- the solver


def _solve(columns: Sequence[NDArray[np.float64]], kept: Kept, rows: Sequence[_Row]) -> tuple[int, ...] | None:
    """Return positions into ``kept``, or None when the limits cannot be met."""
    cheapest = tuple(int(np.argmin(column[keep])) for column, keep in zip(columns, kept, strict=True))
    if _excesses(rows, cheapest) == [0] * len(rows):
        return cheapest
    if any(row.limit < 0 for row in rows):
        return None
    rows, cuts = list(rows), list[tuple[int, ...]]()
    for _ in range(10 * CUTS):
        chosen = _milp(columns, kept, rows, cuts)
        if chosen is None:
            return None
        excesses = _excesses(rows, chosen)
        if not any(excesses):
            return chosen
        if len(cuts) < CUTS:
            cuts.append(chosen)
        else:
            rows = [replace(row, limit=row.limit - excess) for row, excess in zip(rows, excesses, strict=True)]
    raise RuntimeError("allocation: HiGHS keeps returning policies over their limit")


def _excesses(rows: Sequence[_Row], chosen: Sequence[int]) -> list[int]:
    return [max(0, total(row.terms, chosen, row.borders) - row.limit) for row in rows]


def _milp(
    columns: Sequence[NDArray[np.float64]], kept: Kept, rows: Sequence[_Row], cuts: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import csr_matrix, hstack  # noqa: PLC0415

    equal, owner = _one_per_site(kept)
    starts = np.searchsorted(owner, np.arange(len(kept)))
    prices, differences = _border_variables(rows, starts, len(owner))
    extra = prices.shape[1]
    limits = [row.limit * _scale(row) for row in rows]
    constraints = [
        LinearConstraint(hstack([equal, csr_matrix((len(kept), extra))]), 1, 1),
        LinearConstraint(np.hstack([_matrix(rows, kept), prices]), -np.inf, limits),
    ]
    if len(differences):
        constraints.append(LinearConstraint(differences, -np.inf, 0))
    for cut in cuts:
        picked = np.zeros(len(owner) + extra)
        picked[starts + np.asarray(cut)] = 1
        constraints.append(LinearConstraint(picked[None], -np.inf, len(kept) - 1))
    objective = np.append(_objective(columns, kept, SPREAD / (_spread(columns, kept) or 1.0)), np.zeros(extra))
    integral = np.append(np.ones(len(owner)), np.zeros(extra))
    with _silence():
        answer = milp(objective, constraints=constraints, integrality=integral, bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
    if answer.status == 2:
        return None
    if answer.x is None:
        raise RuntimeError(f"allocation: HiGHS gave up: {answer.message}")
    return tuple(int(np.argmax(part)) for part in np.split(answer.x[: len(owner)], starts[1:]))


def _border_variables(rows: Sequence[_Row], starts: NDArray[np.int64], width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the variable of each border adds to each row, and x_left(class) - x_right(class) - border, which is at most 0."""
    borders = [(r, border) for r, row in enumerate(rows) for border in row.borders]
    prices = np.zeros((len(rows), len(borders)))
    differences = []
    for k, (r, border) in enumerate(borders):
        prices[r, k] = border.price * _scale(rows[r])
        for kind in np.union1d(*border.classes):
            line = np.zeros(width + len(borders))
            for sign, i, classes in zip((1, -1), border.sites, border.classes, strict=True):
                line[starts[i] + np.flatnonzero(classes == kind)] = sign
            line[width + k] = -1
            differences.append(line)
    return prices, np.asarray(differences)


@contextmanager
def _silence() -> Iterator[None]:
    """Send the process's standard output to nowhere: HiGHS prints from C, below `sys.stdout`."""
    with _stdout_lock:
        try:
            saved = os.dup(1)
        except OSError:  # standard output is closed: there is nothing to silence
            yield
            return
        _flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(nowhere)
            os.close(saved)


def _flush() -> None:
    """Empty Python's and C's output buffers, so that what was written before or while silent goes where it belongs."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        ctypes.CDLL(None).fflush(None)
    except (AttributeError, OSError, TypeError):  # no C library by that name (Windows): nothing more can be done
        return


# ---- what the messages and repair need


def _distances(here: Bits, there: Sequence[Bits]) -> NDArray[np.float64]:
    return np.asarray([abs(math.log2(bits.w / here.w)) + abs(math.log2(bits.a / here.a)) for bits in there])


def _try_allocate(values: Values, terms: Terms, limits: Sequence[int], borders: Borders = ()) -> tuple[int, ...] | None:
    """Minimise integer ``values`` under the limits; None when the limits cannot be met."""
    kept = [list(range(len(column))) for column in values]
    columns = [np.asarray(column, dtype=np.float64) for column in values]
    chosen = _solve(columns, kept, _rows(kept, terms, limits, borders or [()] * len(terms)))
    return None if chosen is None else tuple(kept[i][j] for i, j in enumerate(chosen))


def _unreachable_text(terms: Terms, limits: Sequence[int]) -> str:
    parts = [f"limit {limit}, reachable {low} to {high}" for limit, (low, high) in zip(limits, ranges(terms), strict=True)]
    return "allocate: no choice of bits keeps every limit (" + "; ".join(parts) + "); raise a limit"
