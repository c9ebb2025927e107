"""SDQ: stochastic differentiable quantization (Huang et al., ICML 2022), phase 1: finding the policy.

*Published.* Every layer l and candidate width :math:`b_i` has a differentiable bit-width parameter β. A layer is quantized to
:math:`b_i` with probability β and to the next lower :math:`b_{i-1}` with probability 1-β (fig. 1a), for the layer as a whole;
gradients pass by a Gumbel-softmax estimator (eqs. 4, 5); a quantization-error regularizer (QER) drives the descent.

*Reconstructed.* The form of the QER, the threshold at which a layer steps down, and every schedule are not public. Here the
QER is the expected cost over its budget, weighted (by default) by how little error the step down adds; its strength follows
the descent: it grows while the expected cost is behind a planned line to the budget and shrinks when ahead. The step size of
β is scaled by the same strength, which makes the search independent of the scale of the loss and of the number of steps. The
final policy is read by exact allocation over the gains measured while each β was active, near the widths that β chose.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bitwright.driver import Proposal, Trial
from bitwright.errors import RecipeError
from bitwright.policy import Policy
from bitwright.problem import Problem
from bitwright.relaxation import Decisions, Granularity, empty, logistic, losses_of_gains
from bitwright.supernet import Supernet, SupernetMethod, SupernetState, tighten

CHOICES = {
    "gate": ("stochastic", "interpolation", "soft"),
    "qer": ("descent", "expected", "budget"),
    "granularity": ("layer", "block", "net"),
    "final": ("allocate", "round"),
}
LEAST, MOST = 1e-4, 1 - 1e-4
REFRESH = 50
"""Steps between two measurements of the quantization errors, and between two proposals."""
RATIO = 2.0
"""A gain, over the strength of the regularizer, counts for no more than this: one noisy batch must not undo many."""
MEMORY = 50
"""Steps that the running mean of a β's gradient looks back, at most to its arrival at the width."""
NOISE = 3.0
"""A mean gradient within so many of its standard errors of zero moves β less than the regularizer does."""


@dataclass
class State(SupernetState):
    """All that the search holds; see `SearchMethod`.

    ``beta``, ``errors``: ``[row, candidate]``; ``level``: the candidate that each row steps down from; ``strength``: of the
    regularizer, per budget; ``slope``, ``power``: running means of each β's gradient and of its square over the ``stay``, the
    steps since its row arrived at the width; ``gains``, ``draws``: sum and number of the gains measured, ``[row, candidate,
    lower or upper drawn]``.
    """

    beta: Tensor = field(default_factory=empty)
    level: Tensor = field(default_factory=empty)
    strength: Tensor = field(default_factory=empty)
    errors: Tensor = field(default_factory=empty)
    gains: Tensor = field(default_factory=empty)
    draws: Tensor = field(default_factory=empty)
    slope: Tensor = field(default_factory=empty)
    power: Tensor = field(default_factory=empty)
    stay: Tensor = field(default_factory=empty)
    start_cost: Tensor = field(default_factory=empty)


@dataclass(frozen=True)
class SDQ(SupernetMethod[State]):
    """Options of SDQ's first phase; those of the weights' training are `SupernetMethod`'s.

    Attributes:
        gate: ``stochastic`` draws one of two adjacent widths (SDQ); ``interpolation`` mixes them by β (FracBits, the control
            that the paper argues against); ``soft`` mixes them by a Gumbel-softmax sample.
        qer: the regularizer: ``descent`` weighs a layer's expected cost by the inverse of the relative error that its next step
            down would add; ``expected`` adds the expected error itself to the expected cost; ``budget`` is the expected cost alone.
        qer_weight: of the error in ``expected``, as a share of the strength of the cost.
        granularity: which sites decide together: ``layer``, ``block`` or ``net``.
        beta: start of every β.
        threshold: a row steps down when its β falls under it.
        temperature: of the Gumbel-softmax.
        speed: how fast β moves: 1 would walk from the top to the bottom of its row in the planned part of the search.
        descent: share of the search in which the expected cost is planned to reach the budget.
        final: how the policy is read: ``allocate`` (exact, over measured gains) or ``round`` (β at least one half stays).
    """

    gate: Literal["stochastic", "interpolation", "soft"] = "stochastic"
    qer: Literal["descent", "expected", "budget"] = "descent"
    qer_weight: float = 1.0
    granularity: Granularity = "layer"
    beta: float = 0.99
    threshold: float = 0.1
    temperature: float = 1.0
    speed: float = 1.5
    descent: float = 0.8
    final: Literal["allocate", "round"] = "allocate"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(CHOICES)
        if not 0 < self.threshold < self.beta < 1:
            raise RecipeError(f"sdq: needs 0 < threshold < beta < 1, got threshold={self.threshold}, beta={self.beta}; try 0.1 and 0.99")
        if min(self.temperature, self.speed) <= 0 or not 0 < self.descent <= 1:
            raise RecipeError("sdq: temperature and speed must be above 0, and descent in (0, 1]")

    def start(self, problem: Problem) -> State:
        """Return every row at its widest candidate, and the network as it is."""
        net = self._net(problem)
        decisions = net.decisions
        shape = (len(decisions.rows), decisions.widest)
        level = torch.tensor([len(row.widths) - 1 for row in decisions.rows])
        beta = torch.full(shape, self.beta, dtype=torch.float64)
        beta[:, 0] = 1.0
        gains, draws = torch.zeros(2, *shape, 2, dtype=torch.float64).unbind()
        slope, power, stay = torch.zeros(3, len(level), dtype=torch.float64).unbind()
        state = State(
            beta=beta,
            level=level,
            strength=torch.zeros(len(problem.rows), dtype=torch.float64),
            errors=net.errors(),
            gains=gains.clone(),
            draws=draws.clone(),
            slope=slope.clone(),
            power=power.clone(),
            stay=stay.clone(),
            start_cost=decisions.expected_costs(probabilities(beta, level)),
        )
        net.attach(state, fresh=True)
        return state

    def _net(self, problem: Problem) -> Supernet:
        return Supernet(self, problem, Decisions(problem, self.granularity), slots=2)

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Draw widths, train the weights on one batch, and move every β."""
        if state.net is None:
            self._net(problem).attach(state, fresh=False)
        net = state.net
        assert net is not None
        noise = logistic(len(net.decisions.rows))
        beta = at_level(state.beta, state.level).clamp(LEAST, MOST).requires_grad_()
        gates = self.gates(beta, state.level, noise)
        net.set_gates(gates.detach(), torch.stack([state.level, (state.level - 1).clamp_min(0)], 1))
        state.loss = net.train(state.step)
        grads = net.gate_gradients()
        self._measure(state, gates.detach(), grads)
        gates.backward(grads)  # type: ignore[no-untyped-call]
        assert beta.grad is not None
        self._move(net, state, beta.grad)
        state.step += 1
        state.optimizer = net.optimizer.state_dict()
        if state.step % REFRESH == 0:
            state.errors = net.errors()
        last = self.done(problem, state)
        return state, self._proposal(net, state, last=last) if last or state.step % REFRESH == 0 else None

    def gates(self, beta: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        r"""Return the weights of the upper and lower width of each row, ``[row, 2]``, differentiable in β.

        The soft sample is :math:`c = \sigma((\log\beta - \log(1-\beta) + g)/\tau)` with logistic g; ``stochastic`` takes
        :math:`1[c > 1/2]`, a Bernoulli(β) draw, and the gradient of c. A row at its lowest candidate has the gate (1, 0).
        """
        upper = beta
        if self.gate != "interpolation":
            soft = torch.sigmoid((beta.log() - (-beta).log1p() + noise) / self.temperature)
            hard = (soft > 0.5).to(soft.dtype)
            upper = soft if self.gate == "soft" else hard.detach() + (soft - soft.detach())
        upper = torch.where(level > 0, upper, torch.ones_like(upper))
        return torch.stack([upper, 1 - upper], 1)

    def _measure(self, state: State, gates: Tensor, grads: Tensor) -> None:
        r"""Note what the upper width gained over the lower: :math:`\langle\partial L/\partial w^q, Q_{low}-Q_{up}\rangle`.

        For a quadratic loss the mean of the gain seen at the upper and at the lower width is the exact difference.
        """
        gain = (grads[:, 1] - grads[:, 0])[:, None]
        rows = torch.arange(len(gates))
        for side in (0, 1):
            share = gates[:, 1 - side]
            state.gains[rows, state.level, side] += share * gain[:, 0]
            state.draws[rows, state.level, side] += share

    def _move(self, net: Supernet, state: State, slope: Tensor) -> None:
        """Move every β against the loss and the regularizer; step down where β is under its threshold."""
        decisions = net.decisions
        costs, shares = cost_shares(decisions, state.beta, state.level)
        free = state.level > 0
        state.stay += 1
        window = state.stay.clamp_max(MEMORY)
        state.slope += (slope - state.slope) / window
        state.power += (slope.square() - state.power) / window
        noise = NOISE * (state.power / window).sqrt()
        if state.step == 0:
            typical = (slope.abs() / shares.sum(0).clamp_min(1e-12))[free]
            state.strength.fill_(float(typical.median()) if len(typical) else 1.0)
        behind = tighten(state.strength, costs, state.start_cost, (state.step + 1) / (self.descent * self.steps(net.problem)))
        pressure = torch.maximum((state.strength[:, None] * shares).sum(0), noise).clamp_min(1e-30)
        drift = (1 + behind) * self._weight_of_errors(state) + (state.slope / pressure).clamp(-RATIO, RATIO)
        planned = max(1.0, self.descent * self.steps(net.problem))
        pace = self.speed * self.beta * torch.tensor([len(row.widths) - 1.0 for row in decisions.rows]) / planned
        moved = (at_level(state.beta, state.level) - pace * drift).clamp(LEAST, MOST)
        moved = torch.where(free, moved, 1.0)
        state.beta.scatter_(1, state.level[:, None], moved[:, None])
        # A budget that is kept already asks for nothing more.
        down = free & (moved < self.threshold) & bool((costs > 1).any())
        state.level -= down.to(state.level.dtype)
        for running in (state.slope, state.power, state.stay):
            running[down] = 0.0

    def _weight_of_errors(self, state: State) -> Tensor:
        """Return the regularizer's pull on each row, 1 on average over the rows that can still step down."""
        free = state.level > 0
        if self.qer == "budget" or not bool(free.any()):
            return torch.ones_like(state.beta[:, 0])
        upper, lower = at_level(state.errors, state.level), at_level(state.errors, (state.level - 1).clamp_min(0))
        if self.qer == "expected":
            added = (lower - upper) / (lower - upper)[free].mean().clamp_min(1e-12)
            return 1 - self.qer_weight * added.clamp(0, RATIO) * 0.5
        weight = 1 / (lower / lower[free].mean().clamp_min(1e-12) + 0.1)
        return (weight / weight[free].mean()).clamp_max(RATIO)

    def _proposal(self, net: Supernet, state: State, *, last: bool) -> Proposal:
        """Return the policy that the search stands at."""
        decisions = net.decisions
        index = rounded(state.beta, state.level)
        policy = decisions.policy(index)
        if last and self.final == "allocate":
            policy = allocate_near(decisions, state, index) or policy
        free = [(r, decisions.rows[r]) for r in decisions.free]
        gates = {f"{row.sites[0]}:{row.kind}": self._gate_of(row.widths, state, r) for r, row in free}
        expected = decisions.expected_spending(probabilities(state.beta, state.level))
        note = {"loss": state.loss, "strength": float(state.strength.max()), **alarms(decisions, policy)}
        if last:
            note |= self.brevity(net.problem)
        if last and note["stuck"] + note["collapsed"]:
            warnings.warn(_alarm_text(note, len(decisions.free)), stacklevel=2)
        return Proposal(policy, expected, gates, note)

    def _gate_of(self, widths: tuple[int, ...], state: State, row: int) -> list[float]:
        """Return the distribution of one row over its candidates."""
        return [float(p) for p in probabilities(state.beta, state.level)[row, : len(widths)]]


def at_level(table: Tensor, level: Tensor) -> Tensor:
    """Return ``table[r, level[r]]`` for every row."""
    return table.gather(1, level[:, None])[:, 0]


def probabilities(beta: Tensor, level: Tensor) -> Tensor:
    """Return the distribution over candidates, ``[row, candidate]``: β at the level, 1-β just below."""
    upper = torch.where(level > 0, at_level(beta, level), 1.0)
    result = torch.zeros_like(beta).scatter(1, level[:, None], upper[:, None])
    return result.scatter_add(1, (level - 1).clamp_min(0)[:, None], (1 - upper)[:, None])


def cost_shares(decisions: Decisions, beta: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected costs over their limits ``[budget]``, and what each row adds to them per unit of β ``[budget, row]``."""
    leaf = beta.detach().clone().requires_grad_()
    costs = decisions.expected_costs(probabilities(leaf, level))
    shares = [torch.autograd.grad(cost, leaf, retain_graph=True)[0] for cost in costs]
    return costs.detach(), torch.stack([at_level(share, level) for share in shares])


def rounded(beta: Tensor, level: Tensor) -> list[int]:
    """Return each row's candidate: its level where β is at least one half, else the one below."""
    return [int(i) if i == 0 or b >= 0.5 else int(i) - 1 for i, b in zip(level, at_level(beta, level), strict=True)]


def allocate_near(decisions: Decisions, state: State, index: list[int]) -> Policy | None:
    """Return the feasible policy of least measured loss within one candidate of ``index``; further away if none is there.

    What the budgets still leave is spent on wider candidates, however far: every step up was measured on the way down.
    """
    values = losses_of_gains(state.gains, state.draws, state.errors, decisions)
    places = torch.arange(decisions.widest)[None]
    for reach in range(1, decisions.widest + 1):
        found = decisions.allocate(values, (places - torch.tensor(index)[:, None]).abs() <= reach)
        if found is not None:
            return decisions.allocate(values, places >= torch.tensor(decisions.index(found))[:, None])
    return None


def alarms(decisions: Decisions, policy: Policy) -> dict[str, float]:
    """Return the shares of free rows that never left their widest candidate and that fell to their lowest."""
    chosen = [(row.widths, getattr(policy[row.sites[0]], row.kind)) for row in decisions.rows if len(row.widths) > 1]
    count = max(1, len(chosen))
    stuck = sum(width == widths[-1] for widths, width in chosen) / count
    lowest = sum(width == widths[0] for widths, width in chosen) / count
    return {"stuck_share": stuck, "lowest_share": lowest, "stuck": float(stuck > 0.9), "collapsed": float(lowest > 0.9)}


def _alarm_text(note: dict[str, float], rows: int) -> str:
    if note["stuck"]:
        return f"sdq: {note['stuck_share']:.0%} of {rows} bit-widths did not move; search longer, or raise speed, or tighten the budget"
    fell = f"{note['lowest_share']:.0%} of {rows} bit-widths fell to the lowest candidate"
    return f"sdq: {fell}; the budget leaves no choice, or speed is too high"
