"""Draw what benchmarks/adaptive.py measured: bits and accuracy by severity, and a stream whose quality changes.

    python benchmarks/adaptive_plots.py --name fashion

Reads results/adaptive-NAME.csv and results/adaptive-NAME-stream.csv and writes docs/images/adaptive-NAME-*.svg.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from record import RESULTS

from bitwright.report.charts import WIDTH, Line, lines
from bitwright.runs import write_text_atomic

IMAGES = RESULTS.parent / "docs" / "images"
Row = dict[str, str]
STYLES = ("series-1", "series-2", "series-3")


def read(name: str) -> list[Row]:
    """Return the rows of a file of results."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def alone(drawing: str) -> str:
    """Return a chart as a file of its own: light, with the report's style inside, its legend left to the page."""
    svg = drawing[: drawing.index("</svg>") + len("</svg>")]
    height = svg.split('"')[1].split()[3]
    style = files("bitwright.report").joinpath("style.css").read_text("utf-8").partition("@media")[0]
    rules = "\n".join(line for line in files("bitwright.report").joinpath("style.css").read_text("utf-8").splitlines() if _draws(line))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
    inside = f"<style>{style}\nsvg {{ color-scheme: light; }}\n{rules}</style>"
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    head, _, body = svg.removeprefix("<svg ").partition(">")
    return f"{opening}{head}>{inside}{paper}{body}\n"


def _draws(line: str) -> bool:
    return line.startswith(("svg ", ".series-"))


def mean(rows: Iterable[Row], arm: str, condition: str, what: str) -> float:
    """Return the mean over seeds of a figure of an arm under a condition; nan where there is none."""
    values = [float(row[what]) for row in rows if row["arm"] == arm and row["condition"] == condition and row[what]]
    return statistics.mean(values) if values else float("nan")


def by_severity(rows: list[Row], arms: list[str], what: str, label: str, scale: float = 1.0) -> str:
    """Draw a figure on the mix by severity, a line an arm."""
    prefix = "mixed severity "
    levels = sorted({int(row["condition"].removeprefix(prefix)) for row in rows if row["condition"].startswith(prefix)})
    series = [
        Line(arm, [float(level) for level in levels], [scale * mean(rows, arm, f"{prefix}{level}", what) for level in levels], style)
        for arm, style in zip(arms, STYLES, strict=True)
    ]
    return lines(series, x_label="severity in the mix, 0 is clean", y_label=label, height=260, title=f"{label}: {', '.join(arms)}")


def stream(rows: list[Row]) -> dict[str, str]:
    """Draw severity, bits and accuracy along a stream."""
    at = [float(row["image"]) for row in rows]
    columns = {"severity": "severity", "bits": "mean bits", "accuracy": "accuracy, %"}
    return {
        name: lines(
            [Line(name, at, [float(row[name]) for row in rows], style)],
            x_label="image of the stream",
            y_label=label,
            height=170,
            title=f"{label} along a stream",
        )
        for (name, label), style in zip(columns.items(), ("series-2", "series-1", "series-3"), strict=True)
    }


def main() -> None:
    """Write the drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("--arms", nargs=3, default=["dqmq", "uniform", "severity"], help="blue, grey, orange (default: %(default)s)")
    arguments = parser.parse_args()
    rows = read(f"adaptive-{arguments.name}")
    drawings = {
        "bits": by_severity(rows, arguments.arms, "bits", "mean bits"),
        "accuracy": by_severity(rows, arguments.arms, "top1", "accuracy, %", 100.0),
    }
    drawings |= {f"stream-{name}": drawing for name, drawing in stream(read(f"adaptive-{arguments.name}-stream")).items()}
    for name, drawing in drawings.items():
        path = Path(IMAGES / f"adaptive-{arguments.name}-{name}.svg")
        write_text_atomic(path, alone(drawing))
        print(path)


if __name__ == "__main__":
    main()
