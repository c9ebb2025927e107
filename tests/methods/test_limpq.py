"""LIMPQ: which passes make a step, what is read from the step sizes, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitwright.costs import Budget, WeightBits
from bitwright.driver import search
from bitwright.errors import RecipeError, SiteError, TrainingError
from bitwright.methods import limpq
from bitwright.methods.limpq import LIMPQ, State
from bitwright.policy import Bits
from bitwright.problem import Problem, build_choices
from bitwright.quant.modules import named_quant_layers
from bitwright.sensitivity import FILE, Sensitivity
from bitwright.sites import trace
from bitwright.testing import check_method, planted


def engine_of(problem, **options):
    return limpq._Engine(LIMPQ(max_steps=2, batch_size=32, **options), problem)


def test_a_step_passes_every_width_and_one_random_policy_and_updates_once(monkeypatch):
    problem = planted("joint", seed=0).problem
    engine = engine_of(problem)
    policies, updates = [], []

    def backward(step, x, y):
        next(engine.network.parameters()).grad = torch.zeros_like(next(engine.network.parameters()))
        policies.append({name: (int(gates.weights.widths[0]), int(gates.inputs.widths[0])) for name, gates in engine.gates.items()})

    monkeypatch.setattr(engine, "_backward", backward)
    monkeypatch.setattr(engine.optimizer, "step", lambda: updates.append(1))
    for step in (0, 1):
        engine.train(step)
    assert len(updates) == 2
    first, second = policies[:4], policies[4:]
    for width, policy in zip((2, 4, 8), first, strict=False):
        assert all(w == width and a == max(4, width) for w, a in policy.values())
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    assert all(Bits(*pair) in problem.choices[name] for policy in policies for name, pair in policy.items())


def test_gradients_of_all_passes_reach_the_step_sizes_of_all_widths():
    problem = planted("joint", seed=0).problem
    engine = engine_of(problem)
    before = {name: layer.weight_quantizer.scale.detach().clone() for name, layer in named_quant_layers(engine.network)}
    engine.train(0)
    for name, layer in named_quant_layers(engine.network):
        moved = (layer.weight_quantizer.scale.detach() != before[name]).any(1)
        assert moved[[1, 3, 7]].all()  # the widths 2, 4 and 8
        assert not moved[[0, 2, 4, 5, 6]].any()
    assert problem.sample_passes == 4 * 32 * 3


def test_importance_is_the_mean_step_of_the_weights_times_alpha_plus_that_of_the_inputs():
    problem = planted("joint", seed=0).problem
    engine = engine_of(problem, alpha=3.0)
    scores = engine.importance()
    for name, layer in named_quant_layers(engine.network):
        for score, bits in zip(scores[name].tolist(), problem.choices[name], strict=True):
            by_weight = float(layer.weight_quantizer.scale[bits.w - 1].detach().double().mean())
            by_input = float(layer.input_quantizer.scale[bits.a - 1].detach().double())
            assert score == pytest.approx(3.0 * by_weight + by_input, rel=1e-6)


def test_a_narrower_width_counts_no_less_than_a_wider_one():
    scale = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.05])
    found = limpq._indicators(scale, [2, 3, 3, 8, 32, 1])
    assert found.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.05, 0.0, 0.5])
    assert limpq._indicators(scale, [4, 4]).tolist() == [0.0, 0.0]  # one width: nothing to compare
    assert limpq._indicators(None, [4, 32]).tolist() == [0.0, 0.0]
    by_channel = torch.stack([scale, -3 * scale], 1)
    assert limpq._indicators(by_channel, [1, 8]).tolist() == pytest.approx([1.0, 0.1])


def test_scores_outside_a_search_are_those_of_the_search_and_leave_the_generator_alone():
    problem = planted("linear", seed=0).problem
    method = LIMPQ(max_steps=3, batch_size=64)
    before = torch.get_rng_state()
    scores = method.scores(problem)
    assert torch.equal(torch.get_rng_state(), before)
    result = search(problem, method)
    assert result.steps == 3
    assert len(result.history) == 1
    state = State()
    for _ in range(3):
        state, proposal = method.step(problem, state, None)
    assert all(torch.equal(state.scores[name], score) for name, score in scores.items())
    assert proposal.policy == result.policy
    assert state.weights == {}


def test_the_table_of_a_search_says_what_measuring_took(tmp_path):
    problem = planted("joint", seed=0).problem
    method = LIMPQ(max_steps=2, batch_size=32)
    search(problem, method, out=tmp_path)
    assert Sensitivity.load(tmp_path / FILE).sample_passes == 256 + 2 * 4 * 32 * 3
    assert method.sensitivity(planted("joint", seed=0).problem).sample_passes == 256 + 2 * 4 * 32 * 3


def test_pinned_sites_score_nothing_and_a_problem_of_pins_is_solved():
    problem = planted("conv", seed=0).problem
    scores = LIMPQ(max_steps=1, batch_size=16).scores(problem)
    assert scores["stem"].tolist() == [0.0]
    ample = Budget(WeightBits(), 10**9, "weight_bits<=32")
    pinned = Problem(problem.model, problem.trace, {name: (Bits(8, 32),) for name in problem.choices}, ample, problem.data)
    assert search(pinned, LIMPQ()).policy["stem"] == Bits(8, 32)
    assert all(score.tolist() == [0.0] for score in LIMPQ().scores(pinned).values())


def test_no_feasible_policy_has_a_smaller_sum_than_the_one_proposed():
    problem = planted("linear", seed=0).problem
    method = LIMPQ(max_steps=4, batch_size=64)
    scores = method.scores(problem)
    policy = search(problem, method).policy
    total = sum(float(scores[name][j]) for name, j in zip(problem.choices, problem.index(policy), strict=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        index = [int(torch.randint(len(allowed), (), generator=generator)) for allowed in problem.choices.values()]
        if problem.feasible(problem.policy(index)):
            assert total <= sum(float(scores[name][j]) for name, j in zip(problem.choices, index, strict=True)) + 1e-9


def test_keeps_the_contract():
    """Not near the optimum: where sensitivity is not in the weights' spread, step sizes do not see it (see the method's page)."""
    check_method(LIMPQ(max_steps=2, batch_size=16), kinds=("conv", "joint"), limit=math.inf)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_options_and_networks_that_do_not_fit():
    for options, message in (({"max_steps": 0}, "limpq: max_steps=0; give at least 1"), ({"lr": 0}, "lr and batch_size must be above 0")):
        with pytest.raises(RecipeError, match=message):
            LIMPQ(**options)
    net, problem = Functional(), planted("linear", seed=0).problem
    traced = trace(net, torch.zeros(1, 4))
    choices = build_choices(traced, (2, 4), pin_first="free", pin_last="free")
    with pytest.raises(SiteError, match="limpq: site 'weight' is the functional call '#0', which learns no step size of its own"):
        LIMPQ().scores(Problem(net, traced, choices, [], problem.data))
    with torch.no_grad():
        problem.model.gains.fill_(math.inf)
    with pytest.raises(TrainingError, match="limpq: the loss is nan at step 0, first seen in"):
        LIMPQ(max_steps=1).scores(problem)
