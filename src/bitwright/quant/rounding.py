r"""Second-order rounding: integer codes of a layer's weights, chosen by what they do to the layer's output.

With inputs x of a layer as columns, their second moments :math:`H = E[x x^\top]` and target weights W, rounding W to a grid
:math:`\hat W = s C` with integer codes C costs the mean squared error of the output

.. math:: E\|(W - sC)x\|^2 = \mathrm{tr}\,(W - sC)\,H\,(W - sC)^\top.

`round_columns` rounds one input column after another and moves the columns that are still free so that they make up for the
error (Frantar et al., "GPTQ", 2023, eqs. 2 and 3, in the Cholesky form of their algorithm 1, after the Optimal Brain Surgeon of
Hassibi and Stork, 1993); columns of large :math:`H_{jj}` come first. `descend` then changes single codes while that lowers the
error (cyclic coordinate descent), and `refit` takes the step of least error for given codes, :math:`s = wHc^\top/cHc^\top`; the two
alternate, from several first steps.
`compensated` moves the target first: to the weights whose output on the quantized network's inputs is closest to the float
layer's output on the float network's (the asymmetric calibration of Nagel et al., "AdaRound", 2020, eq. 25, solved in closed form).

Everything here works on batches of independent problems: ``gram`` is ``[G, K, K]`` for G groups of K inputs, weights and codes are
``[G, K, R]`` with one column for each of R outputs, and steps and grid bounds are ``[G, 1, R]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Input columns that are rounded before what is left of the weights is updated."""
SMALLEST = 1e-12
DAMPING = 0.01
"""Share of the mean diagonal of the second moments that is added to it."""
STARTS = (0.8, 0.9, 1.0, 1.1)
"""Multiples of the least-squares step from which codes and steps are refined."""
ROUNDS = 5
"""Sweeps of coordinate descent, each followed by the best step for its codes."""


class Grid(NamedTuple):
    """The codes that each output may take: integers from ``low`` to ``high``, or, where ``binary``, the two numbers -1 and 1."""

    low: Tensor
    high: Tensor
    binary: Tensor

    def nearest(self, units: Tensor) -> Tensor:
        """Return the codes nearest to weights in units of the step; half to even.

        >>> grid = Grid(torch.tensor(-2.0), torch.tensor(1.0), torch.tensor(False))
        >>> grid.nearest(torch.tensor([-2.7, -0.5, 0.6]))
        tensor([-2., 0., 1.])
        """
        rounded = torch.minimum(torch.maximum(units.round(), self.low), self.high)
        return torch.where(self.binary, torch.where(units >= 0, 1.0, -1.0).to(units.dtype), rounded) + 0.0  # no negative zeros

    def row(self, k: int) -> Grid:
        """Return the grid for slices in which axis ``k`` is gone."""
        return Grid(*(bound.squeeze(k) if bound.dim() > k else bound for bound in self))


def damped(gram: Tensor, share: float) -> Tensor:
    """Return second moments with a share of their mean diagonal added to the diagonal.

    >>> damped(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), 0.5)
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(gram.shape[:2])
    return gram + torch.diag_embed(share * mean + SMALLEST)


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """Return the mean squared output error of each output, ``[G, 1, R]``."""
    difference = weight - quantized
    return ((gram @ difference) * difference).sum(1, keepdim=True).clamp_min(0)


def compensated(weight: Tensor, gram: Tensor, cross: Tensor, trust: float) -> Tensor:
    r"""Return the weights that give the float network's output from the quantized network's input, by ridge regression.

    :math:`\arg\min_V E\|Wx - V\hat x\|^2 + \lambda\|V - W\|^2`, with :math:`\lambda` a share of the mean of diag H.

    Args:
        weight: float weights W, ``[G, K, R]``.
        gram: :math:`E[\hat x \hat x^\top]`.
        cross: :math:`E[\hat x\,(Wx)^\top]`, ``[G, K, R]``.
        trust: the share; the larger it is, the closer the result stays to W.

    >>> inputs = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # the quantized network doubled the second input
    >>> weight = torch.tensor([[[3.0], [4.0]]])
    >>> compensated(weight, inputs @ inputs.mT, inputs @ torch.tensor([[[3.0], [4.0]]]), 0.0).flatten()
    tensor([3., 2.])
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    solution: Tensor = torch.linalg.solve(damped(gram, trust), cross + trust * mean * weight)
    return solution


def round_columns(weight: Tensor, gram: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Return codes chosen input by input, the later inputs making up for the errors of the earlier ones.

    Args:
        weight: target weights, ``[G, K, R]``.
        gram: second moments of the inputs, positive definite (see `damped`).
        step: step sizes, ``[G, 1, R]``.
        grid: the codes allowed.

    >>> gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    >>> grid = Grid(torch.tensor(-2.0), torch.tensor(1.0), torch.tensor(False))
    >>> codes = round_columns(torch.tensor([[[0.4], [0.4]]]), gram, torch.ones(1, 1, 1), grid)
    >>> codes.flatten().tolist()  # the nearest codes are 0 and 0, with three times the error
    [0.0, 1.0]
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    left = weight.gather(1, order[:, :, None].expand_as(weight))
    sorted_gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(sorted_gram)), upper=True)
    codes, flat, steps = torch.empty_like(left), grid.row(1), step.squeeze(1)
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        block, errors = left[:, start:end].clone(), torch.empty_like(left[:, start:end])
        factor = upper[:, start:end, start:end]
        for j in range(end - start):
            code = flat.nearest(block[:, j] / steps)
            codes[:, start + j] = code
            errors[:, j] = (block[:, j] - code * steps) / factor[:, j, j, None]
            block[:, j + 1 :] -= factor[:, j, j + 1 :, None] * errors[:, j, None]
        left[:, end:] -= upper[:, start:end, end:].mT @ errors
    return codes.scatter(1, order[:, :, None].expand_as(codes), codes)


def descend(weight: Tensor, gram: Tensor, step: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Return codes after a sweep of coordinate descent, each code in turn taking its best value; the error does not grow.

    >>> gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    >>> weight, grid = torch.tensor([[[0.4], [0.4]]]), Grid(torch.tensor(-2.0), torch.tensor(1.0), torch.tensor(False))
    >>> descend(weight, gram, torch.ones(1, 1, 1), torch.zeros(1, 2, 1), grid).flatten().tolist()
    [1.0, 0.0]
    """
    codes, flat, steps = codes.clone(), grid.row(1), step.squeeze(1)
    pull = gram @ (weight - codes * step)
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST)
    for start in range(0, codes.shape[1], BLOCK):
        end = min(start + BLOCK, codes.shape[1])
        block, moved = pull[:, start:end].clone(), torch.empty_like(pull[:, start:end])
        for j in range(end - start):
            k = start + j
            code = flat.nearest(codes[:, k] + block[:, j] / (scale[:, k, None] * steps))
            moved[:, j] = (code - codes[:, k]) * steps
            codes[:, k] = code
            block[:, j + 1 :] -= gram[:, k + 1 : end, k, None] * moved[:, j, None]
        pull[:, end:] -= gram[:, end:, start:end] @ moved
    return codes


def refit(weight: Tensor, gram: Tensor, step: Tensor, codes: Tensor, owner: Tensor) -> Tensor:
    """Return the step sizes of least output error for given codes; a step that would not be positive stays.

    Args:
        weight: target weights, ``[G, K, R]``.
        gram: second moments of the inputs.
        step: the present steps, ``[G, 1, R]``.
        codes: integer codes.
        owner: which outputs share a step, integers ``[G, 1, R]``.

    >>> codes = torch.tensor([[[1.0], [2.0]]])
    >>> refit(torch.tensor([[[1.0], [2.2]]]), torch.eye(2)[None], torch.ones(1, 1, 1), codes, torch.zeros(1, 1, 1, dtype=torch.long))
    tensor([[[1.0800]]])
    """
    weighted = gram @ codes
    along = _shared((weighted * weight).sum(1, keepdim=True), owner)[owner]
    square = _shared((weighted * codes).sum(1, keepdim=True), owner)[owner]
    best = along / square.clamp_min(SMALLEST)
    return torch.where((square > SMALLEST) & (best > SMALLEST), best, step)


def _shared(values: Tensor, owner: Tensor) -> Tensor:
    """Return the sums of values ``[G, 1, R]`` over the outputs that share a step."""
    return values.new_zeros(int(owner.max()) + 1).index_add(0, owner.flatten(), values.flatten())


def fit(
    weight: Tensor, gram: Tensor, step: Tensor, grid: Grid, owner: Tensor, *, second_order: bool, refine: bool
) -> tuple[Tensor, Tensor]:
    """Return codes and step sizes for target weights.

    Args:
        weight: target weights, ``[G, K, R]``.
        gram: second moments of the inputs, ``[G, K, K]``.
        step: step sizes to begin with, ``[G, 1, R]``.
        grid: the codes allowed.
        owner: which outputs share a step, integers ``[G, 1, R]``.
        second_order: begin with `round_columns`, else with the nearest codes.
        refine: begin at each of `STARTS` times the step, then `descend` and `refit` in turn, and keep the best for each step.
    """
    starts = step.new_tensor(STARTS if refine else (1.0,))
    count, outputs, steps = len(starts), weight.shape[2], int(owner.max()) + 1
    gram, target = damped(gram, DAMPING), weight.repeat(1, 1, count)
    step = step.repeat(1, 1, count) * starts.repeat_interleave(outputs)
    grid = Grid(*(bound.repeat(1, 1, count) if bound.dim() else bound for bound in grid))
    owners = owner.repeat(1, 1, count) + steps * torch.arange(count, device=owner.device).repeat_interleave(outputs)
    codes = round_columns(target, gram, step, grid) if second_order else grid.nearest(target / step)
    for _ in range(ROUNDS if refine else 0):
        codes = descend(target, gram, step, codes, grid)
        step = refit(target, gram, step, codes, owners)
    errors = _shared(output_error(target, codes * step, gram), owners)
    best = errors.view(count, steps).argmin(0)[owner]
    kept = [x.reshape(*x.shape[:2], count, outputs).take_along_dim(best[:, :, None], 2).squeeze(2) for x in (codes, step)]
    return kept[0], kept[1]
