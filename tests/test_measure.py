"""Searches of stages and comparisons: a method works on a copy of the network, and one that changed it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import pipeline
from bitwright.compare import compare
from bitwright.errors import RecipeError
from bitwright.job import Job
from bitwright.recipe import load_recipe
from bitwright.runs import load_tree
from comparing import CHEAPEST, recipe_of, without_times

METHODS = f"""{CHEAPEST}
import torch


@dataclass(frozen=True)
class Trains(Cheapest):
    def step(self, problem, state, told):
        problem.model.train()
        problem.model(problem.data.fit.batch(torch.arange(8))[0])
        return super().step(problem, state, told)


@dataclass(frozen=True)
class Freezes(Cheapest):
    def step(self, problem, state, told):
        problem.model.requires_grad_(False)
        return super().step(problem, state, told)


@dataclass(frozen=True)
class Zeroes(Cheapest):
    def start(self, problem):
        problem.model.requires_grad_(False).fc.weight.zero_()
        return super().start(problem)


@dataclass(frozen=True)
class Breaks(Zeroes):
    def step(self, problem, state, told):
        raise OSError("and leaves the network as it is")
"""


def test_a_method_that_changes_the_network_is_refused_and_changes_only_a_copy(
    finished_run: Path, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meddling.py").write_text(METHODS)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = Job.open(load_recipe(tiny, ["search.method=meddling:Zeroes", "search.options={}"]), tmp_path / "run")
    refusal = (
        r"method 'meddling' changed the network: after the search the network's weights or buffers are others and .*; let it work on copy"
    )
    for again in (job, job, Job.load(tmp_path / "run")):  # what it found is not taken for a finished search either
        with pytest.raises(RecipeError, match=refusal):
            pipeline.run_stages(again)
    assert not job.run.finished("search")
    assert not (tmp_path / "run/policy.json").exists()
    assert torch.equal(job.network.state_dict()["fc.weight"], load_tree(finished_run / "float.safetensors")["fc.weight"])


@pytest.mark.parametrize("proxy", [None, {"name": "digits", "images": 200, "adapt": None}])
def test_a_method_that_changes_the_network_is_left_out_and_changes_nothing_for_others(
    proxy: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meddling.py").write_text(METHODS)
    monkeypatch.syspath_prepend(str(tmp_path))
    outside = {
        "meddling:Trains": "modules of the network are in another mode",
        "meddling:Freezes": "other parameters of the network want gradients",
    }
    outside["meddling:Zeroes"] = "the network's weights or buffers are others and other parameters of the network want gradients"
    tables = []
    for methods in (["random"], [*outside, "meddling:Breaks", "random"]):
        recipe = recipe_of(methods=methods, seeds=[0], long=None, options={})
        recipe["search"]["proxy"] = proxy
        for _ in range(2):  # nothing of it is kept: a second call says the same
            (table,) = compare(recipe, tmp_path / f"run{len(tables)}")["tables"]
        tables.append(table)
    alone, beside = tables
    assert without_times(beside["methods"]) == without_times(alone["methods"])
    broke = beside["left_out"].pop("meddling:Breaks")
    assert broke.startswith("seed 0: the search failed: OSError: and leaves the network as it is (")
    assert "meddling.py, line " in broke
    assert list(beside["left_out"]) == list(outside)
    for label, what in outside.items():
        reason = beside["left_out"][label]
        assert reason.startswith("seed 0: method 'meddling' changed the network: after the search ")
        assert what in reason
        assert reason.endswith("; let it work on copy.deepcopy(problem.model)")
