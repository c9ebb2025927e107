"""HAQ: what the agent sees, what its answers mean, bit-lowering, learning, fine-tuning inside an episode."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.costs import parse_budget
from bitwright.data import TensorSplit
from bitwright.driver import Stop, search
from bitwright.errors import RecipeError, TrainingError
from bitwright.methods import haq
from bitwright.methods.haq import HAQ, HAQ_EPISODES
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.sites import trace
from bitwright.testing import check_method, planted, table_problem

QUICK = HAQ(episodes=30, warmup=15, hidden=16, updates=2)


class Net(nn.Module):
    """A convolution, a depthwise one of stride 2, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.depthwise(self.stem(x).relu()).relu().mean((2, 3)))


def _problem(activations=(4, 8), pairs=None, budget="bitops<=W3A8"):
    torch.manual_seed(0)
    model = Net().eval()
    images, labels = torch.randn(96, 3, 8, 8), torch.arange(96) % 4
    split = TensorSplit(images, labels, classes=4)
    traced = trace(model, images[:1])
    choices = build_choices(traced, (2, 4, 8), activations, pin_first="free", pin_last="free")
    choices = choices if pairs is None else dict.fromkeys(choices, tuple(Bits(*pair) for pair in pairs))
    data = SearchData(split.subset(torch.arange(64)), split.subset(torch.arange(64, 96)))
    return Problem(model, traced, choices, parse_budget(budget, traced.sites, pins={}), data)


# ---- what the agent sees, and what its answers mean


def test_the_observation_of_every_layer():
    rows = [haq._described(site, k) for k, site in enumerate(_problem().sites)]
    # depthwise, channels in and out, stride, kernel, weights, input positions, place, and room for two more
    assert rows[0] == [0.0, 3.0, 8.0, 1.0, 9.0, 216.0, 64.0, 0.0, 0.0, 0.0]
    assert rows[1] == [1.0, 8.0, 8.0, 2.0, 9.0, 72.0, 64.0, 1.0, 0.0, 0.0]
    assert rows[2] == [0.0, 8.0, 4.0, 1.0, 1.0, 32.0, 1.0, 2.0, 0.0, 0.0]
    features = haq._features(_problem().sites)
    assert (features.min(), features.max()) == (0.0, 1.0)
    assert features[:, 7].tolist() == [0.0, 0.5, 1.0]
    board = haq._Board(_problem())
    weights, activations = (board.observation(haq._Decision(1, operand), 0.25) for operand in (0, 1))
    assert weights[8:].tolist() == [0.25, 1.0]
    assert activations[8:].tolist() == [0.25, 0.0]
    assert torch.equal(weights[:8], features[1, :8])


def test_sites_are_visited_in_order_weights_before_activations():
    decided = [(d.site, d.operand) for d in haq._Board(_problem()).decisions]
    assert decided == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(d.site, d.operand) for d in haq._Board(_problem(activations=(32,))).decisions] == [(0, 0), (1, 0), (2, 0)]
    pinned = table_problem([[1.0], [2.0, 1.0]], [[[1], [1, 2]]], [3])
    assert [(d.site, d.operand) for d in haq._Board(pinned).decisions] == [(1, 0)]


@pytest.mark.parametrize(("action", "width"), [(0.0, 2), (0.33, 2), (0.34, 4), (0.66, 4), (0.67, 8), (1.0, 8)])
def test_an_action_is_cut_into_equal_parts(action, width):
    board = haq._Board(_problem())
    position, share = board.act(haq._Decision(0, 0), board.steps.widest[0], action)
    assert board.choices[0][position] == Bits(width, 8)
    assert share == width / 8


def test_the_activations_on_offer_are_those_of_the_weights_chosen():
    board = haq._Board(_problem(pairs=[(2, 4), (4, 4), (4, 8), (8, 8)]))
    position, _ = board.act(haq._Decision(0, 0), board.steps.widest[0], 0.0)
    assert board.choices[0][position] == Bits(2, 4)
    assert board.choices[0][board.act(haq._Decision(0, 1), position, 1.0)[0]] == Bits(2, 4)
    wide = board.choices[0].index(Bits(4, 8))
    assert board.choices[0][board.act(haq._Decision(0, 1), wide, 0.0)[0]] == Bits(4, 4)


def test_a_finished_policy_is_lowered_from_the_last_site_activations_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    traced = trace(model, torch.zeros(1, 4))
    choices = build_choices(traced, (2, 4), (4, 8), pin_first="free", pin_last="free")

    def lowered(limit):
        problem = Problem(model, traced, choices, parse_budget(f"bitops<={limit}", traced.sites, pins={}), evaluate=lambda policy: 0.0)
        return tuple(problem.policy(haq._Board(problem).lowered((3, 3))).values())

    # 16 MACs a layer: W4A8 costs 512, W4A4 256, W2A4 128.
    assert lowered(1024) == (Bits(4, 8), Bits(4, 8))
    assert lowered(1023) == (Bits(4, 8), Bits(4, 4))
    assert lowered(767) == (Bits(4, 8), Bits(2, 4))
    assert lowered(639) == (Bits(4, 4), Bits(2, 4))
    assert lowered(383) == (Bits(2, 4), Bits(2, 4))


def test_lowering_ends_where_no_notch_is_left():
    # Narrower is dearer in the second budget: the driver finds the nearest policy that fits.
    problem = table_problem([[0.2, 0.1, 0.0]] * 2, [[[1, 3, 10]] * 2, [[9, 3, 4]] * 2], [6, 6])
    assert haq._Board(problem).lowered((1, 0)) == [0, 0]
    assert problem.feasible(search(problem, HAQ(episodes=3, warmup=2, hidden=4)).policy)


# ---- exploration and learning


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.1), (0.9, 0.5), (0.0, 0.3)])
def test_exploration_is_a_truncated_normal(mean, deviation):
    from scipy.stats import kstest, truncnorm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [haq._truncated_normal(mean, deviation) for _ in range(400)]
    assert kstest(drawn, truncnorm(-mean / deviation, (1 - mean) / deviation, mean, deviation).cdf).pvalue > 0.01


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_little_noise_stays_at_the_mean(mean):
    assert haq._truncated_normal(mean, 1e-9) == pytest.approx(mean, abs=1e-6)


def test_the_optimiser_is_adam():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = haq._drawn({"1": (3, 2)}), torch.randn(5, 3)
    twin = [tensor.clone().requires_grad_() for tensor in network.values()]
    moments, reference = haq._moments(network), torch.optim.Adam(twin, lr=0.01)
    for _ in range(5):
        haq._descend(network, moments, haq._linear(haq._trainable(network), "1", x).square().sum(), 0.01)
        reference.zero_grad()
        (x @ twin[0].T + twin[1]).square().sum().backward()
        reference.step()
    for ours, theirs in zip(network.values(), twin, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
        assert not ours.requires_grad


def _played(method, problem, steps):
    """Return the state after some steps, told the losses as the driver would."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state, told = method.start(problem), None
        for k in range(steps):
            torch.manual_seed(k)
            state, proposal = method.step(problem, state, told)
            told = search(problem, haq.HAQ(episodes=1, hidden=2)).history[0]
            told = type(told)(k + 1, proposal.policy, proposal.policy, (), problem.loss(proposal.policy), repaired=False, seconds=0.0)
    return state


def test_the_buffer_is_a_ring_and_every_decision_gets_the_episodes_loss():
    problem = planted("table", 0).problem
    method = HAQ(episodes=99, warmup=99, hidden=4, memory=2)  # room for two episodes of eight decisions
    state = _played(method, problem, 4)
    assert state.stored == 24
    assert len(state.memory["loss"]) == 16
    for part, episode in ((slice(0, 8), 2), (slice(8, 16), 1)):
        assert state.memory["loss"][part].tolist() == [pytest.approx(state.losses[episode])] * 8
    assert state.memory["more"].tolist() == ([1.0] * 7 + [0.0]) * 2
    assert torch.equal(state.memory["next"][:7], state.memory["state"][1:8])


def test_nothing_is_learned_before_the_warmup_ends():
    problem = planted("table", 0).problem
    method = HAQ(episodes=99, warmup=3, hidden=4)
    before, after = _played(method, problem, 3), _played(method, problem, 4)
    assert float(before.moments["actor"]["step.1.weight"]) == 0
    assert math.isnan(before.baseline)
    assert float(after.moments["actor"]["step.1.weight"]) == 8  # one learning step a decision
    assert not torch.equal(before.networks["actor"]["1.weight"], after.networks["actor"]["1.weight"])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_the_slow_copies_follow(tau):
    problem = table_problem([[2.0, 1.0, 0.0]], [[[1, 2, 3]]], [3])
    state = _played(HAQ(episodes=99, warmup=2, hidden=4, tau=tau), problem, 3)  # one decision, so one learning step
    first = _played(HAQ(episodes=99, warmup=2, hidden=4, tau=tau), problem, 1)
    for name in ("actor", "critic"):
        for key, value in state.networks[name].items():
            expected = first.networks[name][key].lerp(value, tau)
            torch.testing.assert_close(state.networks[f"slow_{name}"][key], expected)


def test_the_scale_of_the_loss_does_not_matter():
    values = [[9.0, 1.0, 0.0], [5.0, 0.5, 0.0], [3.0, 2.0, 0.0]]
    terms = [[[1, 2, 3]] * 3]
    small = table_problem(values, terms, [6])
    large = table_problem([[4096 * v for v in column] for column in values], terms, [6])
    policies = [[trial.policy for trial in search(problem, QUICK).history] for problem in (small, large)]
    assert policies[0] == policies[1]


def test_the_agent_learns():
    # Three sites matter and three do not: what 18 units buy depends on who gets them.
    values = [[scale * 4.0**-j for j in range(5)] for scale in (16.0, 8.0, 4.0, 0.02, 0.01, 0.005)]
    problem = table_problem(values, [[[1, 2, 3, 4, 5]] * 6], [18])
    losses = [trial.loss for trial in search(problem, HAQ(episodes=80, warmup=20, hidden=16, updates=4, noise_decay=0.95)).history]
    assert np.mean(losses[60:]) < 0.4 * np.mean(losses[:20])


def test_the_published_number_of_episodes():
    assert HAQ(episodes=HAQ_EPISODES).episodes == 600


# ---- fine-tuning inside an episode


def test_finetuning_counts_its_passes():
    plain, tuned = _problem(), _problem()
    options = {"episodes": 6, "warmup": 2, "hidden": 8}
    first = search(plain, HAQ(**options))
    second = search(tuned, HAQ(**options, finetune_steps=3, finetune_batch=16))
    policies = [[trial.policy for trial in result.history[:3]] for result in (first, second)]
    assert policies[0] == policies[1]  # until the first reward is learned from
    # 3 steps of 16 images, once through the float network, once forward and backward, and a look at 32 images, with 64 for
    # BatchNorm and 64 for step sizes; beside that the losses, which the driver asks for in both searches.
    evaluated = [len({trial.policy for trial in result.history}) for result in (first, second)]
    asked = [result.sample_passes - 6 * (3 * 16 * 4 + 32 + 64 + 64) * (result is second) for result in (first, second)]
    assert all(32 * n <= passes <= (32 + 64 + 64) * n for n, passes in zip(evaluated, asked, strict=True))


def test_finetuning_brings_the_network_back():
    problem = planted("conv", 0).problem
    policy = problem.cheapest()
    method = HAQ(finetune_steps=40, finetune_batch=64, finetune_lr=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = method.start(problem)
        assert method._finetuned_loss(problem, state, policy) < 0.75 * problem.loss(policy)


def test_a_training_that_fails_is_named():
    with pytest.raises(TrainingError, match=r"haq: the loss after 8 steps of fine-tuning is nan; lower finetune_lr"):
        search(_problem(), HAQ(episodes=2, hidden=2, finetune_steps=8, finetune_lr=1e30))


# ---- the contract


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "haq: episodes=0; give 1 or more"),
        ({"warmup": 0}, "haq: warmup=0; give 1 or more"),
        ({"updates": -1}, "haq: updates=-1; give 0 or more"),
        ({"finetune_steps": -1}, "haq: finetune_steps=-1; give 0 or more"),
        ({"discount": 1.5}, "haq: discount=1.5; give a number from 0 to 1"),
        ({"noise": 0.0}, "haq: noise=0.0; give a number above 0"),
        ({"actor_lr": math.inf}, "haq: actor_lr=inf; give a number above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        HAQ(**options)


def test_a_pinned_problem_has_one_answer():
    problem = table_problem([[1.0], [2.0]], [[[1], [1]]], [2])
    assert search(problem, HAQ(episodes=3, hidden=4)).policy == problem.policy((0, 0))


def test_a_stopped_search_returns_the_best_so_far():
    result = search(planted("table", 0).problem, QUICK, stop=Stop(steps=5))
    assert (result.status, result.loss) == ("stopped", min(trial.loss for trial in result.history))


def test_keeps_the_contract():
    # Reinforcement learning need not reach the optimum, and on the table of two budgets it does not.
    check_method(QUICK, limit=0.12)


def test_keeps_the_contract_with_finetuning():
    check_method(HAQ(episodes=8, warmup=3, hidden=8, finetune_steps=2, finetune_batch=8), kinds=("joint",), limit=0.5)
