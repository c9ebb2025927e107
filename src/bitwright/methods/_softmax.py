"""What EdMIPS and SEAM share: logits over all widths of every row, moved against the loss and the pressure of the budgets."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from bitwright.driver import Proposal, Trial
from bitwright.errors import RecipeError
from bitwright.policy import Policy
from bitwright.problem import Problem
from bitwright.relaxation import Decisions, Granularity, adam
from bitwright.supernet import Supernet, SupernetMethod, SupernetState, tighten

EVERY = 50
"""Steps between two proposals."""


def empty() -> Tensor:
    """Return no numbers: the field of a state before the search fills it."""
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class SoftmaxState(SupernetState):
    """``alpha``: logits ``[row, candidate]``, with Adam's running moments; ``strength`` and ``start_cost`` per budget."""

    alpha: Tensor = field(default_factory=empty)
    first: Tensor = field(default_factory=empty)
    second: Tensor = field(default_factory=empty)
    strength: Tensor = field(default_factory=empty)
    start_cost: Tensor = field(default_factory=empty)


S = TypeVar("S", bound=SoftmaxState)


@dataclass(frozen=True)
class SoftmaxMethod(SupernetMethod[S]):
    """Options of a search over softmax gates.

    Attributes:
        granularity: which sites decide together: ``layer``, ``block`` or ``net``.
        alpha_lr: Adam's step of every α.
        temperature: of the softmax at the start of the search.
        temperature_end: at its end, reached along an exponential.
        descent: share of the search in which the expected cost is planned to reach the budget.
        final: ``allocate`` solves for the best policy within the budget, ``argmax`` takes each row's most probable width, which
            may break the budget and is then repaired.
    """

    granularity: Granularity = "layer"
    alpha_lr: float = 0.05
    temperature: float = 1.0
    temperature_end: float = 1.0
    descent: float = 0.8
    final: Literal["allocate", "argmax"] = "allocate"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known({"final": ("allocate", "argmax"), "granularity": ("layer", "block", "net")})
        if min(self.alpha_lr, self.temperature, self.temperature_end) <= 0 or not 0 < self.descent <= 1:
            raise RecipeError(f"{self.name}: alpha_lr and temperatures must be above 0, and descent in (0, 1]")

    @abstractmethod
    def gates(self, state: S, probabilities: Tensor) -> Tensor:
        """Return what every row mixes, ``[row, candidate]``, differentiable in the probabilities."""

    @abstractmethod
    def values(self, net: Supernet, state: S, probabilities: Tensor) -> Tensor:
        """Return what the final allocation minimises the sum of, ``[row, candidate]``."""

    def allocated(self, net: Supernet, state: S, probabilities: Tensor) -> Policy | None:
        """Return the policy of least summed value within the budgets, or None if no policy keeps them."""
        return net.decisions.allocate(self.values(net, state, probabilities), probabilities >= 0)

    def net(self, problem: Problem) -> Supernet:
        """Return the super-network of a problem: every row mixes all of its widths."""
        return Supernet(self, problem, Decisions(problem, self.granularity))

    def prepared(self, problem: Problem, state: S) -> S:
        """Fill a state: all widths of a row equally probable, and the network as it is."""
        net = self.net(problem)
        shape = (len(net.decisions.rows), net.decisions.widest)
        state.alpha, state.first, state.second = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        state.start_cost = net.decisions.expected_costs(shares(state.alpha, net.decisions, self.temperature))
        state.strength = torch.zeros_like(state.start_cost)
        net.attach(state, fresh=True)
        return state

    def step(self, problem: Problem, state: S, told: Trial | None) -> tuple[S, Proposal | None]:
        """Train the weights on one batch, and move every α."""
        if state.net is None:
            self.net(problem).attach(state, fresh=False)
        net = state.net
        assert net is not None
        alpha = state.alpha.clone().requires_grad_()
        probabilities = shares(alpha, net.decisions, self._temperature(problem, state))
        gates = self.gates(state, probabilities)
        flipped, places = widest_first(gates, net.decisions)
        net.set_gates(flipped.detach(), places)
        state.loss = net.train(state.step)
        gradients = net.gate_gradients()
        self.observe(net, state, gates.detach(), torch.zeros_like(gradients).scatter(1, places, gradients))
        pull = torch.autograd.grad(flipped, alpha, gradients, retain_graph=True)[0]
        self._move(net, state, alpha, probabilities, pull)
        state.optimizer = net.optimizer.state_dict()
        last = self.done(problem, state)
        return state, self._proposal(net, state, last=last) if last or state.step % EVERY == 0 else None

    def observe(self, net: Supernet, state: S, gates: Tensor, gradients: Tensor) -> None:
        """Take note of a step's gates and of the loss's gradient in them, both ``[row, candidate]``."""

    def note(self, state: S) -> dict[str, float]:
        """Return the numbers that a proposal carries along."""
        return {"loss": state.loss, "strength": float(state.strength.max())}

    def _move(self, net: Supernet, state: S, alpha: Tensor, probabilities: Tensor, pull: Tensor) -> None:
        """Move α against the loss and the pressure of the budgets that are still exceeded: one that is kept asks for nothing."""
        costs = net.decisions.expected_costs(probabilities)
        pushes = torch.stack([torch.autograd.grad(cost, alpha, retain_graph=True)[0] for cost in costs])
        if state.step == 0:  # as strong as the loss is at the start
            state.strength.copy_(pull.norm() / pushes.flatten(1).norm(dim=1).clamp_min(1e-12))
        tighten(state.strength, costs.detach(), state.start_cost, (state.step + 1) / (self.descent * self.steps(net.problem)))
        state.step += 1
        over = (costs.detach() > 1).to(pushes)
        total = pull + ((state.strength * over)[:, None, None] * pushes).sum(0)
        state.alpha -= self.alpha_lr * adam(total, state.first, state.second, state.step)

    def _temperature(self, problem: Problem, state: S) -> float:
        progress = state.step / max(1, self.steps(problem))
        return float(self.temperature ** (1 - progress) * self.temperature_end**progress)

    def _proposal(self, net: Supernet, state: S, *, last: bool) -> Proposal:
        """Return the policy that the search stands at."""
        decisions = net.decisions
        p = shares(state.alpha, decisions, self._temperature(net.problem, state))
        policy: Policy = decisions.policy(p.argmax(1).tolist())
        if last and self.final == "allocate":
            policy = self.allocated(net, state, p) or policy
        free = [(decisions.rows[r], p[r]) for r in decisions.free]
        gates = {f"{row.sites[0]}:{row.kind}": [float(share) for share in own[: len(row.widths)]] for row, own in free}
        expected = decisions.expected_spending(p)
        return Proposal(policy, expected, gates, self.note(state) | (self.brevity(net.problem) if last else {}))


def shares(alpha: Tensor, decisions: Decisions, temperature: float) -> Tensor:
    """Return each row's softmax over its candidates, ``[row, candidate]``; candidates that a row does not have get 0."""
    absent = torch.arange(alpha.shape[1])[None] >= decisions.counts[:, None]
    return (alpha / temperature).masked_fill(absent, float("-inf")).softmax(1)


def widest_first(gates: Tensor, decisions: Decisions) -> tuple[Tensor, Tensor]:
    """Return the gates in the order of the super-network's slots, widest first, and which candidate each slot has.

    Slots that a row does not have point back at its own narrowest candidates again and carry nothing.
    """
    behind = decisions.counts[:, None] - 1 - torch.arange(gates.shape[1])[None]
    places = torch.where(behind >= 0, behind, torch.arange(gates.shape[1])[None])
    return gates.gather(1, places) * (behind >= 0), places
