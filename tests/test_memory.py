"""Peak activation memory: by hand on a residual and on a dense network, and as a budget."""

import itertools
import math

import pytest
import torch
from torch import nn

from bitwright import allocation
from bitwright.costs import Budget, WeightBits, parse_budget
from bitwright.errors import BudgetError
from bitwright.lifetimes import Held, Lifetimes, Step
from bitwright.memory import ActivationMemory
from bitwright.policy import Bits
from bitwright.problem import Problem, build_choices
from bitwright.sites import trace
from test_lifetimes import Dense, Residual


def bits_of(traced, **widths):
    return {name: Bits(8, widths[name.replace(".", "_")]) for name in traced.names}


@pytest.mark.parametrize(
    ("one", "two", "head", "peak"),
    [
        (8, 8, 8, 512),  # two: its input and its output, 256 elements each; the addition as much
        (8, 4, 8, 512),  # the input of two is also added, so it has 8 bits all the same
        (8, 16, 8, 768),  # two: 256 elements at 16 bits and 256 at 8
        (32, 8, 8, 1024),  # one: 192 elements at 32 bits, and 256 at 8
    ],
)
def test_a_residual_network_by_hand(one, two, head, peak):
    traced = trace(Residual(), torch.zeros(1, 3, 8, 8))
    assert ActivationMemory(traced.lifetimes).total(traced.sites, bits_of(traced, one=one, two=two, head=head)) == peak


@pytest.mark.parametrize(
    ("widths", "peak"),
    [
        # Step layers.2: the image (48), two features (32 each) and the new one (32) at 8 bits, and their concatenation (112).
        ((8, 8, 8), 48 + 32 + 32 + 32 + 112),
        ((8, 8, 4), 48 + 32 + 32 + 32 + 56),
        ((8, 8, 3), 48 + 32 + 32 + 32 + 48),  # now the concatenation that is returned is as large: 144 elements of their own
        ((8, 8, 2), 288),
    ],
)
def test_a_dense_network_by_hand(widths, peak):
    traced = trace(Dense(), torch.zeros(1, 3, 4, 4))
    policy = {name: Bits(8, width) for name, width in zip(traced.names, widths, strict=True)}
    last = 2 * (48 + 3 * 32)  # the last concatenation: its parts and itself, at 8 bits
    assert ActivationMemory(traced.lifetimes).total(traced.sites, policy) == max(peak, last)


def test_bytes_are_rounded_up_and_the_widest_reader_counts():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    traced = trace(Branches(), torch.zeros(1, 5))
    cost = ActivationMemory(traced.lifetimes)
    for a, b in itertools.product((1, 3, 7), repeat=2):
        # 5 elements; while b runs the output of a (one byte) is held as well
        assert cost.total(traced.sites, bits_of(traced, a=a, b=b)) == math.ceil(5 * max(a, b) / 8) + 2
    assert cost.peak(traced.sites, bits_of(traced, a=1, b=1)) == "b: linear"


def chain(activations=(2, 4, 8), budgets=("activation_memory<=100B",)):
    """Three layers whose inputs have 64, 128 and 64 elements."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))
    traced = trace(net, torch.zeros(1, 64, 1, 1))
    choices = build_choices(traced, (8,), activations, pin_first="free", pin_last="free")
    parsed = [parse_budget(text, traced.sites, pins={}, costs=[ActivationMemory(traced.lifetimes)]) for text in budgets]
    return Problem(net, traced, choices, parsed, evaluate=lambda policy: sum(2.0**-bits.a for bits in policy.values()))


def test_the_integer_program_keeps_every_step_and_agrees_with_enumeration():
    problem = chain()
    assert len(problem.rows) == len(problem.terms) == len(problem.limits) == 2  # the third step is never the largest
    index = allocation.allocate([[2.0**-bits.a for bits in allowed] for allowed in problem.choices.values()], problem.terms, problem.limits)
    policies = [problem.policy(index) for index in itertools.product(range(3), repeat=3)]
    best = min((policy for policy in policies if problem.feasible(policy)), key=problem.loss)
    assert problem.loss(problem.policy(index)) == problem.loss(best)
    for policy in policies:
        total = problem.budgets[0].cost.total(problem.sites, policy)
        assert problem.costs(policy) == (total,)
        by_hand = [a.a * n // 8 + b.a * m // 8 for (a, n), (b, m) in itertools.pairwise(zip(policy.values(), (64, 128, 64), strict=True))]
        assert total == max(*by_hand, policy["5"].a * 64 // 8 + 8)
        assert problem.feasible(allocation.repair(policy, problem))


@pytest.mark.parametrize(("limit", "possible"), [(47, False), (48, True)])
def test_reachable_range_and_the_message_at_its_edge(limit, possible):
    problem = chain(budgets=[f"activation_memory<={limit}B"])
    assert allocation.reachable(problem) == ((48, 192),)
    if possible:
        problem.check()
        return
    with pytest.raises(BudgetError, match=r"choices reach 48B \(48 bytes\) to 192B .*the nearest feasible limit is 48B"):
        problem.check()


def test_two_budgets_that_cannot_be_kept_together_say_how_far_each_must_move():
    free = chain()
    memory = free.budgets[0].cost
    # Choices that trade one for the other: narrow weights only with wide inputs.
    choices = {name: (Bits(2, 8), Bits(8, 2)) for name in free.choices}
    budgets = [
        Budget(memory, 100, "activation_memory<=100B"),
        Budget(WeightBits(), 2 * sum(s.weights for s in free.sites), "weight_bits<=2"),
    ]
    problem = Problem(free.model, free.trace, choices, budgets)
    with pytest.raises(BudgetError, match=r"'activation_memory<=100B' to 192B \(192 bytes\) or 'weight_bits<=2' to"):
        problem.check()
    assert allocation.nearest_limit(problem, 0) == 192
    assert allocation.nearest_limit(Problem(free.model, free.trace, choices, [budgets[0]]), 0) == 48


def test_a_budget_in_units_in_widths_and_in_percent():
    traced = trace(Residual(), torch.zeros(1, 3, 8, 8))
    cost = ActivationMemory(traced.lifetimes)
    limits = [
        parse_budget(f"activation_memory<={text}", traced.sites, pins={}, costs=[cost]).limit for text in ("64KB", "1KiB", "W4A16", "25%")
    ]
    assert limits == [64_000, 1024, 896, 512]  # in float32: 512 elements of 4 bytes
    assert cost.show(1_500, traced.sites) == "1.5KB"


def test_one_sites_term_is_the_most_that_it_decides():
    traced = trace(Residual(), torch.zeros(1, 3, 8, 8))
    assert ActivationMemory(traced.lifetimes)(traced["two"], Bits(8, 16)) == 512


def test_too_many_shared_tensors_ask_for_ties():
    held = tuple(Held(8, tuple(f"{k}{i}" for i in range(8))) for k in range(5))
    cost = ActivationMemory(Lifetimes(held, (Step("join", tuple(range(5))),)))
    with pytest.raises(BudgetError, match="at 'join', 5 tensors that several sites read make 32768 rows, more than 4096; tie sites"):
        _ = cost.rows


def test_a_network_without_steps_holds_nothing():
    assert ActivationMemory(Lifetimes()).total([], {}) == 0


@pytest.mark.parametrize("method", ["greedy", "evolution", "fracbits", "random", "sdq", "edmips", "uniform"])
def test_every_kind_of_method_keeps_a_peak(method):
    from bitwright import search
    from bitwright.data import TensorSplit
    from bitwright.driver import Stop
    from bitwright.methods import get_method
    from bitwright.problem import SearchData

    plain = chain()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 64, 1, 1, generator=generator), torch.randint(0, 8, (64,), generator=generator)
    split = TensorSplit(images, labels, classes=8)
    problem = Problem(plain.model, plain.trace, plain.choices, plain.budgets, SearchData(split, split), evaluate=plain.loss)
    result = search(problem, get_method(method)(), stop=Stop(steps=2))
    assert problem.feasible(result.policy)
    assert len(result.costs) == 1
    assert result.costs[0] <= 100
