"""A small comparison of two stages, and what of its results may be compared."""

from __future__ import annotations

import copy
from typing import Any

from conftest import TINY

SHORT = {"epochs": 1, "max_steps": 4, "checkpoint_seconds": 0.0}
LONG = {"epochs": 1, "max_steps": 8, "checkpoint_seconds": 0.0}
COMPARE = {
    "methods": ["fisher", "random", "other=random"],
    "seeds": [0, 1],
    "options": {"fisher": {"samples": 128}, "other": {"within": 0.3}},
    "short": SHORT,
    "long": LONG,
    "best": 1,
}


def recipe_of(**changes: Any) -> dict[str, Any]:
    """Return the tiny recipe with a comparison in it."""
    return {**copy.deepcopy(TINY), "compare": {**COMPARE, **changes}}


def without_times(content: Any) -> Any:
    """Return content without what differs from one machine's hour to another's."""
    if isinstance(content, dict):
        times = ("seconds", "search_seconds", "made_by", "run", "manifest")
        return {key: without_times(value) for key, value in content.items() if key not in times}
    return [without_times(item) for item in content] if isinstance(content, list) else content


CHEAPEST = '''
from dataclasses import dataclass
from typing import ClassVar

from bitwright.driver import Proposal, SearchMethod


@dataclass
class State:
    steps: int = 0


@dataclass(frozen=True)
class Cheapest(SearchMethod[State]):
    """Proposes the narrowest widths."""

    ranking: ClassVar[str] = "last"

    def start(self, problem):
        return State()

    def step(self, problem, state, told):
        return State(1), Proposal(problem.cheapest())

    def done(self, problem, state):
        return state.steps > 0
'''
"""A file of a method from outside the package, for others to derive from."""
