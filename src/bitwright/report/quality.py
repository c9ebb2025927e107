"""The part of the report that shows a network under conditions: clean, corrupted and mixed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitwright.report.charts import Line, lines
from bitwright.report.facts import Facts
from bitwright.report.parts import cells, table
from bitwright.report.table import accuracy_text

SEVERITIES = (1, 2, 3, 4, 5)
MANY = 12
"""Conditions beyond which the page shows corruptions as a grid and folds their list."""
NAMES = {"quantized": "series-1", "float": "series-2", "file": "series-1"}
"""The networks that are shown, in this order, and the colour of each."""


def condition_rows(records: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings and the rows of the table of conditions.

    Args:
        records: what `bitwright.robustness.Robustness.to_dict` says of each network.

    >>> one = {"condition": "clean", "top1": 0.9, "interval": [0.88, 0.92], "n": 900, "seeds": 1}
    >>> mean = {"top1": 0.5, "interval": [0.4, 0.6], "corruptions": 2, "all_common": False}
    >>> record = {"conditions": [one], "mean_corruption_accuracy": mean, "worst_severity": 5, "severities": {"5": mean}}
    >>> condition_rows({"float": record})[1][-1]
    ('worst severity', '5: 50.00 ± 10.00')
    """
    names = [name for name in NAMES if name in records]
    first = records[names[0]]
    rows = []
    for k, one in enumerate(first["conditions"]):
        rows.append((one["condition"], *(accuracy_text(records[name]["conditions"][k]) for name in names)))
        for severity in one.get("by_severity", ()):
            label = f"  {one['condition']}, " + (f"severity {severity}" if severity != "0" else "clean part")
            rows.append((label, *(accuracy_text(records[name]["conditions"][k]["by_severity"][severity]) for name in names)))
    mean = first["mean_corruption_accuracy"]
    if mean is not None:
        which = "all 15 common" if mean["all_common"] else f"{mean['corruptions']} measured"
        rows.append((f"mean corruption accuracy ({which})", *(accuracy_text(records[name]["mean_corruption_accuracy"]) for name in names)))
        rows.append(("worst severity", *(_worst(records[name]) for name in names)))
    return ("condition", *names), rows


def _worst(record: Mapping[str, Any]) -> str:
    severity = record["worst_severity"]
    return f"{severity}: {accuracy_text(record['severities'][str(severity)])}"


def records_of(facts: Facts) -> dict[str, Any]:
    """Return what a run's evaluation says of its networks under conditions; empty if it was asked for none."""
    return {name: facts.evaluation[name]["quality"] for name in NAMES if "quality" in facts.evaluation.get(name, {})}


def quality(facts: Facts) -> str:
    """Return the section on image quality: the table, and accuracy against severity where there are several."""
    records = records_of(facts)
    if not records:
        return ""
    headings, rows = condition_rows(records)
    body = table(headings, [f"<tr>{cells(row)}</tr>" for row in rows])
    grid = grid_rows(records)
    if len(rows) > MANY and grid:
        short = [row for row in rows if ":" not in row[0]]
        body = table(headings, [f"<tr>{cells(row)}</tr>" for row in short]) + _grid(records, grid) + _folded(body)
    some = next(iter(records.values()))["conditions"][0]
    seeds = max(one["seeds"] for record in records.values() for one in record["conditions"])
    drawn = f"; {seeds} draws of each random corruption" if seeds > 1 else ""
    note = f"Accuracy on {some['n']:,} test images in %, with half the 95 % interval over images{drawn}."
    return f'<section><h2>Image quality</h2>{body}{_chart(records)}<p class="note">{escape(note)}</p></section>'


def grid_rows(records: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row a corruption, a column a severity: accuracy in per cent of the first network, of the second in brackets."""
    found: dict[str, dict[str, str]] = {}
    for several in zip(*(record["conditions"] for record in records.values()), strict=True):
        name, colon, severity = several[0]["condition"].partition(":")
        if colon:
            first, *others = (f"{100 * one['top1']:.1f}" for one in several)
            found.setdefault(name, {})[severity] = first + "".join(f" ({other})" for other in others)
    return [(name, *(row.get(str(severity), "") for severity in SEVERITIES)) for name, row in found.items()]


def _grid(records: Mapping[str, Any], grid: Sequence[tuple[str, ...]]) -> str:
    first, *others = records
    said = "Accuracy by corruption and severity, %: " + first + "".join(f" ({other})" for other in others)
    return f"<h3>{escape(said)}</h3>{table(('corruption', *map(str, SEVERITIES)), [f'<tr>{cells(row)}</tr>' for row in grid])}"


def _folded(body: str) -> str:
    return f"<details><summary>all conditions with their intervals</summary>{body}</details>"


def _chart(records: Mapping[str, Any]) -> str:
    series: Sequence[Line] = [
        Line(name, [float(s) for s in record["severities"]], [100 * one["top1"] for one in record["severities"].values()], NAMES[name])
        for name, record in records.items()
        if len(record["severities"]) > 1
    ]
    if not series:
        return ""
    return "<h3>Mean accuracy by severity</h3>" + lines(series, x_label="severity", y_label="accuracy, %", height=220)
