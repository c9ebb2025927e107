r"""Greedy: one notch at a time, always the one that loses least for what it saves, measured on the quantized network.

From the widest policy, the step of one site (weights or activations, one notch down) with the least

.. math:: \frac{L(\pi \text{ after the step}) - L(\pi)}{\sum_{k:\,c_k > C_k} \min(c_k - c'_k,\; c_k - C_k) \,/\, C_k}

is taken until every budget holds: loss increase over what the step saves of the budgets still exceeded, as shares of their limits
:math:`C_k` and no more than what is missing (the greedy rule for covering problems of Dobson, 1982). Then a *refill*
takes the step up that gains most for what it takes of the room left, while one fits and gains. Last, *exchanges*: one site goes to any
other of its choices, the others follow by the same two rules on the differences measured so far, and the result is kept
if its measured loss is lower.

Measuring every step at every policy costs sites × notches evaluations a round. By default the steps wait in a queue ordered by what
they cost when last measured, and only the one in front is measured anew (the lazy evaluation of Minoux, 1978): as sites get narrower a step
mostly costs more, not less, so a stale figure is a lower bound and the first fresh one in front is the best. Real networks are not
quite so regular: one measurement that came out too high would keep a step back for good. So stale figures fade with age.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.allocation import repair
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RecipeError
from bitwright.notches import Notches, notches
from bitwright.problem import Problem

Floats = NDArray[np.float64]
KINDS = 6
FADING = 0.98
"""What is left of a stale price after each step taken since it was measured."""
TINY = 1e-12
"""Stands for no saving at all: such a step comes after every step that saves."""


@dataclass
class State:
    """Where the search stands.

    ``phase``: descent, refill, exchange or done; ``index``, ``loss``: the policy it stands at; ``found``: the loss of that policy
    with one site at another choice, ``[site, choice]``, nan where it was not measured; ``values``: what each choice of a site added to
    the loss when it was last measured, against the other choices of the site; ``slopes``: the change of the loss by the latest
    measured step of each site and kind, ``[site, kind]``; ``taken``: steps taken so far, and ``stamps``: how many when each of
    the slopes was measured; ``seen``: the policies that were proposed; ``queue``: exchanges still to be tried here.
    """

    phase: str
    index: list[int]
    loss: float
    found: Tensor
    values: Tensor
    slopes: Tensor
    stamps: Tensor
    seen: list[list[int]]
    queue: list[list[int]]
    taken: int = 0

    def __post_init__(self) -> None:
        self.steps: Notches | None = None


@dataclass(frozen=True)
class Greedy(SearchMethod[State]):
    """Options of the greedy search.

    Attributes:
        begin: ``widest`` goes down from the widest policy, ``cheapest`` up from the cheapest.
        lazy: measure a step anew only when it is in front of the queue; otherwise every step at every policy.
        exchanges: exchanges tried, the most promising first, before a policy is taken for the best; 0 tries none.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    begin: Literal["widest", "cheapest"] = "widest"
    lazy: bool = True
    exchanges: int = 32

    def __post_init__(self) -> None:
        if self.begin not in ("widest", "cheapest"):
            raise RecipeError(f"greedy: begin='{self.begin}'; give 'widest' or 'cheapest'")
        if self.exchanges < 0:
            raise RecipeError(f"greedy: exchanges={self.exchanges}; give 0 or more")

    def start(self, problem: Problem) -> State:
        """Return the state before the first evaluation."""
        shape = (len(problem.sites), max(len(allowed) for allowed in problem.choices.values()))
        index = notches(problem).widest if self.begin == "widest" else problem.index(repair(problem.cheapest(), problem))
        unknown = torch.full(shape, math.nan, dtype=torch.float64)
        slopes = torch.full((shape[0], KINDS), math.nan, dtype=torch.float64)
        stamps = torch.zeros_like(slopes, dtype=torch.int64)
        return State("descent", list(index), math.nan, unknown, unknown.clone(), slopes, stamps, [], [])

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Take the steps whose loss is known, until one must be measured; measure it, and propose the policy if it fits."""
        board = _Board(problem, state)
        measured: list[int] | None = None
        if math.isnan(state.loss):
            measured = list(state.index)
            board.place(measured, problem.loss(problem.policy(measured)))
        while measured is None and state.phase != "done":
            measured = self._exchanged(board) if state.phase == "exchange" else self._moved(board)
        if measured is None or not board.fits(measured):
            return state, None
        state.seen.append(measured)
        return state, Proposal(problem.policy(measured))

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether nothing is left to try."""
        return state.phase == "done"

    def _moved(self, board: _Board) -> list[int] | None:
        """Take or measure the step in front; return the policy measured, or None where a step was taken or the phase is over."""
        state = board.state
        if state.phase == "descent" and board.fits(state.index):
            state.phase = "refill"
        steps, prices = board.descent() if state.phase == "descent" else board.refill()
        if not len(steps):
            if state.phase == "descent":
                return self._unstuck(board)
            self._finish(board)
            return None
        known = board.known(steps)
        if not self.lazy and not known.all():
            steps, prices, known = steps[~known], prices[~known], known[~known]
        front = int(np.argmin(prices))
        step = int(steps[front])
        if not known[front]:
            return board.measure(step)
        board.take(step)
        return None

    def _unstuck(self, board: _Board) -> list[int]:
        """Go on from the nearest policy that fits where no step down is left, as may be under several budgets."""
        state, problem = board.state, board.problem
        index = list(problem.index(repair(problem.policy(state.index), problem)))
        board.place(index, problem.loss(problem.policy(index)))
        return index

    def _finish(self, board: _Board) -> None:
        """Go on with exchanges where nothing more fits."""
        wanted = board.state.index != list(board.steps.widest)
        board.state.queue = board.exchanges(self.exchanges) if wanted else []
        board.state.phase = "exchange" if board.state.queue else "done"

    def _exchanged(self, board: _Board) -> list[int] | None:
        """Try the next exchange; return the policy measured."""
        state, problem = board.state, board.problem
        if not state.queue:
            state.phase = "done"
            return None
        index = state.queue.pop(0)
        loss = problem.loss(problem.policy(index))
        if loss < state.loss:
            board.place(index, loss)
            state.phase = "refill"
        return index


class _Board:
    """A problem's steps beside the state: which are open, and what each would cost."""

    def __init__(self, problem: Problem, state: State):
        self.problem, self.state = problem, state
        self.steps = state.steps = state.steps or notches(problem)
        self.limits = np.asarray(problem.limits, dtype=np.int64)
        self.scale = np.maximum(1, np.abs(self.limits)).astype(np.float64)

    # ---- where the search stands

    def fits(self, index: list[int]) -> bool:
        """Say whether a policy keeps every budget."""
        return bool((self._excess(index) <= 0).all())

    def place(self, index: list[int], loss: float) -> None:
        """Go to a policy of known loss."""
        self.state.index, self.state.loss = list(index), loss
        self.state.found.fill_(math.nan)

    def take(self, step: int) -> None:
        """Take a measured step."""
        i, target = int(self.steps.site[step]), int(self.steps.target[step])
        index = list(self.state.index)
        index[i] = target
        self.place(index, float(self.state.found[i, target]))
        self.state.taken += 1

    def measure(self, step: int) -> list[int]:
        """Ask the loss after a step, and return the policy it leads to."""
        state, steps = self.state, self.steps
        i, source, target = int(steps.site[step]), int(steps.source[step]), int(steps.target[step])
        index = list(state.index)
        index[i] = target
        loss = self.problem.loss(self.problem.policy(index))
        change = loss - state.loss
        state.found[i, target] = loss
        state.slopes[i, int(steps.kind[step])] = change
        state.stamps[i, int(steps.kind[step])] = state.taken
        if math.isnan(state.values[i, source]):
            state.values[i, source] = 0.0
        state.values[i, target] = state.values[i, source] + change
        return index

    def known(self, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say of which steps the loss was measured at this policy."""
        found = self.state.found.numpy()
        return np.asarray(~np.isnan(found[self.steps.site[steps], self.steps.target[steps]]))

    # ---- what steps cost

    def descent(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps down that are open, and their prices: loss increase over what they save of the budgets exceeded."""
        steps = self._open(self.state.index, down=True)
        prices = self._down_prices(self.state.index, steps, self._changes(steps))
        age = self.state.taken - self.state.stamps.numpy()[self.steps.site[steps], self.steps.kind[steps]]
        return steps, np.where((prices > 0) & ~self.known(steps), prices * FADING**age, prices)

    def refill(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the steps up that fit and may gain, and their prices: the change of the loss over the room they take."""
        steps = self._fitting(self.state.index)
        changes = self._changes(steps)
        may_gain = ~(self.known(steps) & (changes >= 0))
        steps, changes = steps[may_gain], changes[may_gain]
        return steps, self._up_prices(self.state.index, steps, changes)

    def _changes(self, steps: NDArray[np.int64]) -> Floats:
        """Return the change of the loss by each step: measured here, else when it was last measured, else -inf: look at it first."""
        state, at = self.state, self.steps
        i, source, target = at.site[steps], at.source[steps], at.target[steps]
        values = state.values.numpy()
        changes = state.found.numpy()[i, target] - state.loss
        for stale in (values[i, target] - values[i, source], state.slopes.numpy()[i, at.kind[steps]]):
            changes = np.where(np.isnan(changes), stale, changes)
        return np.where(np.isnan(changes), -np.inf, changes)

    def _open(self, index: list[int], *, down: bool) -> NDArray[np.int64]:
        return np.flatnonzero((np.asarray(index)[self.steps.site] == self.steps.source) & (self.steps.down == down))

    def _fitting(self, index: list[int]) -> NDArray[np.int64]:
        steps = self._open(index, down=False)
        return steps[(self._excess(index)[:, None] + self._added(index, steps) <= 0).all(0)]

    def _added(self, index: list[int], steps: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.steps.added(self.problem, index, steps)

    def _excess(self, index: list[int]) -> NDArray[np.int64]:
        return np.asarray(self.problem.totals(index), dtype=np.int64) - self.limits

    def _down_prices(self, index: list[int], steps: NDArray[np.int64], changes: Floats) -> Floats:
        missing = np.maximum(self._excess(index), 0)[:, None]
        relief = (np.minimum(-self._added(index, steps), missing) / self.scale[:, None]).sum(0)
        # Steps that lose nothing rank by what they save.
        return np.asarray(np.where(changes > 0, changes / np.maximum(relief, TINY), np.minimum(changes, 0) - relief))

    def _up_prices(self, index: list[int], steps: NDArray[np.int64], changes: Floats) -> Floats:
        room = np.maximum(1, -self._excess(index))[:, None]
        taken = (np.maximum(self._added(index, steps), 0) / room).sum(0)
        return np.asarray(changes / np.maximum(taken, TINY))

    # ---- exchanges

    def exchanges(self, count: int) -> list[list[int]]:
        """Return the policies, at most so many, that promise most: one site goes to another choice, and the others follow."""
        values = self._filled_in()
        seen = {tuple(index) for index in [*self.state.seen, self.state.index]}
        promised: dict[tuple[int, ...], float] = {}
        for i, current in enumerate(self.state.index):
            for position in np.unique(self.steps.source[self.steps.site == i]):
                if position != current and count:
                    loss, index = self._followed(values, i, int(position))
                    if self.fits(index) and tuple(index) not in seen:
                        promised[tuple(index)] = min(loss, promised.get(tuple(index), math.inf))
        return [list(index) for index in sorted(promised, key=lambda index: promised[index])[:count]]

    def _filled_in(self) -> Floats:
        """Return the values with those that were never measured extended along the steps by the latest slopes."""
        values, steps = self.state.values.numpy().copy(), self.steps
        slopes = np.nan_to_num(self.state.slopes.numpy())
        values[np.arange(len(values)), self.state.index] = np.nan_to_num(values[np.arange(len(values)), self.state.index])
        for _ in range(values.shape[1]):
            reached = np.isnan(values[steps.site, steps.target]) & ~np.isnan(values[steps.site, steps.source])
            i, source, kind = steps.site[reached], steps.source[reached], steps.kind[reached]
            values[i, steps.target[reached]] = values[i, source] + slopes[i, kind]
        return values

    def _followed(self, values: Floats, i: int, position: int) -> tuple[float, list[int]]:
        """Return where one site's move leads when the others go down until it fits, and then up while something fits and gains."""
        index = list(self.state.index)
        promised = float(values[i, position] - values[i, index[i]])
        index[i] = position
        while True:
            over = not self.fits(index)
            steps = self._open(index, down=True) if over else self._fitting(index)
            steps = steps[self.steps.site[steps] != i]
            site, target = self.steps.site[steps], self.steps.target[steps]
            changes = values[site, target] - values[site, self.steps.source[steps]]
            if not len(steps) or (not over and not (changes < 0).any()):
                return promised, index
            prices = (self._down_prices if over else self._up_prices)(index, steps, changes)
            front = int(np.argmin(prices))
            promised += float(changes[front])
            index[int(site[front])] = int(target[front])
