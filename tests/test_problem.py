"""The problem: choices and pins, exact costs and limits, the uniform point, the loss, and what is said when a budget cannot be met."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitwright.allocation import reachable, repair
from bitwright.costs import BitOps, Budget, Size, WeightBits, parse_budget
from bitwright.data import TensorSplit
from bitwright.errors import BitwrightError, BudgetError, PolicyError, SiteError
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, SearchData, build_choices, digest
from bitwright.quant.reference import ReferenceLoss
from bitwright.sites import trace
from bitwright.testing import table_problem


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.fixture
def traced(net):
    return trace(net, torch.zeros(1, 4))


def total_of(policy):
    return float(sum(bits.w for bits in policy.values()))


def problem_of(net, traced, *budgets, weights=(1, 2, 4), activations=(32,), **options):
    choices = build_choices(traced, weights, activations)
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    parsed = [parse_budget(text, traced.sites, pins=pins) for text in budgets]
    return Problem(net, traced, choices, parsed, evaluate=total_of, **options)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.a(x) @ self.b(x).transpose(1, 2) @ x)


# ---- choices


def test_first_and_last_are_pinned_and_the_rest_take_every_pair(traced):
    choices = build_choices(traced, (4, 2), (8, 4))
    assert choices["0"] == choices["6"] == (Bits(8, 8),)
    assert choices["2"] == choices["4"] == (Bits(2, 4), Bits(2, 8), Bits(4, 4), Bits(4, 8))


def test_pins_follow_float_activations_and_can_be_set_or_freed(traced):
    choices = build_choices(traced, (2,), (32,), pin_first=(4, 32), pin_last="free")
    assert choices["0"] == (Bits(4, 32),)
    assert choices["6"] == (Bits(2, 32),)
    assert build_choices(traced, (2,), (16,))["0"] == (Bits(8, 32),)


def test_a_product_takes_the_activation_width_for_both_operands():
    traced = trace(Products(), torch.zeros(1, 3, 4))
    choices = build_choices(traced, (2, 4), (4, 8))
    products = [site.name for site in traced.sites if site.operands == 2]
    assert products
    assert all(choices[name] == (Bits(4, 4), Bits(8, 8)) for name in products)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ()}, "choices: no width to choose from"),
        ({"activations": ()}, "choices: no width to choose from"),
        ({"weights": (9,)}, "choices: weight width 9 is not one of"),
        ({"pin_first": (8, 7.5)}, "pin of '0': activation width 7.5 is not one of"),
    ],
)
def test_bad_widths_are_refused(traced, options, message):
    with pytest.raises(PolicyError, match=message):
        build_choices(traced, **options)


def test_choices_must_match_the_sites(net, traced):
    good = build_choices(traced, (2, 4))
    with pytest.raises(SiteError, match=r"choices: no site '22' in the model; did you mean '2'\?"):
        Problem(net, traced, {**good, "22": (Bits(2, 32),)}, ())
    with pytest.raises(PolicyError, match="choices: site '2' has none"):
        Problem(net, traced, {**good, "2": ()}, ())
    with pytest.raises(PolicyError, match="choices: site '4' has the same bits twice"):
        Problem(net, traced, {**good, "4": (Bits(2, 32), Bits(2, 32))}, ())


# ---- policies and costs


def test_index_and_policy_are_inverse_whatever_the_order_of_entries(net, traced):
    problem = problem_of(net, traced, "weight_bits<=8")
    policy = problem.policy((0, 2, 1, 0))
    assert problem.index(Policy(reversed(policy.entries))) == (0, 2, 1, 0)
    assert problem.pins == {"0": Bits(8, 32), "6": Bits(8, 32)}


def test_policies_that_do_not_fit_the_problem_are_refused(net, traced):
    problem = problem_of(net, traced, "weight_bits<=8")
    good = problem.cheapest()
    with pytest.raises(PolicyError, match=r"policy: the problem has no site '20'; did you mean '2'\?"):
        problem.index({**good, "20": Bits(2, 32)})
    with pytest.raises(PolicyError, match="policy: site '4' has no entry; give it one of W1A32, W2A32, W4A32"):
        problem.index({name: bits for name, bits in good.items() if name != "4"})
    with pytest.raises(PolicyError, match="policy: site '0' has W2A32, which is no choice of it; choose from W8A32"):
        problem.index(good.replace({"0": Bits(2, 32)}))


def test_costs_are_those_of_the_cost_fixed_part_included(net, traced):
    choices = build_choices(traced, (1, 2, 4), (2, 8))
    costs = [BitOps(), WeightBits(), Size(fixed=100)]
    problem = Problem(net, traced, choices, [Budget(cost, 10**9, cost.name) for cost in costs])
    policy = problem.policy((0, 3, 4, 0))
    assert problem.costs(policy) == tuple(cost.total(traced.sites, policy) for cost in costs)
    assert reachable(problem)[2][0] == Size(fixed=100).total(traced.sites, problem.policy((0, 0, 0, 0)))


def test_feasible_moves_by_one_unit(net, traced):
    choices = build_choices(traced, (1, 2, 4))
    policy = Policy({"0": (8, 32), "2": (2, 32), "4": (4, 32), "6": (8, 32)})
    cost = WeightBits().total(traced.sites, policy)
    assert Problem(net, traced, choices, Budget(WeightBits(), cost, "")).feasible(policy)
    tight = Problem(net, traced, choices, Budget(WeightBits(), cost - 1, ""))
    assert not tight.feasible(policy)
    # Halving either site is equally near; site 2 gives up fewer bits.
    assert repair(policy, tight) == policy.replace({"2": Bits(1, 32)})


def test_repair_is_nearest_by_ratio_and_spends_what_it_can():
    terms = [[[10, 20, 30, 40], [10, 14, 16, 18]]]

    def repaired(w0, w1, limit):
        policy = repair(Policy({"0": (w0, 32), "1": (w1, 32)}), table_problem([[0.0] * 4] * 2, terms, [limit]))
        return tuple(bits.w for bits in policy.values())

    assert repaired(4, 2, 54) == (4, 2)
    assert repaired(4, 2, 53) == (3, 2)  # 3/4 is nearer than 1/2
    assert repaired(2, 2, 33) == (2, 1)  # both are halvings, and this one spends 30 of 33
    assert repaired(2, 2, 29) == (1, 2)
    policy, problem = Policy({"0": (1, 32), "1": (1, 32)}), table_problem([[0.0] * 4] * 2, terms, [19])
    with pytest.raises(BudgetError, match="limit 19, reachable 20 to 58"):
        repair(policy, problem)


# ---- the uniform point


@pytest.mark.parametrize(
    ("limit", "expected"),
    [((8, 8), (8, 8)), ((3, 3), (3, 3)), ((4, 8), (8, 4)), ((8, 4), (8, 4)), ((2, 8), (4, 4)), ((2, 4), (4, 2)), ((2, 2), (2, 2))],
)
def test_uniform_is_widest_by_its_narrower_width(net, traced, limit, expected):
    choices = build_choices(traced, (2, 3, 4, 8), (2, 3, 4, 8))
    policy = {name: Bits(*limit) if len(choices[name]) > 1 else choices[name][0] for name in choices}
    problem = Problem(net, traced, choices, Budget(BitOps(), BitOps().total(traced.sites, policy), ""))
    uniform = problem.uniform()
    assert uniform["2"] == uniform["4"] == Bits(*expected)
    assert uniform["0"] == Bits(8, 8)


def test_uniform_takes_the_nearest_choice_of_a_site_that_lacks_the_pair(net, traced):
    choices = {**build_choices(traced, (2, 4)), "4": (Bits(1, 32), Bits(8, 32))}
    problem = Problem(net, traced, choices, Budget(WeightBits(), 10**6, ""))
    assert problem.uniform()["4"] == Bits(8, 32)
    assert problem.uniform()["2"] == Bits(4, 32)


def test_no_uniform_point_where_no_single_width_fits():
    problem = table_problem([[1.0, 0.0], [1.0, 0.0]], [[[2, 1], [1, 2]]], [2])
    assert problem.uniform() is None
    problem.check()


def test_uniform_of_a_problem_without_a_free_site(net, traced):
    choices = {name: (Bits(8, 32),) for name in traced.names}
    assert Problem(net, traced, choices, ()).uniform() == Policy(dict.fromkeys(traced.names, (8, 32)))


# ---- budgets that cannot be met


def test_an_unreachable_budget_names_range_and_nearest_limit(net, traced):
    problem = problem_of(net, traced, "weight_bits<=2")
    low, high = reachable(problem)[0]
    with pytest.raises(BudgetError) as caught:
        problem.check()
    text = str(caught.value)
    assert text.startswith("budget 'weight_bits<=2' cannot be met: its limit is 2 (")
    assert f"({low} bits) to" in text
    assert f"({high} bits); the nearest feasible limit is" in text
    assert text.endswith(f"({low} bits)")


def test_check_moves_by_one_unit(net, traced):
    choices = build_choices(traced, (1, 2, 4))
    low, _ = reachable(Problem(net, traced, choices, Budget(WeightBits(), 1, "")))[0]
    Problem(net, traced, choices, Budget(WeightBits(), low, "")).check()
    with pytest.raises(BudgetError, match="cannot be met"):
        Problem(net, traced, choices, Budget(WeightBits(), low - 1, "weight_bits<=x")).check()


def test_budgets_that_exclude_each_other_name_both_ways_out():
    terms = [[[1, 2], [1, 2]], [[5, 3], [5, 3]]]
    table_problem([[1.0, 0.0]] * 2, terms, [3, 8]).check()
    with pytest.raises(BudgetError, match=re.escape("raise 'table<=2' to 3 (3 units) or 'table<=8' to 10 (10 units)")):
        table_problem([[1.0, 0.0]] * 2, terms, [2, 8]).check()
    with pytest.raises(BudgetError, match=r"'table<=2', 'table<=8' cannot be met together: 'table<=2' alone reaches 2 \(2 units\) to 4"):
        table_problem([[1.0, 0.0]] * 2, terms, [2, 8]).check()


def test_where_no_single_limit_helps_several_must_rise():
    # Site 0 suits one budget at a time: any two of the three limits exclude each other.
    terms = [[[0, 1, 1]], [[1, 0, 1]], [[1, 1, 0]]]
    with pytest.raises(BudgetError, match="raise several of them"):
        table_problem([[0.0] * 3], terms, [0, 0, 0]).check()


# ---- the loss


def test_loss_is_asked_once_per_policy(net, traced):
    problem = problem_of(net, traced, "weight_bits<=8")
    policy = problem.cheapest()
    assert problem.loss(policy) == problem.loss(Policy(reversed(policy.entries))) == total_of(policy)
    assert problem.evaluations == 1


def split(count, seed, shape=(4,)):
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit(torch.randn(count, 1, 1, *shape, generator=generator), torch.randint(0, 2, (count,), generator=generator), classes=2)


def test_the_default_loss_is_the_reference_quantizer(net, traced):
    model = nn.Sequential(nn.Flatten(), *net)
    traced = trace(model, torch.zeros(1, 1, 1, 4))
    data = SimpleNamespace(fit=split(64, 0), selection=split(32, 1), test=None)
    problem = Problem(model, traced, build_choices(traced, (2, 8), (4, 8)), (), data, seed=3)
    policy = problem.cheapest()
    assert problem.loss(policy) == ReferenceLoss(model, data.selection, data.fit, traced.sites, 3)(policy) > 0


def test_only_fit_and_selection_are_in_a_problem(net, traced):
    data = SimpleNamespace(fit=split(4, 0), selection=split(2, 1), test=split(2, 2))
    problem = Problem(net, traced, build_choices(traced), (), data)
    assert problem.data == SearchData(data.fit, data.selection)
    assert problem.has_data
    with pytest.raises(BitwrightError, match="problem: it was made without data"):
        _ = problem_of(net, traced, "weight_bits<=8").data


# ---- another network, and fingerprints


def test_on_keeps_target_costs_and_matches_sites_by_name(net, traced):
    problem = problem_of(net, traced, "weight_bits<=4")
    proxy = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    other = problem.on(proxy, evaluate=lambda policy: 0.0)
    policy = problem.cheapest()
    assert other.costs(policy) == problem.costs(policy)
    assert other.choices == problem.choices
    assert other.model is proxy
    assert other.loss(policy) == 0.0
    with pytest.raises(SiteError, match="on: the other network has no layer '6' for site '6'"):
        problem.on(proxy[:-1])


def test_the_fingerprint_sees_weights_choices_budgets_and_seed(net, traced):
    def prints(**options):
        return problem_of(net, traced, options.pop("budget", "weight_bits<=4"), **options).fingerprint()

    base = prints()
    assert prints() == base
    assert prints(budget="weight_bits<=5")["budgets"] != base["budgets"]
    assert prints(weights=(1, 2))["choices"] != base["choices"]
    assert prints(seed=1)["seed"] != base["seed"]
    before = digest(net)
    with torch.no_grad():
        net[0].bias[0] += 1e-7 + net[0].bias[0].abs() * 1e-6
    assert digest(net) != before
    assert prints()["weights"] != base["weights"]
