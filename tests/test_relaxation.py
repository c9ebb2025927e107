"""Decisions as rows: who decides together, what it is expected to cost, and the way back to a policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from bitwright.costs import BitOps, Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import search
from bitwright.errors import SiteError
from bitwright.methods.edmips import EdMIPS
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.relaxation import Decisions, logistic, rows_of
from bitwright.sites import trace


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu())


def chain():
    return nn.Sequential(nn.Linear(5, 6), Block(6), Block(6), nn.Linear(6, 3))


SITES = ["0", "1.fc1", "1.fc2", "2.fc1", "2.fc2", "3"]
FREE = SITES[1:-1]


def problem_of(weights=(1, 2, 4), activations=(2, 8), limits=(None, None), **pins):
    model = chain()
    traced = trace(model, torch.zeros(1, 5))
    budgets = [Budget(WeightBits(), limits[0] or 10**6, "weight_bits"), Budget(BitOps(), limits[1] or 10**9, "bitops")]
    choices = build_choices(traced, weights, activations, **pins)
    return Problem(model, traced, choices, budgets, evaluate=lambda _: 0.0)


# ---- who decides together


def test_every_site_has_a_row_for_weights_and_one_for_inputs():
    rows = rows_of(problem_of(), "layer")
    assert [(row.kind, row.sites) for row in rows] == [(kind, (name,)) for name in SITES for kind in "wa"]
    for row in rows:
        pinned = row.sites[0] in ("0", "3")
        assert row.widths == ((8,) if pinned else (1, 2, 4) if row.kind == "w" else (2, 8))


def test_a_block_is_what_shares_a_parent():
    rows = rows_of(problem_of(), "block")
    assert [row.sites for row in rows if row.kind == "w"] == [("0",), ("1.fc1", "1.fc2"), ("2.fc1", "2.fc2"), ("3",)]
    assert [row.sites for row in rows if row.kind == "a"] == [("0",), ("1.fc1", "1.fc2"), ("2.fc1", "2.fc2"), ("3",)]


def test_a_net_decides_all_free_sites_together_and_leaves_the_pins():
    rows = rows_of(problem_of(), "net")
    assert [row.sites for row in rows if row.kind == "w"] == [("0",), tuple(FREE), ("3",)]
    free_ends = rows_of(problem_of(pin_first="free", pin_last="free"), "net")
    assert [row.sites for row in free_ends] == [tuple(SITES)] * 2


def test_choices_that_are_no_full_product_are_refused():
    problem = problem_of()
    choices = dict(problem.choices) | {"1.fc1": (Bits(2, 2), Bits(4, 8))}
    with pytest.raises(SiteError, match=r"site '1.fc1' offers 2 of the 4 pairs of its widths; give all pairs"):
        rows_of(Problem(problem.model, problem.trace, choices, problem.budgets), "layer")


# ---- expected cost


@pytest.mark.parametrize("granularity", ["layer", "block", "net"])
def test_expected_cost_by_hand(granularity):
    problem = problem_of(limits=(500, 20_000))
    decisions = Decisions(problem, granularity)
    generator = torch.Generator().manual_seed(1)
    p = torch.zeros(len(decisions.rows), decisions.widest, dtype=torch.float64)
    for r, row in enumerate(decisions.rows):
        draw = torch.rand(len(row.widths), generator=generator, dtype=torch.float64)
        p[r, : len(row.widths)] = draw / draw.sum()
    expected = [0.0, 0.0]
    for site in problem.sites:
        w_row, a_row = (next(r for r, row in enumerate(decisions.rows) if site.name in row.sites and row.kind == kind) for kind in "wa")
        for i, w in enumerate(decisions.rows[w_row].widths):
            for j, a in enumerate(decisions.rows[a_row].widths):
                chance = float(p[w_row, i] * p[a_row, j])
                expected[0] += chance * w * site.weights / 500
                expected[1] += chance * w * a * site.macs / 20_000
    assert decisions.expected_costs(p).tolist() == pytest.approx(expected, rel=1e-12)
    leaf = p.clone().requires_grad_()
    decisions.expected_costs(leaf)[0].backward()
    for r, row in enumerate(decisions.rows):
        if row.kind == "w":
            weights = sum(problem.trace[name].weights for name in row.sites)
            by_hand = [width * weights / 500 for width in row.widths]
            assert leaf.grad[r, : len(by_hand)].tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("granularity", ["layer", "block", "net"])
def test_a_certain_choice_costs_what_its_policy_costs(granularity):
    problem = problem_of(limits=(700, 30_000))
    decisions = Decisions(problem, granularity)
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        index = [int(torch.randint(len(row.widths), (1,), generator=generator)) for row in decisions.rows]
        policy = decisions.policy(index)
        assert list(policy) == SITES
        p = torch.zeros(len(decisions.rows), decisions.widest)
        p[torch.arange(len(index)), torch.tensor(index)] = 1
        expected = decisions.expected_costs(p) * torch.tensor([700.0, 30_000.0])
        assert expected.tolist() == pytest.approx(list(problem.costs(policy)), rel=1e-12)
        if granularity != "layer":
            assert policy["1.fc1"] == policy["1.fc2"]
        if granularity == "net":
            assert len({policy[name] for name in FREE}) == 1


# ---- exact allocation


@pytest.mark.parametrize("granularity", ["layer", "block", "net"])
@pytest.mark.parametrize("seed", range(3))
def test_allocation_equals_brute_force_within_what_is_allowed(granularity, seed):
    problem = problem_of(weights=(2, 4), activations=(2, 8), limits=(8 * 48 + 3 * 144 + 30 * seed, 8 * 8 * 48 + 14 * 144))
    decisions = Decisions(problem, granularity)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(decisions.rows), decisions.widest, generator=generator, dtype=torch.float64)
    allowed = torch.rand(len(decisions.rows), decisions.widest, generator=generator) < 0.8
    for r, row in enumerate(decisions.rows):
        allowed[r, 0] |= len(row.widths) == 1
    best, policy = math.inf, None
    for index in itertools.product(*(range(len(row.widths)) for row in decisions.rows)):
        if all(bool(allowed[r, i]) for r, i in enumerate(index)) and problem.feasible(decisions.policy(index)):
            value = sum(float(values[r, i]) for r, i in enumerate(index))
            if value < best:
                best, policy = value, decisions.policy(index)
    assert decisions.allocate(values, allowed) == policy


def test_allocation_is_none_where_nothing_allowed_fits():
    problem = problem_of(limits=(8 * 48 + 144, None))
    decisions = Decisions(problem, "layer")
    values = torch.zeros(len(decisions.rows), decisions.widest)
    everything = torch.ones_like(values, dtype=torch.bool)
    assert decisions.allocate(values, everything) is not None
    only_wide = everything.clone()
    only_wide[:, 0] = torch.tensor([len(row.widths) == 1 for row in decisions.rows])
    assert decisions.allocate(values, only_wide) is None


# ---- noise


def test_logistic_noise_has_the_logistic_distribution():
    torch.manual_seed(3)
    g = logistic(40_000)
    assert g.dtype == torch.float64
    assert float(g.mean()) == pytest.approx(0, abs=4 * math.pi / math.sqrt(3 * 40_000))
    assert float(g.var()) == pytest.approx(math.pi**2 / 3, rel=0.05)
    for t in (-2.0, -0.5, 0.0, 1.0, 3.0):
        assert float((g < t).double().mean()) == pytest.approx(1 / (1 + math.exp(-t)), abs=0.011)
    torch.manual_seed(3)
    assert torch.equal(logistic(40_000), g)
    assert bool(torch.isfinite(g).all())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        return self.head((x @ x.mT).softmax(-1) @ x).mean(1)


def test_functional_calls_name_the_remedy_and_it_works():
    model, images = Attention().eval(), torch.randn(32, 1, 3, 6)
    data = SearchData(*(TensorSplit(images, torch.arange(32) % 4, classes=4) for _ in range(2)))

    def problem(activations, skip=()):
        traced = trace(model, images[:2], skip=skip)
        choices = build_choices(traced, weights=(2, 4, 8), activations=activations, pin_first="free", pin_last="free")
        return Problem(model, traced, choices, Budget(WeightBits(), 240, "weight_bits<=240"), data)

    for activations in ((4, 8), (8,)):
        with pytest.raises(SiteError, match=r"site '#0' and 1 more: .*attention products.*search.skip=\[\"#0\", \"#1\"\]"):
            rows_of(problem(activations), "layer")
    mended = problem((4, 8), skip=["#0", "#1"])
    assert mended.feasible(search(mended, EdMIPS(max_steps=2, batch_size=16)).policy)
