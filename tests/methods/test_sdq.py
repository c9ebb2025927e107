"""SDQ's first phase: the draw and its gradient, the descent, and the contract of a search method."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

from bitwright import runs
from bitwright.costs import BitOps, Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import Stop, search
from bitwright.errors import BitwrightError, BudgetError, RecipeError, RunError, SiteError, TrainingError
from bitwright.methods import get_method
from bitwright.methods.sdq import SDQ, probabilities
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.quant.gates import Gate, GatedWeight
from bitwright.quant.quantizers import LSQWeight
from bitwright.recipe import make_options
from bitwright.relaxation import Decisions, logistic
from bitwright.sites import trace
from bitwright.testing import check_method


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc2(self.norm(self.fc1(x)).relu())


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 10), nn.Dropout(0.1), Block(10), Block(10), nn.Linear(10, 3)).eval()


FREE = ("3.fc1", "3.fc2", "4.fc1", "4.fc2")
PINNED = 18 * 10 + 10 * 3
WEIGHTS = 4 * 100


def split(seed, n):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 2, 3, 3, generator=generator)
    x[torch.arange(n), 0, y] += 2
    return TensorSplit(x, y, classes=3, augment="crop-flip", pad=1)


DATA = SearchData(split(1, 96), split(2, 40))


def problem_of(average=2.5, weights=(1, 2, 3, 4, 8), activations=(32,), limits=None, seed=0, model=None):
    model = model or network()
    traced = trace(model, torch.zeros(1, 2, 3, 3))
    limits = limits or [Budget(WeightBits(), round(8 * PINNED + average * WEIGHTS), f"free average {average}")]
    return Problem(model, traced, build_choices(traced, weights, activations), limits, DATA, seed=seed, evaluate=lambda _: 1.0)


def quick(**options):
    return SDQ(**{"max_steps": 52, "epochs": 20, "batch_size": 16, "lr": 0.02, **options})


def run(problem, method, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return search(problem, method, **arguments)


# ---- the draw


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_stochastic_gate_is_a_bernoulli_draw_at_any_temperature(beta, temperature):
    torch.manual_seed(1)
    n = 20_000
    gates = SDQ(temperature=temperature).gates(torch.full((n,), beta, dtype=torch.float64), torch.ones(n, dtype=torch.int64), logistic(n))
    assert gates.shape == (n, 2)
    assert set(gates.flatten().tolist()) == {0.0, 1.0}
    assert bool((gates.sum(1) == 1).all())
    assert float(gates[:, 0].mean()) == pytest.approx(beta, abs=4 * math.sqrt(beta * (1 - beta) / n))
    pairs = gates[:, 0].view(-1, 2)  # draws of different rows are independent
    assert float(pairs.prod(1).mean()) == pytest.approx(beta**2, abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_gradient_of_beta_is_that_of_the_soft_gate(temperature):
    """c(1-c)/(tau beta(1-beta)), whatever was drawn."""
    torch.manual_seed(2)
    beta = torch.linspace(0.05, 0.95, 30, dtype=torch.float64).requires_grad_()
    level, noise = torch.ones(30, dtype=torch.int64), logistic(30)
    c = torch.sigmoid(((beta / (1 - beta)).log().detach() + noise) / temperature)
    b = beta.detach()
    by_hand = c * (1 - c) / (temperature * b * (1 - b))
    for gate in ("stochastic", "soft"):
        gates = SDQ(gate=gate, temperature=temperature).gates(beta, level, noise)
        (upper,) = torch.autograd.grad(gates[:, 0].sum(), beta, retain_graph=True)
        (lower,) = torch.autograd.grad(gates[:, 1].sum(), beta)
        assert torch.allclose(upper, by_hand)
        assert torch.allclose(lower, -by_hand)
        values = (c > 0.5).double() if gate == "stochastic" else c
        assert torch.allclose(gates[:, 0], values)


def test_interpolation_is_the_same_code_with_beta_for_a_gate():
    beta = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    gates = SDQ(gate="interpolation").gates(beta, torch.tensor([1, 3]), torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(gates, torch.tensor([[0.2, 0.8], [0.7, 0.3]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(gates[:, 0].sum(), beta)
    assert grad.tolist() == [1, 1]


@pytest.mark.parametrize("gate", ["stochastic", "interpolation", "soft"])
def test_a_row_at_its_lowest_width_has_no_choice_and_no_gradient(gate):
    beta = torch.tensor([0.4, 0.4], dtype=torch.float64, requires_grad=True)
    gates = SDQ(gate=gate).gates(beta, torch.tensor([0, 1]), torch.tensor([-5.0, -5.0], dtype=torch.float64))
    assert gates[0].tolist() == [1, 0]
    (grad,) = torch.autograd.grad((gates * torch.tensor([[3.0, 1.0]])).sum(), beta)
    assert grad[0] == 0
    assert grad[1] != 0


@pytest.mark.parametrize("gate", ["stochastic", "interpolation", "soft"])
def test_the_whole_gradient_of_beta(gate):
    """dL/dbeta = sum_k dL/dw^q_k (Q_up(w_k) - Q_low(w_k)) dc/dbeta, and dL/dw^q at the weight that was drawn."""
    generator = torch.Generator().manual_seed(3)
    weight, target = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    up, low = (LSQWeight(weight, bits)(weight).detach() for bits in (4, 3))
    beta = torch.tensor([0.35], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.9], dtype=torch.float64)
    method = SDQ(gate=gate, temperature=0.7)
    gates = method.gates(beta, torch.tensor([2]), noise)
    held = Gate.at([4, 3], gates.detach()[0].tolist())
    quantized = GatedWeight(held, "lsq", weight, 0)(weight)
    (quantized - target).square().sum().backward()
    gates.backward(held.weights.grad[None].double())
    c = float(torch.sigmoid((math.log(0.35 / 0.65) + noise) / 0.7))
    share = {"stochastic": float(c > 0.5), "soft": c, "interpolation": 0.35}[gate]
    mixed = share * up + (1 - share) * low
    assert torch.allclose(quantized, mixed, atol=1e-6)
    by_gate = float((2 * (mixed - target) * (up - low)).sum())
    chain = 1.0 if gate == "interpolation" else c * (1 - c) / (0.7 * 0.35 * 0.65)
    assert beta.grad.item() == pytest.approx(by_gate * chain, rel=1e-4)


def test_probabilities_by_hand():
    beta = torch.tensor([[1.0, 0.9, 0.6], [1.0, 0.3, 0.9], [1.0, 0.9, 0.9]], dtype=torch.float64)
    found = probabilities(beta, torch.tensor([2, 1, 0]))
    assert torch.allclose(found, torch.tensor([[0.0, 0.4, 0.6], [0.7, 0.3, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64))


# ---- the descent


@pytest.mark.parametrize(
    ("gate", "granularity"),
    [("stochastic", "layer"), ("interpolation", "layer"), ("soft", "layer"), ("stochastic", "block"), ("stochastic", "net")],
)
def test_rows_start_at_the_top_and_step_down_one_at_a_time_when_beta_falls_under_its_threshold(gate, granularity):
    problem, method = problem_of(average=2.0), quick(gate=gate, granularity=granularity, threshold=0.2, beta=0.95)
    decisions = Decisions(problem, granularity)
    torch.manual_seed(0)
    state, told, downs = method.start(problem), None, 0
    assert state.level.tolist() == [len(row.widths) - 1 for row in decisions.rows]
    while not method.done(problem, state):
        beta, level = state.beta.clone(), state.level.clone()
        over = bool((decisions.expected_costs(probabilities(beta, level)) > 1).any())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, _ = method.step(problem, state, told)
        for r, (before, after) in enumerate(zip(level.tolist(), state.level.tolist(), strict=True)):
            moved = float(state.beta[r, before])
            assert 0 < moved <= 1
            assert after == (before - 1 if before > 0 and over and moved < 0.2 else before)
            if after < before:
                downs += 1
                assert float(state.beta[r, after]) == (0.95 if after > 0 else 1.0)
    assert state.step == 52
    assert downs >= 2


def test_weights_are_trained_and_the_problem_is_untouched():
    problem, method = problem_of(), quick(max_steps=5)
    kept = copy.deepcopy(problem.model.state_dict())
    state = method.start(problem)
    before = {k: v.clone() for k, v in state.weights.items()}
    for _ in range(5):
        state, _ = method.step(problem, state, None)
    assert any(not torch.equal(state.weights[f"{name}.weight"], before[f"{name}.weight"]) for name in FREE)
    assert all(torch.equal(v, problem.model.state_dict()[k]) for k, v in kept.items())
    assert not problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())


def test_measured_errors_are_those_of_the_quantizers():
    problem = problem_of(weights=(2, 4), activations=(3, 8, 32))
    state = quick().start(problem)
    decisions = Decisions(problem, "layer")
    for r, row in enumerate(decisions.rows):
        if len(row.widths) == 1:
            continue
        errors = state.errors[r, : len(row.widths)].tolist()
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0
        if row.kind == "w":
            weight = problem.model.get_submodule(row.sites[0]).weight.detach()
            by_hand = [float((LSQWeight(weight, b)(weight).detach() - weight).square().sum() / weight.square().sum()) for b in row.widths]
            assert errors == pytest.approx(by_hand, rel=1e-4)
        else:
            assert errors[-1] == 0  # 32 bits change nothing


# ---- as a search method


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "interpolation"},
        {"gate": "soft"},
        {"qer": "expected"},
        {"qer": "budget"},
        {"granularity": "block"},
        {"granularity": "net"},
        {"final": "round"},
        {"quantizer": "entropy"},
        {"quantizer": "dorefa"},
        {"precision": "bfloat16", "channels_last": True},
    ],
)
def test_the_budget_is_kept_whatever_the_options(options):
    problem = problem_of(average=2.25)
    result = run(problem, quick(max_steps=20, **options))
    assert result.status == "done"
    assert result.steps == 20
    assert problem.feasible(result.policy)
    last = result.history[-1]
    assert last.policy == result.policy
    if options.get("final", "allocate") == "allocate":
        assert not last.repaired
        assert problem.costs(last.proposed)[0] <= problem.budgets[0].limit
    bits = [result.policy[name] for name in FREE]
    if options.get("granularity") == "block" and not last.repaired:
        assert bits[0] == bits[1]
        assert bits[2] == bits[3]
    if options.get("granularity") == "net" and not last.repaired:
        assert len(set(bits)) == 1
    assert result.policy["1"] == result.policy["5"] == Bits(8, 32)


def test_weights_and_activations_together():
    problem = problem_of(weights=(2, 4, 8), activations=(2, 4, 8))
    sites = problem.sites
    limit = BitOps().total(sites, {s.name: Bits(8, 8) if s.name in problem.pins else Bits(4, 4) for s in sites})
    problem = problem_of(weights=(2, 4, 8), activations=(2, 4, 8), limits=[Budget(BitOps(), limit, "bitops<=W4A4")])
    proposals = []
    result = run(problem, quick(), log=proposals.append)
    assert problem.feasible(result.policy)
    assert not result.history[-1].repaired
    assert {f"{name}:{kind}" for name in FREE for kind in "wa"} == set(proposals[-1]["gates"])
    assert all(sum(gate) == pytest.approx(1) for gate in proposals[-1]["gates"].values())
    assert any(result.policy[name].a < 8 for name in FREE)
    assert any(result.policy[name].w < 8 for name in FREE)


def test_two_budgets_are_both_kept():
    sites = problem_of().sites
    four = {s.name: Bits(8, 8) if s.name not in FREE else Bits(4, 4) for s in sites}
    budgets = [Budget(BitOps(), BitOps().total(sites, four), "bitops"), Budget(WeightBits(), 8 * PINNED + 3 * WEIGHTS, "weight_bits")]
    problem = problem_of(weights=(2, 3, 4, 8), activations=(2, 4, 8), limits=budgets)
    result = run(problem, quick())
    assert problem.feasible(result.policy)
    assert len(result.costs) == 2


def test_proposals_say_what_they_expect_to_cost():
    problem, lines = problem_of(), []
    run(problem, quick(), log=lines.append)
    first, last = lines[1], lines[-1]
    assert (first["step"], last["step"]) == (50, 52)
    for line in (first, last):
        by_hand = 8.0 * PINNED
        for name in FREE:
            by_hand += 100 * sum(p * w for p, w in zip(line["gates"][f"{name}:w"], (1, 2, 3, 4, 8), strict=True))
        assert line["expected"] == pytest.approx([by_hand])
        assert {"loss", "stuck_share", "lowest_share"} <= set(line["note"])


def outcome(path):
    """Return all that a search left on disk, but for its times."""
    newest = sorted((path / "checkpoint").glob("search-*.safetensors"))[-1]
    skeleton, tensors = runs.flatten(runs.load_tree(newest)["state"])
    lines = [json.loads(line) for line in (path / "search.jsonl").read_text().splitlines()]
    return skeleton, tensors, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_the_seed_decides_everything(tmp_path):
    for name, seed, noise in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        run(problem_of(seed=seed), quick(max_steps=12), out=tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert a[2] == b[2]
    assert a[2][1]["gates"] != c[2][1]["gates"]


@pytest.mark.parametrize(
    ("options", "activations"),
    [
        ({}, (32,)),
        ({"gate": "soft", "granularity": "block", "quantizer": "entropy", "max_steps": 14}, (4, 8)),
        ({"precision": "bfloat16", "max_steps": 14}, (32,)),
    ],
)
def test_a_search_resumed_at_any_step_ends_bit_for_bit_as_one_that_was_not_stopped(options, activations, tmp_path):
    arguments, last = {"activations": activations}, options.get("max_steps", 52)
    whole = run(problem_of(**arguments), quick(**options), out=tmp_path / "whole")
    for steps in (last // 3, last - 1):
        stopped = run(problem_of(**arguments), quick(**options), out=tmp_path / "pieces", stop=Stop(steps=steps))
        assert (stopped.status, stopped.steps) == ("stopped", steps)
        assert problem_of(**arguments).feasible(stopped.policy)
    pieces = run(problem_of(**arguments), quick(**options), out=tmp_path / "pieces")
    assert pieces.policy == whole.policy
    one, other = outcome(tmp_path / "whole"), outcome(tmp_path / "pieces")
    assert one[0] == other[0]
    assert all(torch.equal(x, y) for x, y in zip(one[1], other[1], strict=True))
    assert one[2] == other[2]


def test_another_option_in_an_old_directory_is_refused(tmp_path):
    run(problem_of(), quick(), out=tmp_path, stop=Stop(steps=3))
    with pytest.raises(RunError, match=r"options.temperature \(was 1.0, now 0.5\)"):
        run(problem_of(), quick(temperature=0.5), out=tmp_path)


# ---- the public suite


@pytest.mark.parametrize("kind", ["linear", "conv", "joint"])
def test_the_contract_and_the_gap_to_the_optimum_of_planted_problems(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = check_method(SDQ(epochs=1000, max_steps=300, batch_size=64), kinds=[kind], limit=0.05)
    assert report.rows[0].gap <= 0.05


# ---- alarms


def test_bits_that_do_not_move_warn():
    with pytest.warns(UserWarning, match=r"sdq: 100% of 4 bit-widths did not move; search longer, or raise speed, or tighten the budget"):
        search(problem_of(), quick(speed=1e-3, final="round"))


def test_bits_that_collapse_warn():
    with pytest.warns(UserWarning, match=r"sdq: 100% of 4 bit-widths fell to the lowest candidate; the budget leaves no choice, or speed"):
        search(problem_of(average=1.0), quick())


def test_a_healthy_search_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(problem_of(average=2.5), quick(max_steps=150, epochs=1000))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": 0.99}, "needs 0 < threshold < beta < 1, got threshold=0.99, beta=0.99; try 0.1 and 0.99"),
        ({"beta": 1.0}, "needs 0 < threshold < beta < 1"),
        ({"threshold": 0.0}, "needs 0 < threshold < beta < 1"),
        ({"epochs": 0}, "must be above 0"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"speed": -1.0}, "must be above 0"),
        ({"lr": 0.0}, "must be above 0"),
        ({"batch_size": 0}, "must be above 0"),
        ({"descent": 1.5}, r"descent in \(0, 1\]"),
        ({"max_steps": 0}, "max_steps"),
        ({"gate": "hard"}, "gate"),
        ({"qer": "none"}, "qer"),
        ({"granularity": "kernel"}, "granularity"),
        ({"final": "argmax"}, "final"),
        ({"quantizer": "pact"}, "quantizer"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_bad_options_are_one_clear_line(options, text):
    with pytest.raises(BitwrightError, match=text) as caught:
        SDQ(**options)
    assert "\n" not in str(caught.value)


def test_bad_options_of_a_recipe_are_one_clear_line():
    method = get_method("sdq")
    assert method is SDQ
    for options, text in (
        ({"gate": "hard"}, r"search.options.gate is 'hard'; expected 'stochastic', 'interpolation' or 'soft'"),
        ({"tau": 1.0}, r"unknown key 'search.options.tau'"),
        ({"epochs": "many"}, r"search.options.epochs is 'many'"),
    ):
        with pytest.raises(RecipeError, match=text) as caught:
            make_options(method, options, "search.options")
        assert "\n" not in str(caught.value)


def test_an_unreachable_budget_fails_before_anything_is_trained():
    with pytest.raises(BudgetError, match="cannot be met"):
        search(problem_of(average=0.5), quick())


def test_choices_that_are_no_product_are_refused():
    problem = problem_of(weights=(2, 4), activations=(4, 8))
    problem.choices["3.fc1"] = (Bits(2, 4), Bits(4, 8))
    with pytest.raises(SiteError, match=r"site '3.fc1' offers 2 of the 4 pairs of its widths; give all pairs"):
        search(problem, quick())


def test_a_search_needs_data():
    problem = problem_of()
    without = Problem(problem.model, problem.trace, problem.choices, problem.budgets, evaluate=lambda _: 1.0)
    with pytest.raises(BitwrightError, match="made without data"):
        search(without, quick())


def test_a_loss_that_is_no_number_says_where_and_which_layer():
    with pytest.raises(TrainingError, match=r"sdq: the loss is (nan|inf) at step \d+.*lower lr") as caught:
        run(problem_of(), quick(lr=1e18))
    assert "layer '" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_decide_is_a_search_too():
    problem = problem_of(weights=(8,), average=8.0)
    result = run(problem, quick(max_steps=3))
    assert {result.policy[name] for name in FREE} == {Bits(8, 32)}
