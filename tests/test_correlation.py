"""Correlations: known values, scipy's, intervals that cover, and what does not vary."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bitwright.correlation import pairs_in_order, pearson, spearman


def test_values_are_scipys_ties_included():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 30).astype(float)
    y = x + rng.normal(size=30)
    assert spearman(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-11)
    assert pearson(x, y).value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-11)
    assert spearman(x, np.exp(y)).value == spearman(x, y).value
    assert pearson(x, np.exp(y)).value < pearson(x, y).value
    assert spearman(x, -x).value == -1.0


def test_the_interval_is_the_same_for_the_same_seed_and_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(60):
        x = rng.normal(size=60)
        found = pearson(x, 0.8 * x + 0.6 * rng.normal(size=60), seed)
        assert -1 <= found.low <= found.value <= found.high <= 1
        assert found.n == 60
        covered += found.low <= 0.8 <= found.high
    assert covered >= 51
    assert spearman([1, 2, 4, 3], [1, 3, 2, 4], 7) == spearman([1, 2, 4, 3], [1, 3, 2, 4], 7)


def test_numbers_that_do_not_vary_have_none():
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).value == 0.0
    assert pearson([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]).value == 0.0


def test_the_share_of_pairs_in_order_is_that_of_a_normal_sample():
    rng = np.random.default_rng(2)
    x, noise = rng.normal(size=3000), rng.normal(size=3000)
    y = 0.8 * x + 0.6 * noise
    a, b = rng.integers(0, 3000, (2, 20_000))
    ordered = float(np.mean((x[a] - x[b]) * (y[a] - y[b]) > 0))
    assert pairs_in_order(stats.spearmanr(x, y).statistic) == pytest.approx(ordered, abs=0.02)
    assert pairs_in_order(-1.0) == pytest.approx(0.0, abs=1e-7)
    assert pairs_in_order(1.0) == pytest.approx(1.0)
