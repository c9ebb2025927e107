r"""FracBits: fractional bit-widths by linear interpolation (Yang and Jin, AAAI 2021).

*Published.* Every layer has a real-valued width λ; its weights are the mixture of the two neighbouring widths,
:math:`(\lambda - \lfloor\lambda\rfloor)\,Q_{\lceil\lambda\rceil}(w) + (1 - \lambda + \lfloor\lambda\rfloor)\,Q_{\lfloor\lambda\rfloor}(w)`,
and likewise its
inputs; the cost is interpolated between the neighbours in the same way; the loss is the task's plus κ times the distance of
the cost from its target. λ starts half a bit above the target's width. When the widths are fixed, all λ are shifted by one
number, found by bisection, so that their rounded values meet the target.

Differs: λ is moved by Adam instead of the weights' optimizer, the distance counts as a share of the limit, only what exceeds a
budget is penalised, κ follows a planned descent to the budget (`bitwright.supernet.tighten`), and the search ends where the paper
would go on to train at the widths it fixed. Kernel-wise widths are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.driver import Proposal, Trial
from bitwright.errors import RecipeError
from bitwright.problem import Problem
from bitwright.relaxation import Decisions, Granularity, adam, empty
from bitwright.supernet import Supernet, SupernetMethod, SupernetState, tighten

EVERY = 50
"""Steps between two proposals."""
HALVINGS = 40
"""Of the interval in which the shift of all widths is sought."""


@dataclass
class State(SupernetState):
    """``bits``: the fractional width of every row, with Adam's running moments; ``strength`` and ``start_cost`` per budget."""

    bits: Tensor = field(default_factory=empty)
    first: Tensor = field(default_factory=empty)
    second: Tensor = field(default_factory=empty)
    strength: Tensor = field(default_factory=empty)
    start_cost: Tensor = field(default_factory=empty)


@dataclass(frozen=True)
class FracBits(SupernetMethod[State]):
    """Options of FracBits; those of the weights' training are `SupernetMethod`'s.

    Attributes:
        granularity: which sites decide together: ``layer``, ``block`` or ``net``.
        bits_lr: Adam's step of every fractional width, in bits.
        above: how far above the width that just meets the budgets all rows start, in bits.
        descent: share of the search in which the expected cost is planned to reach the budget.
    """

    granularity: Granularity = "layer"
    bits_lr: float = 0.02
    above: float = 0.5
    descent: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known({"granularity": ("layer", "block", "net")})
        if self.bits_lr <= 0 or self.above < 0 or not 0 < self.descent <= 1:
            raise RecipeError("fracbits: bits_lr must be above 0, above at least 0, and descent in (0, 1]")

    def start(self, problem: Problem) -> State:
        """Return every row a little above the common width that meets the budgets, and the network as it is."""
        net = self._net(problem)
        decisions = net.decisions
        common = torch.full((len(decisions.rows),), float(max(row.widths[-1] for row in decisions.rows)), dtype=torch.float64)
        bits = common + shift_to_fit(common, decisions, rounded=False) + self.above
        bits = torch.maximum(torch.minimum(bits, _ends(decisions, -1)), _ends(decisions, 0))
        start = decisions.expected_costs(interpolated(bits, decisions))
        zeros = torch.zeros(2, len(bits), dtype=torch.float64)
        state = State(bits=bits, first=zeros[0].clone(), second=zeros[1].clone(), strength=torch.zeros_like(start), start_cost=start)
        net.attach(state, fresh=True)
        return state

    def _net(self, problem: Problem) -> Supernet:
        return Supernet(self, problem, Decisions(problem, self.granularity), slots=2)

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Train the weights on one batch, and move every fractional width."""
        if state.net is None:
            self._net(problem).attach(state, fresh=False)
        net = state.net
        assert net is not None
        bits = state.bits.clone().requires_grad_()
        probabilities = interpolated(bits, net.decisions)
        upper = neighbours(state.bits, net.decisions)
        places = torch.stack([upper, (upper - 1).clamp_min(0)], 1)
        gates = probabilities.gather(1, places) * torch.stack([torch.ones_like(bits), (upper > 0).to(bits)], 1)
        net.set_gates(gates.detach(), places)
        state.loss = net.train(state.step)
        pull = torch.autograd.grad(gates, bits, net.gate_gradients(), retain_graph=True)[0]
        costs = net.decisions.expected_costs(probabilities)
        pushes = torch.stack([torch.autograd.grad(cost, bits, retain_graph=True)[0] for cost in costs])
        if state.step == 0:  # as strong as the loss is at the start
            state.strength.copy_(pull.norm() / pushes.norm(dim=1).clamp_min(1e-12))
        tighten(state.strength, costs.detach(), state.start_cost, (state.step + 1) / (self.descent * self.steps(problem)))
        state.step += 1
        over = (costs.detach() > 1).to(pushes)
        total = pull + ((state.strength * over)[:, None] * pushes).sum(0)
        moved = state.bits - self.bits_lr * adam(total, state.first, state.second, state.step)
        state.bits = torch.maximum(torch.minimum(moved, _ends(net.decisions, -1)), _ends(net.decisions, 0))
        state.optimizer = net.optimizer.state_dict()
        last = self.done(problem, state)
        return state, self._proposal(net, state, last=last) if last or state.step % EVERY == 0 else None

    def _proposal(self, net: Supernet, state: State, *, last: bool) -> Proposal:
        """Return the rounded widths after the shift that makes them fit."""
        decisions = net.decisions
        fitting = state.bits + shift_to_fit(state.bits, decisions, rounded=True)
        policy = decisions.policy(nearest_candidates(fitting, decisions))
        p = interpolated(state.bits, decisions)
        free = [(decisions.rows[r], p[r]) for r in decisions.free]
        gates = {f"{row.sites[0]}:{row.kind}": own[: len(row.widths)].tolist() for row, own in free}
        expected = decisions.expected_spending(p)
        note = {"loss": state.loss, "strength": float(state.strength.max())} | (self.brevity(net.problem) if last else {})
        return Proposal(policy, expected, gates, note)


def _ends(decisions: Decisions, place: int) -> Tensor:
    return torch.tensor([float(row.widths[place]) for row in decisions.rows], dtype=torch.float64)


def neighbours(bits: Tensor, decisions: Decisions) -> Tensor:
    """Return the candidate just above each fractional width (its own where it is one and the lowest), int64 ``[row]``."""
    return torch.tensor([sum(width < value for width in row.widths[:-1]) for value, row in zip(bits.tolist(), decisions.rows, strict=True)])


def interpolated(bits: Tensor, decisions: Decisions) -> Tensor:
    """Return each row's shares of the two candidates around its fractional width, ``[row, candidate]``, differentiable.

    A width outside its row's candidates counts as the nearest of them.
    """
    upper = neighbours(bits.detach(), decisions)
    lower = (upper - 1).clamp_min(0)
    widths = torch.tensor([[*row.widths, *[row.widths[-1]] * (decisions.widest - len(row.widths))] for row in decisions.rows]).double()
    high, low = widths.gather(1, upper[:, None])[:, 0], widths.gather(1, lower[:, None])[:, 0]
    share = torch.where(high > low, (bits - low) / (high - low).clamp_min(1e-12), torch.ones_like(bits)).clamp(0, 1)
    result = torch.zeros(len(decisions.rows), decisions.widest, dtype=torch.float64)
    return result.scatter(1, upper[:, None], share[:, None]).scatter_add(1, lower[:, None], (1 - share)[:, None])


def nearest_candidates(bits: Tensor, decisions: Decisions) -> list[int]:
    """Return the candidate nearest to each fractional width; of two equally near ones the lower."""
    rows = zip(bits.tolist(), decisions.rows, strict=True)
    return [min(range(len(row.widths)), key=lambda i: (abs(row.widths[i] - value), i)) for value, row in rows]


def shift_to_fit(bits: Tensor, decisions: Decisions, *, rounded: bool) -> float:
    """Return the largest shift of all fractional widths, by bisection, at which every budget is kept.

    Args:
        bits: fractional width of every row.
        decisions: rows, costs and limits.
        rounded: whether the widths are rounded before their cost is taken, or interpolated.
    """

    def fits(shift: float) -> bool:
        if rounded:
            return decisions.problem.feasible(decisions.policy(nearest_candidates(bits + shift, decisions)))
        return bool((decisions.expected_costs(interpolated(bits + shift, decisions)) <= 1).all())

    span = float(_ends(decisions, -1).max())
    low, high = -2 * span, 2 * span
    if fits(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
