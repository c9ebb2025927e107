"""Exact allocation: known answers, limits moved by one unit, brute force, size and silence."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import allocation
from bitwright.errors import BudgetError

TABLE = [[9.0, 4.0, 1.0], [3.0, 1.0, 0.0]]
COST = [[1, 2, 4], [1, 2, 4]]


def brute(values, terms, limits):
    best = None
    for chosen in itertools.product(*(range(len(v)) for v in values)):
        if allocation.within(terms, limits, chosen):
            value = math.fsum(v[j] for v, j in zip(values, chosen, strict=True))
            best = value if best is None else min(best, value)
    return best


@st.composite
def problems(draw):
    sites = draw(st.integers(1, 4))
    sizes = [draw(st.integers(1, 4)) for _ in range(sites)]
    value = st.floats(0, 1e6, allow_nan=False, width=32)
    largest = draw(st.sampled_from([5, 1000, 10**11]))
    values = [[draw(value) for _ in range(m)] for m in sizes]
    terms = [[[draw(st.integers(0, largest)) for _ in range(m)] for m in sizes] for _ in range(draw(st.integers(1, 3)))]
    limits = [draw(st.integers(low, high)) for low, high in allocation.ranges(terms)]
    return values, terms, limits


@settings(max_examples=120, deadline=None)
@given(problems())
def test_never_beaten_by_brute_force_and_always_feasible(problem):
    values, terms, limits = problem
    best = brute(values, terms, limits)
    if best is None:
        with pytest.raises(BudgetError, match="no choice of bits keeps every limit"):
            allocation.allocate(values, terms, limits)
        return
    chosen = allocation.allocate(values, terms, limits)
    assert allocation.within(terms, limits, chosen)
    assert math.fsum(v[j] for v, j in zip(values, chosen, strict=True)) <= best + 1e-9 * (1 + max(map(max, values)))


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_borders_are_counted_exactly(problem, data):
    values, terms, limits = problem
    kinds = [np.asarray([data.draw(st.integers(0, 2)) for _ in column]) for column in values]
    prices = [[data.draw(st.integers(0, 1000)) for _ in values[1:]] for _ in terms]
    borders = [[allocation.Border((i, i + 1), (kinds[i], kinds[i + 1]), price) for i, price in enumerate(own)] for own in prices]
    every = itertools.product(*(range(len(column)) for column in values))

    def kept(chosen):
        totals = (allocation.total(own, chosen, between) for own, between in zip(terms, borders, strict=True))
        return all(total <= limit for total, limit in zip(totals, limits, strict=True))

    losses = [math.fsum(v[j] for v, j in zip(values, chosen, strict=True)) for chosen in every if kept(chosen)]
    if not losses:
        with pytest.raises(BudgetError, match="no choice of bits keeps every limit"):
            allocation.allocate(values, terms, limits, borders)
        return
    chosen = allocation.allocate(values, terms, limits, borders)
    assert kept(chosen)
    assert math.fsum(v[j] for v, j in zip(values, chosen, strict=True)) <= min(losses) + 1e-9 * (1 + max(map(max, values)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_nearest_limits_are_met_and_one_unit_less_is_not(problem):
    _, terms, limits = problem
    for k, nearest in enumerate(allocation.nearest_limits(terms, limits)):
        others = list(limits)
        if nearest is None:
            others[k] = allocation.ranges(terms)[k][1]
            assert brute([[0.0] * len(t) for t in terms[0]], terms, others) is None
            continue
        zero = [[0.0] * len(t) for t in terms[0]]
        others[k] = nearest
        assert brute(zero, terms, others) is not None
        others[k] = nearest - 1
        assert brute(zero, terms, others) is None


@pytest.mark.parametrize(
    ("limit", "expected"), [(2, (0, 0)), (3, (1, 0)), (4, (1, 1)), (5, (2, 0)), (6, (2, 1)), (7, (2, 1)), (8, (2, 2)), (99, (2, 2))]
)
def test_known_answers_across_each_boundary(limit, expected):
    assert allocation.allocate(TABLE, [COST], [limit]) == expected


def test_a_limit_below_the_reachable_range_names_it():
    with pytest.raises(BudgetError, match=r"limit 1, reachable 2 to 8\); raise a limit"):
        allocation.allocate(TABLE, [COST], [1])


def test_jointly_unreachable_limits_name_both_ranges():
    terms = [[[1, 2]], [[2, 1]]]
    with pytest.raises(BudgetError, match="limit 1, reachable 1 to 2; limit 1, reachable 1 to 2"):
        allocation.allocate([[0.0, 0.0]], terms, [1, 1])
    assert allocation.nearest_limits(terms, [1, 1]) == (2, 2)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_values_that_are_no_numbers_are_refused(bad):
    with pytest.raises(BudgetError, match="site 1 has a value that is not a number"):
        allocation.allocate([[0.0, 1.0], [bad, 1.0]], [[[1, 2], [1, 2]]], [4])


def test_infinite_values_forbid_a_choice():
    assert allocation.allocate([[math.inf, 1.0, math.inf]], [[[1, 2, 3]]], [3]) == (1,)
    with pytest.raises(BudgetError, match="site 0 has no choice with a finite value"):
        allocation.allocate([[math.inf]], [[[1]]], [3])


def test_a_huge_value_does_not_hide_small_differences():
    values = [[1e30, 2e-6, 1e-6], [1e30, 3e-6, 0.5e-6], [1e30, 0.0, 0.0]]
    terms = [[[0, 1, 2], [0, 1, 2], [0, 1, 2]]]
    assert allocation.allocate(values, terms, [4]) == (1, 2, 1)


def test_rounding_lets_nothing_over_a_limit_of_large_coprime_integers():
    rng = np.random.default_rng(3)
    base = 10**15 + 7
    terms = [[[0, base + int(rng.integers(0, 5))] for _ in range(8)]]
    values = [[1.0, 0.0] for _ in range(8)]
    smallest = sorted(t[1] for t in terms[0])
    for excess, count in ((0, 4), (-1, 3)):
        chosen = allocation.allocate(values, terms, [sum(smallest[:4]) + excess])
        assert sum(chosen) == count
        assert allocation.within(terms, [sum(smallest[:4]) + excess], chosen)


def test_no_sites_and_no_budgets():
    assert allocation.allocate([], [[]], [0]) == ()
    assert allocation.allocate([[2.0, 1.0]], [], []) == (1,)


def realistic(sites, seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 60, sites) * rng.integers(100, 40000, sites)
    macs = rng.integers(1, 1000, sites) * rng.integers(1000, 300000, sites)
    widths = np.asarray(list(itertools.product((2, 3, 4, 6, 8), repeat=2)))
    sensitivity = np.exp(rng.normal(0, 2, (sites, 2, 1)))
    values = (sensitivity * 4.0**-widths.T * np.exp(rng.normal(0, 0.2, (sites, 2, len(widths))))).sum(1)
    terms = [weights[:, None] * widths[:, 0], macs[:, None] * widths.prod(1)]
    limits = [int(0.7 * t.min(1).sum() + 0.3 * t.max(1).sum()) for t in terms]
    return values, terms, limits


def test_500_sites_25_choices_2_budgets_in_seconds():
    values, terms, limits = realistic(500, 0)
    start = time.process_time()
    chosen = allocation.allocate(values, terms, limits)
    assert time.process_time() - start < 20  # about 3 on a quiet core; processor time, for busy machines
    assert allocation.within(terms, limits, chosen)
    prices = allocation.shadow_prices(values, terms, limits)
    priced = values + sum(p * t for p, t in zip(prices, terms, strict=True))
    bound = priced.min(1).sum() - sum(p * x for p, x in zip(prices, limits, strict=True))
    reached = values[np.arange(500), list(chosen)].sum()
    assert bound <= reached <= bound * 1.01  # Lagrangian duality: nothing can be below the bound


def test_the_same_question_has_the_same_answer():
    question = realistic(60, 5)
    assert allocation.allocate(*question) == allocation.allocate(*question)


def test_shadow_price_is_the_slope_of_the_least_loss():
    values, terms, limits = realistic(100, 1)
    prices = allocation.shadow_prices(values, terms, limits)
    step = limits[0] // 50
    tight, loose = (allocation.allocate(values, terms, [limits[0] + x, limits[1]]) for x in (-step, step))
    fall = values[np.arange(100), list(tight)].sum() - values[np.arange(100), list(loose)].sum()
    assert prices[0] == pytest.approx(fall / (2 * step), rel=0.1)
    with pytest.raises(BudgetError, match="no choice of bits"):
        allocation.shadow_prices(values, terms, [0, 0])


PRINTS = """
import numpy as np, sys
from bitwright import allocation
from tests.test_allocation import realistic
print("before")
allocation.allocate(*realistic(80, 5))
print("after")
"""


def test_the_solver_prints_nothing():
    root = str(Path(__file__).parents[1])
    # This instance makes HiGHS print from C, through a buffer that outlives the call when standard output is a pipe.
    answer = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout == "before\nafter\n"


def test_a_closed_standard_output_is_no_obstacle():
    ask = "assert allocate([[2, 1], [3, 0]], [[[1, 2], [1, 2]]], [3]) == (0, 1)"
    code = f"import os; os.close(1)\nfrom bitwright.allocation import allocate\n{ask}"
    subprocess.run([sys.executable, "-c", code], check=True)
