"""Image quality in the report: the table, the grid of many conditions, and the chart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.data import TensorSplit
from bitwright.report.facts import read_facts
from bitwright.report.quality import condition_rows, grid_rows, quality
from bitwright.robustness import measure
from pages import checked


class Guess(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((len(x),), 0.1), x.flatten(1).std(1)], 1)


def record(conditions: str) -> dict[str, Any]:
    pixels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return measure(Guess(), TensorSplit(pixels, torch.ones(20, dtype=torch.long), classes=2), conditions).to_dict()


def shown(finished_run: Path, conditions: str) -> str:
    facts = read_facts(finished_run)
    evaluation = {name: {**facts.evaluation[name], "quality": record(conditions)} for name in ("quantized", "float")}
    return quality(dataclasses.replace(facts, evaluation=evaluation))


def test_without_conditions_there_is_no_section(finished_run: Path) -> None:
    assert quality(read_facts(finished_run)) == ""


def test_a_few_conditions_are_a_table(finished_run: Path) -> None:
    page = shown(finished_run, "clean,fog:2,mixed")
    assert "<details>" not in page
    for words in (
        "Image quality",
        "fog:2",
        "mixed, severity 5",
        "mean corruption accuracy (1 measured)",
        "worst severity",
        "on 20 test images",
    ):
        assert words in checked(page).text


def test_many_are_a_grid_with_the_list_folded(finished_run: Path) -> None:
    page = shown(finished_run, "clean,contrast,brightness,fog:3")
    assert "Accuracy by corruption and severity, %: quantized (float)" in checked(page).text
    assert "all conditions with their intervals" in page
    assert "Mean accuracy by severity" in page


def test_the_grid_has_a_column_for_each_severity() -> None:
    both = record("contrast,fog:3")
    assert grid_rows({"quantized": both, "float": both})[0] == ("contrast", *["100.0 (100.0)"] * 3, "0.0 (0.0)", "0.0 (0.0)")
    assert grid_rows({"file": both})[1][:3] == ("fog", "", "")
    assert condition_rows({"file": record("clean")})[1] == [("clean", "100.00 ± 8.06")]
