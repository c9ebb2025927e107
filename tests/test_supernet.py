"""What the differentiable searches share: how long they take, and what they say of a search that is too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.driver import Stop, search
from bitwright.methods.edmips import EdMIPS
from bitwright.methods.fracbits import FracBits
from bitwright.methods.limpq import LIMPQ
from bitwright.methods.sdq import SDQ
from bitwright.methods.seam import SEAM
from bitwright.problem import Problem
from bitwright.supernet import STEPS, SupernetMethod
from bitwright.testing import planted

METHODS = (SDQ, SEAM, EdMIPS, FracBits)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, STEPS),  # 512 images are four steps a pass
        ({"batch_size": 512 * 4}, STEPS),
        ({"batch_size": 2}, 256),  # a pass over enough images is what it was
        ({"batch_size": 2, "max_steps": 200}, 200),
        ({"max_steps": 7}, 7),
        ({"max_steps": 1000}, STEPS),
        ({"epochs": 1}, 4),
        ({"epochs": 0.01}, 1),
        ({"epochs": 100}, 400),
        ({"epochs": 100, "max_steps": 300}, 300),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_small_data_set_is_searched_as_long_as_it_takes_unless_told(method: type[SupernetMethod], options: dict, steps: int) -> None:
    assert method(**options).steps(planted("linear", 0).problem) == steps


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_is_too_short_says_so(method: type[SupernetMethod]) -> None:
    lines: list[dict] = []
    few = r"2 steps are too few to see what a width is worth; leave out epochs and max_steps, or let them give 150 or more"
    with pytest.warns(UserWarning, match=few):
        search(planted("linear", 0).problem, method(max_steps=2, batch_size=16), log=lines.append)
    assert lines[-1]["note"]["short"] == 1.0


def test_a_search_that_is_long_enough_says_nothing() -> None:
    lines: list[dict] = []
    search(planted("linear", 0).problem, SEAM(batch_size=16), log=lines.append)
    assert lines[-1]["step"] == STEPS
    assert all("short" not in line.get("note", {}) for line in lines)


@pytest.mark.parametrize("method", [*METHODS, LIMPQ])
def test_the_calibration_is_spent_once(method: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a search is resumed, which builds the network anew."""
    plant, batch, spent = planted("linear", 0).problem, 16, []
    spend = Problem.spend
    monkeypatch.setattr(Problem, "spend", lambda self, samples, **how: (spent.append((samples, how)), spend(self, samples, **how))[1])

    def fresh() -> Problem:
        return Problem(plant.model, plant.trace, plant.choices, plant.budgets, plant.data, evaluate=lambda policy: 1.0)

    options = method(max_steps=3, batch_size=batch)
    whole = search(fresh(), options).sample_passes
    assert spent.count((256, {})) == 1
    for steps in (0, 1, 2, None):
        result = search(fresh(), options, out=tmp_path, stop=Stop(steps=steps))
    assert result.sample_passes == whole
