"""The uniform baseline: proposes the uniform point, or says that there is none."""

from __future__ import annotations

import math

import pytest

from bitwright.driver import search
from bitwright.errors import BudgetError
from bitwright.methods.uniform import Uniform
from bitwright.testing import check_method, planted, table_problem


@pytest.mark.parametrize("kind", ["table", "linear"])
def test_keeps_the_contract(kind):
    report = check_method(Uniform(), kinds=(kind,), limit=math.inf)
    assert all(row.gap == row.uniform for row in report.rows)


def test_proposes_the_uniform_point():
    problem = planted("table", 3).problem
    result = search(problem, Uniform())
    assert result.policy == result.uniform.policy == problem.uniform()
    assert (result.steps, len(result.history)) == (1, 1)


def test_says_so_where_no_single_width_fits():
    with pytest.raises(BudgetError, match="method 'uniform': no single width keeps table<=2; use a method that mixes widths"):
        search(table_problem([[1.0, 0.0], [1.0, 0.0]], [[[2, 1], [1, 2]]], [2]), Uniform())
