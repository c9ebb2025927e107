"""bitwright decides how many bits each layer of a network deserves, teaches the network to live with them, and ships it.

The whole public API is here; the pages under docs/ show it at work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.costs import parse_budget
from bitwright.data import load_data
from bitwright.driver import SearchMethod, search
from bitwright.errors import BitwrightError
from bitwright.evaluation import evaluate
from bitwright.exporters import export
from bitwright.loading import load
from bitwright.methods import get_method
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, build_choices
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.training import FinetuneOptions, finetune

__version__ = "0.1.0"

__all__ = [
    "Bits",
    "BitwrightError",
    "FinetuneOptions",
    "Policy",
    "Problem",
    "SearchMethod",
    "build_choices",
    "evaluate",
    "export",
    "finetune",
    "get_method",
    "load",
    "load_data",
    "parse_budget",
    "quantize",
    "render",
    "run",
    "search",
    "trace",
]


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    log: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run all stages of a recipe, or go on where the run in ``out`` stopped; see `bitwright.pipeline.run`."""
    from bitwright import pipeline  # noqa: PLC0415  (recipes need pydantic, which `import bitwright` does without)

    return pipeline.run(recipe, out, data_root=data_root, overrides=overrides, device=device, log=log)


def render(run_dir: str | Path) -> str:
    """Return the report of a run directory as one HTML page; see `bitwright.report.render`."""
    from bitwright import report  # noqa: PLC0415  (only where it is used)

    return report.render(run_dir)
