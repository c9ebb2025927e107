"""When a search stops before its method is done: by steps, by time, or at an accuracy that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitwright.policy import Policy


@dataclass(frozen=True)
class Stop:
    """When to stop before the method is done: after so many steps or seconds, in all, earlier sessions included, or at a goal.

    Attributes:
        steps: most steps.
        seconds: most seconds.
        goal: asked before every step whether what was found is good enough.
    """

    steps: int | None = None
    seconds: float | None = None
    goal: Callable[[], bool] | None = field(default=None, repr=False)

    def reached(self, steps: int, seconds: float) -> bool:
        """Say whether it is time.

        >>> Stop(steps=3).reached(3, 0.0), Stop(seconds=9).reached(3, 0.0), Stop(goal=lambda: True).reached(3, 0.0)
        (True, False, True)
        """
        if (self.steps is not None and steps >= self.steps) or (self.seconds is not None and seconds >= self.seconds):
            return True
        return self.goal is not None and self.goal()


def watch(
    accuracy: Callable[[Policy], float], wanted: float, earlier: Sequence[Mapping[str, Any]] = ()
) -> tuple[Callable[[Mapping[str, Any]], None], Callable[[], bool]]:
    """Return what looks at the lines of a search, and what says whether its best policy is accurate enough.

    A policy is judged when its loss is the lowest so far, so that few are; a search that goes on is judged by what it had found.

    Args:
        accuracy: of the network at a policy, a fraction.
        wanted: the least that is enough.
        earlier: the lines of sessions before.

    >>> look, enough = watch(lambda policy: policy["a"].w / 8, 0.5)
    >>> look({"loss": 1.0, "policy": {"a": [2, 8]}}); enough()
    False
    >>> look({"loss": 0.5, "policy": {"a": [4, 8]}}); enough()
    True
    """
    best, reached = math.inf, False

    def look(line: Mapping[str, Any]) -> None:
        nonlocal best, reached
        loss = line.get("loss")
        if line.get("uniform") or loss is None or not loss < best:
            return
        best, reached = loss, accuracy(Policy(line["policy"])) >= wanted

    found = [line for line in earlier if not line.get("uniform") and line.get("loss") is not None]
    if found:
        look(min(found, key=lambda line: float(line["loss"])))
    return look, lambda: reached
