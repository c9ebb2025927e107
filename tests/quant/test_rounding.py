"""Second-order rounding against brute force and against an obvious implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.quant.rounding import Grid, compensated, damped, descend, fit, output_error, refit, round_columns

SEEDS = range(8)


def problem(seed: int, inputs: int = 4, outputs: int = 3, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Return weights in units of a step of 1, and correlated second moments."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, inputs, generator=generator) @ torch.randn(groups, inputs, inputs, generator=generator)
    return torch.randn(groups, inputs, outputs, generator=generator), x.mT @ x / 40


def signed(low: int = -2, high: int = 1) -> Grid:
    return Grid(torch.tensor(float(low)), torch.tensor(float(high)), torch.tensor(False))


BINARY = Grid(torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(True))


def brute_force(weight: Tensor, gram: Tensor, step: float, values: list[float]) -> Tensor:
    """Return the least output error over all codes, ``[G, 1, R]``."""
    candidates = torch.tensor(list(itertools.product(values, repeat=weight.shape[1]))).T  # [K, candidates]
    least = []
    for g, r in itertools.product(range(weight.shape[0]), range(weight.shape[2])):
        difference = weight[g, :, r, None] - step * candidates
        least.append(((gram[g] @ difference) * difference).sum(0).min())
    return torch.stack(least).view(weight.shape[0], 1, weight.shape[2])


def obvious_rounding(weight: Tensor, gram: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Round one input after another; what is left moves by the closed form for a quadratic with some inputs fixed."""
    codes = torch.empty_like(weight)
    for g in range(weight.shape[0]):
        order = gram[g].diagonal().argsort(descending=True, stable=True).tolist()
        left = weight[g].double().clone()
        for k, j in enumerate(order):
            codes[g, j] = grid.nearest(left[j].float() / step[g, 0])
            error, rest = left[j] - codes[g, j].double() * step[g, 0], order[k + 1 :]
            if rest:  # min over the rest of the quadratic form, given the error at j: H_rr d = -H_rj e
                left[rest] += torch.linalg.solve(gram[g].double()[rest][:, rest], gram[g].double()[rest][:, [j]] * error)
    return codes


@pytest.mark.parametrize("seed", SEEDS)
def test_round_columns_is_the_obvious_rounding(seed: int) -> None:
    weight, gram = problem(seed, inputs=70)  # more than one block
    gram = damped(gram, 0.05)
    step = 0.5 + torch.rand(2, 1, 3)
    for grid in (signed(), signed(-8, 7), BINARY):
        assert torch.equal(round_columns(weight, gram, step, grid), obvious_rounding(weight, gram, step, grid))


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_ends_where_no_single_code_helps(seed: int) -> None:
    weight, gram = problem(seed, inputs=70)
    gram, step = damped(gram, 0.01), torch.ones(2, 1, 3)
    for grid, values in ((signed(), (-2.0, -1.0, 0.0, 1.0)), (BINARY, (-1.0, 1.0))):
        codes = grid.nearest(weight)
        error = output_error(weight, codes, gram)
        for _ in range(30):
            codes = descend(weight, gram, step, codes, grid)
            now = output_error(weight, codes, gram)
            assert bool((now <= error * (1 + 1e-5)).all())
            error = now
        for k, value in itertools.product(range(0, 70, 7), values):
            changed = codes.clone()
            changed[:, k] = value
            assert bool((output_error(weight, changed, gram) >= error * (1 - 1e-4)).all())


def test_second_order_with_refinement_is_close_to_the_best_of_all_codes() -> None:
    ratios, nearest = [], []
    for seed in range(40):
        weight, gram = problem(seed)
        gram = damped(gram, 0.01)
        best = brute_force(weight, gram, 1.0, [-2.0, -1.0, 0.0, 1.0])
        codes = round_columns(weight, gram, torch.ones(2, 1, 3), signed())
        for _ in range(3):
            codes = descend(weight, gram, torch.ones(2, 1, 3), codes, signed())
        ratios.append(output_error(weight, codes, gram) / best)
        nearest.append(output_error(weight, signed().nearest(weight), gram) / best)
    ratio = torch.stack(ratios)
    assert bool((ratio >= 1 - 1e-4).all())
    assert float((ratio < 1 + 1e-4).float().mean()) > 0.75  # found exactly, most of the time
    assert float(ratio.median()) < float(torch.stack(nearest).median())


def test_without_correlation_the_nearest_codes_are_kept() -> None:
    weight, _ = problem(0)
    eye, step = torch.eye(4).expand(2, 4, 4), torch.full((2, 1, 3), 0.7)
    assert torch.equal(round_columns(weight, eye, step, signed()), signed().nearest(weight / step))
    assert torch.equal(descend(weight, eye, step, signed().nearest(weight / step), signed()), signed().nearest(weight / step))


def test_refit_is_the_best_step_and_shares_it() -> None:
    weight, gram = problem(1)
    codes, step = signed().nearest(weight), torch.ones(2, 1, 3)
    own = torch.arange(6).view(2, 1, 3)
    fitted = refit(weight, gram, step, codes, own)
    for factor in (0.99, 1.01):
        assert bool((output_error(weight, codes * fitted, gram) <= output_error(weight, codes * fitted * factor, gram)).all())
    shared = refit(weight, gram, step, codes, torch.zeros_like(own))
    assert len(shared.unique()) == 1
    for factor in (0.99, 1.01):
        assert float(output_error(weight, codes * shared, gram).sum()) <= float(output_error(weight, codes * shared * factor, gram).sum())


def test_refit_keeps_a_step_that_would_not_be_positive() -> None:
    weight, codes = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[-1.0], [-1.0]]])
    owner = torch.zeros(1, 1, 1, dtype=torch.long)
    assert float(refit(weight, torch.eye(2)[None], torch.full((1, 1, 1), 0.3), codes, owner)) == pytest.approx(0.3)
    assert float(refit(weight, torch.eye(2)[None], torch.full((1, 1, 1), 0.3), 0 * codes, owner)) == pytest.approx(0.3)


def test_compensated_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(3)
    float_inputs = torch.randn(1, 200, 5, generator=generator)
    inputs = float_inputs + 0.3 * torch.randn(1, 200, 5, generator=generator)
    weight = torch.randn(1, 5, 2, generator=generator)
    gram, cross = inputs.mT @ inputs / 200, inputs.mT @ (float_inputs @ weight) / 200
    solution = torch.linalg.lstsq(inputs, float_inputs @ weight).solution
    torch.testing.assert_close(compensated(weight, gram, cross, 1e-9), solution, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(compensated(weight, gram, cross, 1e6), weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
def test_fit_keeps_the_grid_and_never_loses_to_fewer_steps(second_order: bool, refine: bool) -> None:
    weight, gram = problem(5, inputs=12, outputs=4)
    step, owner = torch.full((2, 1, 4), 0.6), torch.arange(8).view(2, 1, 4)
    codes, steps = fit(weight, gram, step, signed(), owner, second_order=second_order, refine=refine)
    assert set(codes.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    error = float(output_error(weight, codes * steps, damped(gram, 0.01)).sum())
    nearest = float(output_error(weight, signed().nearest(weight / step) * step, damped(gram, 0.01)).sum())
    assert (error < nearest) == (second_order or refine)
    if not refine:
        assert torch.equal(steps, step)


def test_fit_of_several_grids_at_once_is_fit_of_each() -> None:
    weight, gram = problem(6, inputs=12, outputs=4)
    step, owner = torch.full((2, 1, 4), 0.6), torch.arange(8).view(2, 1, 4)
    alone = [fit(weight, gram, step, grid, owner, second_order=True, refine=True) for grid in (signed(), BINARY)]
    bounds = [torch.cat([a.expand(2, 1, 4), b.expand(2, 1, 4)], 2) for a, b in zip(signed(), BINARY, strict=True)]
    together = fit(
        weight.repeat(1, 1, 2), gram, step.repeat(1, 1, 2), Grid(*bounds), torch.cat([owner, owner + 8], 2), second_order=True, refine=True
    )
    for value, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(parts, 2), atol=1e-5, rtol=1e-5)


def test_fit_with_one_step_for_all_keeps_one() -> None:
    weight, gram = problem(7, inputs=12, outputs=4)
    step, owner = torch.full((2, 1, 4), 0.6), torch.zeros(2, 1, 4, dtype=torch.long)
    _, steps = fit(weight, gram, step, signed(), owner, second_order=True, refine=True)
    assert len(steps.unique()) == 1
