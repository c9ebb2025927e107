r"""HAQ: a DDPG agent visits the sites one by one and says how many bits each gets (Wang, Liu, Lin, Lin, Han; CVPR 2019).

*Published* (paper, and the settings of its public code). The agent sees ten numbers of a layer, answers with a number in [0, 1], and
that is cut into as many equal parts as there are widths: first for the weights of a layer, then for its input activations. A finished
policy that breaks the budget is lowered, one notch a layer in turn, until it holds. Every decision of an episode then gets the
same reward R, the change of accuracy; actor μ and critic Q are two fully connected networks that learn by deep deterministic policy
gradients (Lillicrap et al., 2016) from a replay buffer, with a moving average B of the rewards as baseline, and slow copies Q', μ':

.. math:: \min_Q \big(Q(s_k, a_k) - (R - B) - \gamma\, Q'(s_{k+1}, \mu'(s_{k+1}))\big)^2, \qquad \max_\mu Q(s_k, \mu(s_k)).

Exploration is a normal distribution around μ, truncated to [0, 1], whose width shrinks by a factor per episode, after
``warmup`` episodes of uniform actions.

Differs: the reward is the problem's loss, in units of its standard deviation over the warm-up, so that no scale has to be chosen. The
paper's short fine-tuning inside an episode is off by default, and trains towards the float network's outputs instead of labels.
The stride of a layer is read from its numbers of positions. A site without weights (a product of activations) has one decision. Pinned
sites are left out. ``episodes`` is smaller by default than the published `HAQ_EPISODES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adam import adam

from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RecipeError, TrainingError
from bitwright.notches import Notches, notches
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.quant import quantize
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.reference import ReferenceLoss, divergence

if TYPE_CHECKING:
    from bitwright.sites import Site

HAQ_EPISODES = 600
"""Episodes of the published search: the default of ``--train_episode`` in the authors' code (mit-han-lab/haq, rl_quantize.py)."""
FEATURES = 10
LAST, KIND = 8, 9
"""Where an observation holds the latest width chosen, as a share of the widest, and whether weights (1) or activations (0) are next."""
WEIGHT_DECAY, MOMENTUM = 4e-5, 0.9
"""Of the fine-tuning inside an episode, as in the authors' code."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's (Kingma and Ba, 2015)."""
BASELINE = 0.5
"""How far the baseline moves to the mean reward of each batch, as in the authors' code."""

Network = dict[str, Tensor]


@dataclass(frozen=True)
class _Decision:
    """The width of one operand (0 weights, 1 activations) of one site."""

    site: int
    operand: int


@dataclass
class State:
    """All that the search holds; see `SearchMethod`.

    ``networks``: actor, critic and their slow copies; ``moments``: Adam's of actor and critic; ``memory``: the replay buffer, a ring
    of transitions, of which ``stored`` were ever written; ``losses``: of the warm-up's episodes; ``pending``: the transitions of the
    episode whose loss is still to be told.
    """

    episode: int
    networks: dict[str, Network]
    moments: dict[str, Network]
    memory: dict[str, Tensor]
    stored: int
    losses: list[float]
    pending: dict[str, Tensor]
    baseline: float = math.nan
    tuned: float = math.nan

    def __post_init__(self) -> None:
        self.board: _Board | None = None
        self.judge: ReferenceLoss | None = None


@dataclass(frozen=True)
class HAQ(SearchMethod[State]):
    """Options of HAQ; the defaults are those of the authors' code, but for the number of episodes.

    Attributes:
        episodes: policies tried; the published search has 600, which small networks do not need.
        warmup: episodes of uniform actions before the networks learn and act.
        hidden: units of the two hidden layers of actor and critic.
        actor_lr: learning rate of the actor.
        critic_lr: learning rate of the critic.
        batch_size: transitions a learning step.
        memory: transitions that the replay buffer holds, for each site.
        updates: learning steps for each decision of an episode; networks of few sites need more.
        discount: weight of what follows a decision; 1 gives all decisions of an episode the same share.
        tau: how far the slow copies follow at each learning step.
        noise: standard deviation of the exploration at the end of the warm-up.
        noise_decay: factor of it per episode.
        finetune_steps: steps of training before an episode's policy is judged (the paper trains for an epoch: 79 such steps); 0
            judges by the problem's loss. The search's winner is in any case the policy of least loss without this training.
        finetune_batch: images of such a step.
        finetune_lr: learning rate of such a step.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    episodes: int = 200
    warmup: int = 20
    hidden: int = 300
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    batch_size: int = 64
    memory: int = 128
    updates: int = 1
    discount: float = 1.0
    tau: float = 0.01
    noise: float = 0.5
    noise_decay: float = 0.99
    finetune_steps: int = 0
    finetune_batch: int = 256
    finetune_lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("episodes", "warmup", "hidden", "batch_size", "memory", "finetune_batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"haq: {name}={getattr(self, name)}; give 1 or more")
        for name in ("updates", "finetune_steps"):
            if getattr(self, name) < 0:
                raise RecipeError(f"haq: {name}={getattr(self, name)}; give 0 or more")
        for name in ("discount", "tau", "noise_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"haq: {name}={getattr(self, name)}; give a number from 0 to 1")
        for name in ("actor_lr", "critic_lr", "noise", "finetune_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"haq: {name}={getattr(self, name)}; give a number above 0")

    def start(self, problem: Problem) -> State:
        """Return the state before the first episode: networks drawn at random, an empty buffer."""
        actor = _drawn({"1": (FEATURES, self.hidden), "2": (self.hidden, self.hidden), "3": (self.hidden, 1)})
        critic = _drawn({"s": (FEATURES, self.hidden), "a": (1, self.hidden), "2": (self.hidden, self.hidden), "3": (self.hidden, 1)})
        networks = {"actor": actor, "critic": critic, "slow_actor": _copy(actor), "slow_critic": _copy(critic)}
        room = self.memory * len(problem.sites)
        memory = {"state": torch.zeros(room, FEATURES), "next": torch.zeros(room, FEATURES)}
        memory |= {name: torch.zeros(room) for name in ("action", "loss", "more")}
        return State(0, networks, {"actor": _moments(actor), "critic": _moments(critic)}, memory, 0, [], {})

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Learn from the episode before, and play one."""
        if told is not None and state.pending:
            self._remember(state, state.tuned if self.finetune_steps else told.loss)
            for _ in range(self.updates * len(state.pending["action"]) if state.episode >= self.warmup else 0):
                self._learn(state)
        board = state.board = state.board or _Board(problem)
        noise = self.noise * self.noise_decay ** max(0, state.episode - self.warmup)
        index, state.pending = self._episode(board, state, noise)
        policy = problem.policy(board.lowered(index))
        state.episode += 1
        if self.finetune_steps:
            state.tuned = self._finetuned_loss(problem, state, policy)
        return state, Proposal(policy, note={"noise": noise})

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether all episodes were played."""
        return state.episode >= self.episodes

    # ---- an episode

    def _episode(self, board: _Board, state: State, noise: float) -> tuple[list[int], dict[str, Tensor]]:
        """Let the agent decide site by site; return the choices and the transitions, whose loss is not known yet."""
        index, last = list(board.steps.widest), 1.0
        seen, actions = [], []
        for decision in board.decisions:
            observed = board.observation(decision, last)
            action = self._action(state, observed, noise)
            index[decision.site], last = board.act(decision, index[decision.site], action)
            seen.append(observed)
            actions.append(action)
        if not seen:
            return index, {}
        states = torch.stack(seen)
        more = torch.ones(len(actions))
        more[-1] = 0.0
        return index, {"state": states, "next": torch.cat([states[1:], states[-1:]]), "action": torch.tensor(actions), "more": more}

    def _action(self, state: State, observed: Tensor, noise: float) -> float:
        if state.episode < self.warmup:
            return float(torch.rand(()))
        with torch.no_grad():
            mean = float(_act(state.networks["actor"], observed[None]))
        return _truncated_normal(mean, noise)

    # ---- learning

    def _remember(self, state: State, loss: float) -> None:
        """Write the episode's transitions into the ring."""
        if len(state.losses) < self.warmup:
            state.losses.append(loss)
        count, room = len(state.pending["action"]), len(state.memory["action"])
        places = (state.stored + torch.arange(count)) % room
        for name, values in (state.pending | {"loss": torch.full((count,), loss)}).items():
            state.memory[name][places] = values.to(torch.float32)
        state.stored += count

    def _learn(self, state: State) -> None:
        """Take one step of critic and actor on a batch from the buffer, and let the slow copies follow."""
        nets, drawn = state.networks, torch.randint(min(state.stored, len(state.memory["action"])), (self.batch_size,))
        s, s2, a, more = (state.memory[name][drawn] for name in ("state", "next", "action", "more"))
        rewards = -state.memory["loss"][drawn] / _spread(state.losses)
        mean = float(rewards.mean())
        state.baseline = mean if math.isnan(state.baseline) else state.baseline + BASELINE * (mean - state.baseline)
        with torch.no_grad():
            after = _judge(nets["slow_critic"], s2, _act(nets["slow_actor"], s2))
            target = rewards - state.baseline + self.discount * more * after
        loss = functional.mse_loss(_judge(_trainable(nets["critic"]), s, a), target)
        _descend(nets["critic"], state.moments["critic"], loss, self.critic_lr)
        loss = -_judge(nets["critic"], s, _act(_trainable(nets["actor"]), s)).mean()
        _descend(nets["actor"], state.moments["actor"], loss, self.actor_lr)
        for name in ("actor", "critic"):
            for key, value in nets[name].items():
                nets[f"slow_{name}"][key].lerp_(value, self.tau)

    def _finetuned_loss(self, problem: Problem, state: State, policy: Policy) -> float:
        """Return the divergence of the policy's network from the float one after a short training towards its outputs."""
        if state.judge is None:
            state.judge = ReferenceLoss(problem.model, problem.data.selection, problem.data.fit, problem.sites, problem.seed)
        judge, fit = state.judge, problem.data.fit
        options: dict[str, Any] = {"correct": ("batchnorm",), "float_statistics": judge.statistics, "sites": problem.sites}
        network = quantize(judge.model, policy, calibration=judge.calibration, **options).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=self.finetune_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        for _ in range(self.finetune_steps):
            images, _ = fit.batch(torch.randint(len(fit), (self.finetune_batch,)), generator)
            with torch.no_grad():
                wanted = judge.model(images)
            optimizer.zero_grad()
            divergence(wanted, network(images)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        problem.spend(self.finetune_steps * self.finetune_batch)
        problem.spend(self.finetune_steps * self.finetune_batch, backward=True)
        observed = len(judge.calibration) * any(bits.a < UNTOUCHED for bits in policy.values())
        problem.spend(len(judge.images) + len(judge.calibration) + observed)
        with torch.no_grad():
            loss = float(divergence(judge.outputs, network.eval()(judge.images)))
        if not math.isfinite(loss):
            raise TrainingError(f"haq: the loss after {self.finetune_steps} steps of fine-tuning is {loss}; lower finetune_lr")
        return loss


# ---- the problem as the agent sees it


class _Board:
    """The decisions of an episode, what is seen before each, and what an answer means."""

    def __init__(self, problem: Problem):
        self.problem, self.steps = problem, notches(problem)
        names = list(problem.choices)
        self.allowed = [_positions(self.steps, i) for i in range(len(names))]
        self.choices: list[tuple[Bits, ...]] = [problem.choices[name] for name in names]
        self.decisions = [_Decision(i, operand) for i in range(len(names)) for operand in (0, 1) if len(self._widths(i, operand)) > 1]
        self.features = _features(problem.sites)

    def _widths(self, site: int, operand: int) -> set[int]:
        return {self.choices[site][j][operand] for j in self.allowed[site]}

    def observation(self, decision: _Decision, last: float) -> Tensor:
        """Return the ten numbers that the agent sees."""
        observed = self.features[decision.site].clone()
        observed[LAST], observed[KIND] = last, float(decision.operand == 0)
        return observed

    def act(self, decision: _Decision, position: int, action: float) -> tuple[int, float]:
        """Return the choice that an action in [0, 1] leads to, and its width as a share of the widest."""
        choices, allowed = self.choices[decision.site], self.allowed[decision.site]
        if decision.operand == 1 and any(choices[j].w != choices[position].w for j in allowed):
            allowed = [j for j in allowed if choices[j].w == choices[position].w]
        widths = sorted({choices[j][decision.operand] for j in allowed})
        width = widths[min(int(action * len(widths)), len(widths) - 1)]
        chosen = max((j for j in allowed if choices[j][decision.operand] == width), key=lambda j: choices[j])
        return chosen, width / max(bits[decision.operand] for bits in choices)

    def lowered(self, index: Sequence[int]) -> list[int]:
        """Lower one notch a site in turn, from the last to the first and activations before weights, until every budget holds."""
        index, moved = list(index), True
        while moved and not self._fits(index):
            moved = False
            for i in reversed(range(len(index))):
                for kind in (1, 0, 2):
                    at = (self.steps.site == i) & (self.steps.source == index[i]) & self.steps.down & (self.steps.kind == kind)
                    if at.any() and not self._fits(index):
                        index[i], moved = int(self.steps.target[np.argmax(at)]), True
        return index

    def _fits(self, index: Sequence[int]) -> bool:
        return self.problem.feasible(self.problem.policy(index))


def _positions(steps: Notches, site: int) -> list[int]:
    return sorted({int(j) for j in steps.source[steps.site == site]} | {steps.widest[site]})


def _features(sites: Sequence[Site]) -> Tensor:
    """Return the static observation of every site, each column scaled to [0, 1]: ``[site, feature]``.

    Whether it is depthwise, its input and output channels, stride, kernel size, weights, input positions and its place in the network.
    """
    rows = torch.tensor([_described(site, k) for k, site in enumerate(sites)], dtype=torch.float64)
    low, high = rows.amin(0), rows.amax(0)
    return ((rows - low) / torch.where(high > low, high - low, 1.0)).to(torch.float32)


def _described(site: Site, place: int) -> list[float]:
    outputs = sum(channels for _, channels in site.tensors)
    fan_in = site.weights / max(1, outputs)
    kernel = math.prod(site.weight_shape[2:])
    inputs = fan_in * site.groups / kernel
    positions, produced = site.acts / max(1.0, inputs), site.macs / max(1, site.weights)
    stride = (positions / max(1.0, produced)) ** (1 / max(1, len(site.weight_shape) - 2)) if site.weights else 0.0
    depthwise = float(site.groups > 1 and site.groups == inputs)
    return [depthwise, inputs, float(outputs), stride, float(kernel), float(site.weights), positions, float(place), 0.0, 0.0]


# ---- networks and their optimiser, as plain tensors


def _drawn(layers: dict[str, tuple[int, int]]) -> Network:
    network: Network = {}
    for name, (inputs, outputs) in layers.items():
        layer = nn.Linear(inputs, outputs)
        network[f"{name}.weight"], network[f"{name}.bias"] = layer.weight.detach(), layer.bias.detach()
    return network


def _copy(network: Network) -> Network:
    return {name: tensor.clone() for name, tensor in network.items()}


def _moments(network: Network) -> Network:
    zeros = {f"{kind}.{name}": torch.zeros_like(tensor) for kind in ("first", "second") for name, tensor in network.items()}
    return zeros | {f"step.{name}": torch.tensor(0.0) for name in network}


def _linear(network: Network, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, network[f"{name}.weight"], network[f"{name}.bias"])


def _act(actor: Network, states: Tensor) -> Tensor:
    """Return the action of every state, ``[n]`` in [0, 1]."""
    x = _linear(actor, "2", _linear(actor, "1", states).relu()).relu()
    return _linear(actor, "3", x).sigmoid()[:, 0]


def _judge(critic: Network, states: Tensor, actions: Tensor) -> Tensor:
    """Return what the critic expects of every state and action, ``[n]``."""
    x = (_linear(critic, "s", states) + _linear(critic, "a", actions[:, None])).relu()
    return _linear(critic, "3", _linear(critic, "2", x).relu())[:, 0]


def _trainable(network: Network) -> Network:
    for tensor in network.values():
        tensor.requires_grad_()
    return network


def _descend(network: Network, moments: Network, loss: Tensor, lr: float) -> None:
    """Take a step of Adam down the loss; the network's tensors change in place and want no gradient afterwards."""
    gradients = list(torch.autograd.grad(loss, list(network.values())))
    for tensor in network.values():
        tensor.requires_grad_(False)
    first, second, step = ([moments[f"{kind}.{name}"] for name in network] for kind in ("first", "second", "step"))
    rates: dict[str, Any] = {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON, "weight_decay": 0.0}
    adam(list(network.values()), gradients, first, second, [], step, amsgrad=False, maximize=False, **rates)


def _spread(losses: Sequence[float]) -> float:
    """Return the standard deviation of the losses, 1 where they are all equal.

    >>> _spread([3.0, 3.0]), _spread([1.0, 3.0])
    (1.0, 1.0)
    """
    return float(np.std(losses)) or 1.0


def _truncated_normal(mean: float, deviation: float) -> float:
    """Draw from a normal distribution truncated to [0, 1], by inverting its distribution function."""
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(deviation, dtype=torch.float64))
    low, high = normal.cdf(torch.tensor(0.0)), normal.cdf(torch.tensor(1.0))  # type: ignore[no-untyped-call]
    drawn = normal.icdf(low + (high - low) * torch.rand((), dtype=torch.float64))  # type: ignore[no-untyped-call]
    return float(drawn.clamp(0.0, 1.0).nan_to_num(mean))
