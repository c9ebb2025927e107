"""The table of policies: the same rows for the terminal, the report and whoever reads the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.report.facts import Facts

HEADINGS = ("policy", "W bits", "A bits", "BitOps", "size", "test accuracy", "widths")


@dataclass(frozen=True)
class PolicyRow:
    """One policy as it is shown; ``group`` is ``main`` or ``same`` (the shorter fine-tuning that all get alike)."""

    group: str
    name: str
    record: Mapping[str, Any]
    chosen: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts of the row, in the order of `HEADINGS`."""
        r = self.record
        return (
            self.name,
            bits_text(r["average_weight_bits"]),
            bits_text(r["average_activation_bits"]),
            amount(r["bitops"]),
            size_text(r["size"]),
            accuracy_text(r),
            widths_text(r["weight_widths"]),
        )


def policy_rows(facts: Facts) -> list[PolicyRow]:
    """Return the rows of a run's table: float, the result, then all policies after equal fine-tuning.

    Without a shorter fine-tuning of their own, the baselines had the result's, and its row is not repeated.
    """
    rows = []
    own = str(facts.baselines.get("found") or facts.found.get("method") or "found")
    if facts.evaluation:
        rows.append(PolicyRow("main", "float", facts.evaluation["float"]))
        rows.append(PolicyRow("main", own, facts.evaluation["quantized"], chosen=True))
    same = same_finetuning(facts)
    for row in facts.baselines.get("rows", ()):
        if row["policy"] == own and same:
            continue
        rows.append(PolicyRow("main" if same else "same", row["policy"], row, chosen=row["policy"] == own))
    return rows


def same_finetuning(facts: Facts) -> bool:
    """Say whether the baselines had the very fine-tuning of the result."""
    recipe = facts.manifest["recipe"]
    return not any(key.startswith("baselines.finetune.") for key in recipe) and recipe.get("baselines.finetune") is None


def accuracy_text(record: Mapping[str, Any]) -> str:
    """Write an accuracy in per cent with half its 95 % interval.

    >>> accuracy_text({"top1": 0.973, "interval": [0.956, 0.984]})
    '97.30 ± 1.40'
    """
    low, high = record["interval"]
    return f"{100 * record['top1']:.2f} ± {50 * (high - low):.2f}"


def bits_text(value: float) -> str:
    """Write an average width.

    >>> bits_text(2.4965), bits_text(32.0)
    ('2.50', '32.00')
    """
    return f"{value:.2f}"


def amount(value: float) -> str:
    """Write a large count with its decimal prefix.

    >>> amount(389_000_000), amount(12)
    ('389M', '12')
    """
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:g}"


def size_text(value: float) -> str:
    """Write bytes, decimally: 1 KB is 1,000 B.

    >>> size_text(84_213)
    '84.2 KB'
    """
    if value >= 1e6:
        return f"{value / 1e6:.3g} MB"
    return f"{value / 1e3:.3g} KB" if value >= 1e3 else f"{value:g} B"


def widths_text(counts: Mapping[Any, int]) -> str:
    """Write how many sites have each weight width.

    >>> widths_text({"2": 5, "8": 2})
    '2×5 8×2'
    """
    return " ".join(f"{width}×{count}" for width, count in counts.items())
