"""What differentiable methods share: decisions as rows of widths, their expected cost, and the way back to a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.allocation import Border, allocate
from bitwright.costs import Cost
from bitwright.errors import BudgetError, SiteError
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.sites import Site

Granularity = Literal["layer", "block", "net"]
PRIOR = 30.0
"""A gain measured n times counts n, what the row's other gains foretell counts this."""


def empty() -> Tensor:
    """Return no numbers, float64 ``[0]``: what a state holds before its first step."""
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """One decision: the width of the weights, or of the inputs, of some sites.

    Attributes:
        kind: ``w`` or ``a``.
        sites: names of the sites that share it.
        widths: candidates, rising; a single one is no decision.
    """

    kind: Literal["w", "a"]
    sites: tuple[str, ...]
    widths: tuple[int, ...]


def rows_of(problem: Problem, granularity: Granularity) -> tuple[Row, ...]:
    """Return the decisions of a problem: for each group of sites one row for weights and one for inputs.

    ``layer`` decides for every site alone, ``block`` for the free sites whose paths share a parent (``layer1.0.conv1`` and
    ``layer1.0.conv2``), ``net`` for all free sites together. Pinned sites have rows of one width.

    Raises:
        SiteError: a site is a functional call, which cannot run on a gate, such as a product of two activations; or its choices
            are not all pairs of some weight and some input widths.
    """
    calls = [site.name for site in problem.sites if any("#" in layer for layer in site.layers)]
    if calls:
        seen = f"site '{calls[0]}'" + (f" and {len(calls) - 1} more" if calls[1:] else "")
        why = "computed by functional calls (attention products, say), which this method cannot put on gates"
        raise SiteError(f"{seen}: {why}; leave them in float with search.skip={json.dumps(calls)}, or take kl, fisher or greedy")
    groups: dict[tuple[object, ...], list[str]] = {}
    for site in problem.sites:
        choices = problem.choices[site.name]
        own = len(choices) == 1 or granularity == "layer"
        place = site.name if own else site.name.rpartition(".")[0] if granularity == "block" else ""
        groups.setdefault((own, place, choices), []).append(site.name)
    rows = []
    for names in groups.values():
        choices = problem.choices[names[0]]
        weights, inputs = sorted({c.w for c in choices}), sorted({c.a for c in choices})
        if len(weights) * len(inputs) != len(choices):
            asked = f"{len(choices)} of the {len(weights) * len(inputs)} pairs of its widths"
            raise SiteError(f"site '{names[0]}' offers {asked}; give all pairs")
        rows += [Row("w", tuple(names), tuple(weights)), Row("a", tuple(names), tuple(inputs))]
    return tuple(rows)


class Decisions:
    """The rows of a problem as tensors: expected costs, policies and exact allocation.

    Args:
        problem: sites, choices and budgets.
        granularity: which sites decide together.

    Attributes:
        rows: all rows; ``free`` numbers those with more than one candidate, ``counts`` holds how many each has.
    """

    def __init__(self, problem: Problem, granularity: Granularity):
        if not problem.budgets:
            raise BudgetError("a differentiable search needs a budget to descend to; give one, for example weight_bits<=2.5")
        self.problem = problem
        self.rows = rows_of(problem, granularity)
        self.widest = max(len(row.widths) for row in self.rows)
        self.counts = torch.tensor([len(row.widths) for row in self.rows])
        self.free = [r for r, row in enumerate(self.rows) if len(row.widths) > 1]
        self.of_site = {name: [r for r, row in enumerate(self.rows) if name in row.sites] for name in problem.choices}
        self.tables = [self._table(row.cost) for row in problem.rows]
        self.borders = [_Borders.of(self, borders) for borders in problem.borders]
        self.limits = [float(max(1, limit)) for limit in problem.limits]
        places = [self.of_site[site.name] for site in problem.sites]
        self.weight_rows, self.input_rows = (torch.tensor([place[j] for place in places]) for j in (0, 1))

    def _table(self, cost: Cost) -> Tensor:
        """Return the cost of each pair of candidates, float64 ``[site, weight width, input width]``."""
        table = torch.zeros(len(self.problem.sites), self.widest, self.widest, dtype=torch.float64)
        for s, site in enumerate(self.problem.sites):
            weights, inputs = (self.rows[r].widths for r in self.of_site[site.name])
            for i, w in enumerate(weights):
                for j, a in enumerate(inputs):
                    table[s, i, j] = cost(site, Bits(w, a))
        return table

    def expected_costs(self, probabilities: Tensor) -> Tensor:
        """Return the expected cost of each budget over its limit, differentiable; of a peak, that of each of its rows.

        Args:
            probabilities: ``[row, candidate]``; weights and inputs are drawn independently, and so are sites where they have a border.

        Returns:
            float64 ``[budget]``, or more where a budget has several rows (`bitwright.problem.Problem.rows`).
        """
        p = probabilities.double()
        left, right = p[self.weight_rows], p[self.input_rows]
        terms = [torch.einsum("sij,si,sj->", table, left, right) for table in self.tables]
        totals = [own if borders is None else own + borders.expected(left, right) for own, borders in zip(terms, self.borders, strict=True)]
        return torch.stack([total / limit for total, limit in zip(totals, self.limits, strict=True)])

    def expected_spending(self, probabilities: Tensor) -> tuple[float, ...]:
        """Return the expected cost of each budget in its own unit, fixed parts included; of a peak, its largest row."""
        costs = self.expected_costs(probabilities) * torch.tensor(self.limits)
        return tuple(self.problem.by_budget(costs.tolist()))

    def policy(self, index: Sequence[int]) -> Policy:
        """Return the policy that takes candidate ``index[r]`` in row r."""
        chosen = [row.widths[i] for row, i in zip(self.rows, index, strict=True)]
        return Policy((name, Bits(*(chosen[r] for r in self.of_site[name]))) for name in self.problem.choices)

    def index(self, policy: Policy) -> list[int]:
        """Return the candidate of every row in a policy: the inverse of `policy`."""
        return [row.widths.index(getattr(policy[row.sites[0]], row.kind)) for row in self.rows]

    def allocate(self, values: Tensor, allowed: Tensor) -> Policy | None:
        """Return the feasible policy of least summed value, or None if none of the allowed candidates fit.

        Args:
            values: ``[row, candidate]``, lower is better.
            allowed: bool ``[row, candidate]``.
        """
        groups = sorted({tuple(places) for places in self.of_site.values()})
        columns, terms = [], [[] for _ in self.problem.rows]  # type: ignore[var-annotated]
        for weights, inputs in groups:
            pairs = self._pairs(weights, inputs)
            value = [float(values[weights, i] + values[inputs, j]) for i, j in pairs]
            fits = [bool(allowed[weights, i] & allowed[inputs, j]) for i, j in pairs]
            columns.append([v if ok else float("inf") for v, ok in zip(value, fits, strict=True)])
            for k, row in enumerate(self.problem.rows):
                sites, bits = [self._site(name) for name in self.rows[weights].sites], self._bits(weights, inputs)
                terms[k].append(np.array([sum(row.cost(site, b) for site in sites) for b in bits], dtype=np.int64))
        borders = [self._between(groups, own, terms[k]) for k, own in enumerate(self.problem.borders)]
        try:
            chosen = allocate([np.array(column) for column in columns], terms, self.problem.limits, borders)
        except BudgetError:
            return None
        index = [0] * len(self.rows)
        for (weights, inputs), place in zip(groups, chosen, strict=True):
            index[weights], index[inputs] = self._pairs(weights, inputs)[place]
        return self.policy(index)

    def _between(self, groups: Sequence[tuple[int, ...]], borders: Sequence[Border], terms: list[NDArray[np.int64]]) -> list[Border]:
        """Return borders between sites as borders between groups; one within a group is added to its terms."""
        names, found = list(self.problem.choices), []
        for border in borders:
            group, classes = [], []
            for i, own in zip(border.sites, border.classes, strict=True):
                places = tuple(self.of_site[names[i]])
                group.append(groups.index(places))
                classes.append(own[[self.problem.choices[names[i]].index(bits) for bits in self._bits(*places)]])
            if group[0] == group[1]:
                terms[group[0]] += border.price * (classes[0] != classes[1])
            else:
                found.append(Border((group[0], group[1]), (classes[0], classes[1]), border.price))
        return found

    def _pairs(self, weights: int, inputs: int) -> list[tuple[int, int]]:
        return [(i, j) for i in range(len(self.rows[weights].widths)) for j in range(len(self.rows[inputs].widths))]

    def _bits(self, weights: int, inputs: int) -> list[Bits]:
        return [Bits(self.rows[weights].widths[i], self.rows[inputs].widths[j]) for i, j in self._pairs(weights, inputs)]

    def _site(self, name: str) -> Site:
        return self.problem.trace[name]


@dataclass(frozen=True)
class _Borders:
    """The borders of one row of a problem as tensors: what is of which class, ``[end, border, weight width, input width, class]``."""

    sites: Tensor
    classes: Tensor
    prices: Tensor

    @classmethod
    def of(cls, decisions: Decisions, borders: Sequence[Border]) -> _Borders | None:
        """Return the tensors of some borders; None where there are none."""
        if not borders:
            return None
        names = list(decisions.problem.choices)
        kinds = 1 + max(int(own.max()) for border in borders for own in border.classes)
        classes = torch.zeros(2, len(borders), decisions.widest, decisions.widest, kinds, dtype=torch.float64)
        for k, border in enumerate(borders):
            for end, (i, own) in enumerate(zip(border.sites, border.classes, strict=True)):
                weights, inputs = (decisions.rows[r].widths for r in decisions.of_site[names[i]])
                for bits, kind in zip(decisions.problem.choices[names[i]], own, strict=True):
                    classes[end, k, weights.index(bits.w), inputs.index(bits.a), int(kind)] = 1
        sites = torch.tensor([border.sites for border in borders]).T
        return cls(sites, classes, torch.tensor([border.price for border in borders], dtype=torch.float64))

    def expected(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the expected cost, from the probabilities of weight and input widths ``[site, width]``."""
        one, other = torch.einsum("ebijk,ebi,ebj->ebk", self.classes, left[self.sites], right[self.sites])
        differing: Tensor = 1 - (one * other).sum(1)
        return (self.prices * differing).sum()


def losses_of_gains(gains: Tensor, draws: Tensor, errors: Tensor, decisions: Decisions) -> Tensor:
    """Return what each candidate loses against the widest, ``[row, candidate]``, from the gains that a search measured.

    To second order a step down loses in proportion to the quantization error it adds, so all gains of a row tell of one factor,
    its sensitivity. A gain that was measured often counts for itself; one seldom or never measured is put at sensitivity times
    error. A step never gains less than the one above it.

    Args:
        gains: sums of what a candidate was seen to gain over the next lower one, ``[row, candidate, upper or lower in use]``.
        draws: how often, likewise.
        errors: relative quantization error of every candidate, ``[row, candidate]``.
        decisions: the rows.
    """
    mean = gains / draws.clamp_min(1e-9)
    seen = draws > 0.5
    measured = torch.where(seen.all(2), mean.mean(2), torch.where(seen, mean, 0.0).sum(2))
    often = draws.sum(2)
    added = torch.zeros_like(errors)
    added[:, 1:] = (errors[:, :-1] - errors[:, 1:]).clamp_min(0)
    sensitivity = (often * measured * added).sum(1) / (often * added.square()).sum(1).clamp_min(1e-30)
    foretold = sensitivity.clamp_min(0)[:, None] * added
    gain = ((often * measured + PRIOR * foretold) / (often + PRIOR)).clamp_min(0)
    losses = torch.zeros_like(gain)
    for r in decisions.free:
        above = 0.0
        for i in range(len(decisions.rows[r].widths) - 1, 0, -1):
            above = max(above, float(gain[r, i])) + 1e-12
            losses[r, i - 1] = losses[r, i] + above
    return losses


def logistic(count: int) -> Tensor:
    """Draw from the standard logistic distribution, the difference of two Gumbel variables, by torch's global generator."""
    uniform = torch.rand(count, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return uniform.log() - (-uniform).log1p()


def adam(gradient: Tensor, first: Tensor, second: Tensor, step: int, betas: tuple[float, float] = (0.9, 0.99)) -> Tensor:
    """Return Adam's direction (Kingma and Ba, 2015, algorithm 1), updating its two running moments in place.

    Args:
        gradient: of any shape, as ``first`` and ``second``.
        first: running mean of the gradient.
        second: running mean of its square.
        step: number of this step, from 1.
        betas: decays of the two.

    >>> adam(torch.tensor([3.0, -0.5]), torch.zeros(2), torch.zeros(2), 1)
    tensor([ 1., -1.])
    """
    first.lerp_(gradient, 1 - betas[0])
    second.lerp_(gradient.square(), 1 - betas[1])
    scale = (second / (1 - betas[1] ** step)).sqrt().clamp_min(1e-12)
    return first / (1 - betas[0] ** step) / scale
