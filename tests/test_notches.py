"""Notches: what is next to what, and what is passed over."""

from __future__ import annotations

import torch
from torch import nn

from bitwright.costs import BitOps, Budget
from bitwright.notches import notches
from bitwright.problem import Problem
from bitwright.sites import trace
from bitwright.testing import table_problem


def _steps(problem: Problem) -> set[tuple[str, str, int]]:
    """Return every step as the names of its two choices and its kind."""
    steps, choices = notches(problem), list(problem.choices.values())
    rows = zip(steps.site, steps.source, steps.target, steps.kind, strict=True)
    return {(repr(choices[i][s]), repr(choices[i][t]), int(kind)) for i, s, t, kind in rows}


def _problem(*pairs: tuple[int, int]) -> Problem:
    model = nn.Linear(4, 4)
    traced = trace(nn.Sequential(model), torch.zeros(1, 4))
    return Problem(model, traced, {"0": pairs}, Budget(BitOps(), 10**9, "bitops<=1G"), evaluate=lambda policy: 0.0)


def test_on_a_grid_a_step_changes_one_width() -> None:
    down = {("W4A8", "W2A8", 0), ("W4A4", "W2A4", 0), ("W2A8", "W2A4", 1), ("W4A8", "W4A4", 1)}
    up = {(low, high, kind + 3) for high, low, kind in down}
    assert _steps(_problem((2, 4), (2, 8), (4, 4), (4, 8))) == down | up


def test_where_only_some_pairs_are_allowed_a_step_changes_both_widths() -> None:
    assert _steps(_problem((2, 2), (4, 4), (8, 8))) == {("W8A8", "W4A4", 2), ("W4A4", "W2A2", 2), ("W2A2", "W4A4", 5), ("W4A4", "W8A8", 5)}
    # Two choices that neither is under the other have no step between them.
    assert _steps(_problem((2, 8), (8, 2))) == set()


def test_what_a_step_adds_to_each_budget() -> None:
    steps = notches(table_problem([[2.0, 1.0], [2.0, 1.0]], [[[1, 5], [2, 9]], [[7, 8], [3, 3]]], [14, 11]))
    assert steps.cost.tolist() == [[-4, 4, -7, 7], [-1, 1, 0, 0]]
    assert steps.down.tolist() == [True, False, True, False]
    assert steps.widest == (1, 1)


def test_choices_that_save_nothing_are_passed_over() -> None:
    # As in a latency table: 8 bits run as fast as 5 to 7, and 3 bits slower than 4.
    problem = table_problem([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]], [[[10, 20, 50, 40, 80, 80, 80, 80]]], [80])
    assert _steps(problem) == {
        ("W8A32", "W4A32", 0),
        ("W4A32", "W2A32", 0),
        ("W2A32", "W1A32", 0),
        ("W4A32", "W8A32", 3),
        ("W2A32", "W4A32", 3),
        ("W1A32", "W2A32", 3),
    }


def test_a_wider_choice_is_passed_over_only_if_it_is_no_cheaper_anywhere() -> None:
    # Narrower, but dearer in the first budget and cheaper in the second: both stay.
    problem = table_problem([[2.0, 1.0]], [[[5, 4]], [[1, 2]]], [5, 2])
    assert _steps(problem) == {("W2A32", "W1A32", 0), ("W1A32", "W2A32", 3)}
