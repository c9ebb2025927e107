"""The report of a comparison: tables, plain sentences and charts, on the terminal and as one HTML page; nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.errors import RunError
from bitwright.report.charts import Dot, Mark, Track, dots, number, scatter
from bitwright.report.parts import cells, document, pairs, table, tile
from bitwright.report.table import amount, bits_text, size_text
from bitwright.runs import Run
from bitwright.standings import p_text, points_text

Row = Mapping[str, Any]
HEADINGS = ("method", "accuracy %", "to uniform", "W bits", "A bits", "BitOps", "size", "widths", "search", "passes")
AXES = {
    "weight_bits": ("average_weight_bits", "bits a weight", number),
    "bitops": ("bitops", "BitOps an image", amount),
    "size": ("size", "size of the packed file", size_text),
}
"""How each cost that a budget may limit is drawn: its column, its name and how a value is written."""


def is_comparison(directory: str | Path) -> bool:
    """Return whether a directory was made by `bitwright compare`; raises `RunError` if it is no run at all."""
    return bool(Run.load(directory).manifest["recipe"].get("kind") == "comparison")


def read_comparison(directory: str | Path) -> dict[str, Any]:
    """Return what compare.json holds; raises `RunError` where there is nothing to show yet."""
    file = Path(directory) / "compare.json"
    if not file.is_file():
        raise RunError(f"{directory}: no stage of this comparison is complete yet; `bitwright compare {directory}` goes on with it")
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return {**content, "manifest": Run.load(directory).manifest}
    except ValueError as error:
        raise RunError(f"{file}: damaged ({error}); `bitwright compare {directory}` writes it again") from None


def row_texts(entry: Row) -> tuple[str, ...]:
    """Return the texts of a method's row, in the order of `HEADINGS`."""
    mean, accuracy = entry["mean"], entry["accuracy"]
    half = 100 * max(abs(bound - accuracy["mean"]) for bound in accuracy["interval"])
    return (
        entry["label"],
        f"{100 * accuracy['mean']:.2f} ± {half:.2f}",
        _difference_text(entry),
        bits_text(mean["average_weight_bits"]),
        bits_text(mean["average_activation_bits"]),
        amount(mean["bitops"]),
        size_text(mean["size"]),
        f"{mean['widths']:.3g}",
        f"{mean['search_seconds']:.3g} s",
        amount(mean["search_sample_passes"]),
    )


def _difference_text(entry: Row) -> str:
    """Write the difference to uniform; a star says that it is significant."""
    compared = entry["against_uniform"]
    if compared is None:
        return f"= {entry['same_as']}" if entry["same_as"] else ""
    return points_text(compared["difference"]) + ("*" if compared["significant"] else "")


def title_of(part: Row) -> str:
    """Return the title of a table: budget, stage and how long it was trained."""
    settings = part["finetune"]
    words = {"epochs": "epoch" if settings.get("epochs") == 1 else "epochs", "max_steps": "steps at most"}
    length = [f"{settings[name]} {word}" for name, word in words.items() if settings.get(name)]
    return f"{part['budget']}, {part['stage']} stage ({', '.join(length) or 'no fine-tuning'})"


# ---- on the terminal


def show(directory: str | Path, console: Console) -> None:
    """Print the tables of a comparison and what they say."""
    content = read_comparison(directory)
    for part in content["tables"]:
        console.print(_terminal_table(part))
        for text in part["sentences"] if part["last"] else ():
            console.print(f"• {text}", highlight=False, markup=False)
        console.print()
    if not content["complete"]:
        console.print(f"! not complete: `bitwright compare {directory}` goes on", highlight=False, markup=False)
    for name in ("compare.csv", "report.html"):
        console.print(f"{name}: {Path(directory) / name}", highlight=False, soft_wrap=True)


def _terminal_table(part: Row) -> Table:
    reasons = [f"{label} left out: {reason}" for label, reason in part["left_out"].items()]
    shown = Table(
        title=Text(title_of(part)),
        caption=Text("\n".join(reasons)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        title_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for entry in part["methods"]:
        shown.add_row(*map(Text, row_texts(entry)), style="bold" if entry["label"] == part["leader"] else "")
    return shown


# ---- as a page


def render_comparison(directory: str | Path) -> str:
    """Return the report of a comparison as one HTML page without any outside reference."""
    content = read_comparison(directory)
    recipe = Path(directory) / "recipe.yaml"
    text = recipe.read_text("utf-8") if recipe.is_file() else ""
    body = [_head(content), *map(_section, _by_budget(content)), _fronts(content), HOW_TO_READ, _provenance(content, text)]
    return document(f"{content['recipe']}: comparison", "".join(body))


def _by_budget(content: Row) -> Iterator[list[Row]]:
    """Yield the tables of each budget, the last stage first."""
    for budget in dict.fromkeys(part["budget"] for part in content["tables"]):
        yield [part for part in content["tables"] if part["budget"] == budget][::-1]


def _head(content: Row) -> str:
    tables = content["tables"]
    images = f"{tables[0]['methods'][0]['accuracy']['n']:,}" if tables and tables[0]["methods"] else "0"
    tiles = [tile(str(len(content["methods"])), "methods", f"<span>{len(content['seeds'])} seeds</span>")]
    if content["float"]:
        mean = sum(content["float"]) / len(content["float"])
        tiles.append(tile(f"{100 * mean:.2f} %", "float network", f"<span>{images} test images</span>"))
    for parts in _by_budget(content):
        if parts[0]["methods"]:
            best = parts[0]["methods"][0]
            note = f"<span>{escape(best['label'])}, best on selection</span>"
            tiles.append(tile(f"{100 * best['accuracy']['mean']:.2f} %", parts[0]["budget"], note))
    state = "" if content["complete"] else '<p class="alarm">Not complete: this is what is done so far.</p>'
    lead = "Search methods side by side: the same network, data, quantizer, budget and fine-tuning for all of them."
    return f'<h1>{escape(content["recipe"])}: comparison</h1><p class="lead">{lead}</p>{state}<div class="tiles">{"".join(tiles)}</div>'


def _section(parts: Sequence[Row]) -> str:
    last, *earlier = parts
    items = "".join(f"<li>{escape(text)}</li>" for text in last["sentences"])
    said = f'<ul class="verdict">{items}</ul>'
    before = "".join(f"<details><summary>{escape(title_of(part))}</summary>{_table(part)}{_goes_on(part)}</details>" for part in earlier)
    charts = f"{_accuracies(last)}{_differences(last)}{_search_cost(last)}"
    return f"<section><h2>{escape(title_of(last))}</h2>{said}{_table(last)}{charts}{before}</section>"


def _table(part: Row) -> str:
    rows = [
        f'<tr class="{"chosen" if entry["label"] == part["leader"] else ""}">{cells(row_texts(entry))}</tr>' for entry in part["methods"]
    ]
    out = "".join(f'<p class="alarm">{escape(label)} left out: {escape(reason)}</p>' for label, reason in part["left_out"].items())
    return f"{table(HEADINGS, rows)}{out}"


HOW_TO_READ = (
    "<section><h2>How to read the tables</h2><p>Rows are in the order of the accuracy on the selection images. "
    "Accuracy is the mean over seeds with its 95 % interval over seeds and test "
    "images; the difference to uniform is in points, with a star where it is significant after Holm's correction. Widths counts the "
    "distinct pairs of weight and activation width in free sites. Search is its time; passes are images through a network, a backward "
    "pass counting two.</p></section>"
)


def _goes_on(part: Row) -> str:
    names = ", ".join(part["goes_on"] or ())
    return f"<p>Best on the selection images, and so in the next stage: {escape(names)}.</p>"


def _accuracies(part: Row) -> str:
    rows = []
    for entry in part["methods"]:
        low, high = entry["accuracy"]["interval"]
        mean = 100 * entry["accuracy"]["mean"]
        rows.append(Dot(entry["label"], mean, 100 * low, 100 * high, f"{mean:.2f}", _style(entry["label"], part)))
    return f"<h3>Test accuracy, with 95 % intervals over seeds and images</h3>{dots(rows, unit='%')}" if len(rows) > 1 else ""


def _differences(part: Row) -> str:
    rows = []
    for entry in part["methods"]:
        c = entry["against_uniform"]
        if c is not None:
            low, high = c["interval"]
            text = points_text(c["difference"]) + ("*" if c["significant"] else "")
            style = _style(entry["label"], part)
            rows.append(Dot(entry["label"], 100 * c["difference"], 100 * low, 100 * high, text, style))
    if not rows:
        return ""
    compared = "".join(f"<tr>{cells(_comparison_texts(c))}</tr>" for c in part["comparisons"])
    full = f"<details><summary>All comparisons</summary>{table(COMPARED, [compared])}</details>"
    return f"<h3>Points above uniform, with corrected intervals</h3>{dots(rows, unit='', mark=0.0)}{full}"


COMPARED = ("comparison", "difference", "corrected interval", "corrected p", "95 % interval alone", "p alone", "significant")


def _comparison_texts(c: Row) -> tuple[str, ...]:
    spans = [f"{points_text(low)} to {points_text(high)}" for low, high in (c["interval"], c["interval_alone"])]
    ps = [p_text(c[name]).removeprefix("p ").removeprefix("= ") for name in ("p_value", "p_value_alone")]
    answer = "yes" if c["significant"] else "no"
    return f"{c['a']} - {c['b']}", points_text(c["difference"]), spans[0], ps[0], spans[1], ps[1], answer


def _fronts(content: Row) -> str:
    """Draw accuracy against every cost that a budget limits, and BitOps."""
    finals = [parts[0] for parts in _by_budget(content) if parts[0]["methods"]]
    if not finals:
        return ""
    limited = [name for name in AXES if any(f"{name}<" in part["budget"].replace(" ", "") for part in finals)]
    charts = []
    for cost in dict.fromkeys([*limited, "bitops"]):
        column, label, text = AXES[cost]
        chart = scatter(_tracks(finals, column), x_label=label, y_label="test accuracy, %", x_text=text)
        charts.append(f"<h3>Accuracy against {escape(label)}</h3>{chart}")
    note = "The dotted line is the front: nothing to its left is higher. Whiskers are 95 % intervals."
    return f'<section><h2>What accuracy costs</h2>{"".join(charts)}<p class="note">{note}</p></section>'


def _search_cost(part: Row) -> str:
    spent = _tracks([part], "search_sample_passes", lambda passes: math.log10(max(1.0, passes)))
    chart = scatter(spent, x_label="images passed through a network in search", y_label="test accuracy, %", x_text=_power)
    return f"<h3>Accuracy against what the search cost</h3>{chart}" if len(spent) > 1 else ""


def _power(exponent: float) -> str:
    return amount(round(10**exponent))


def _tracks(finals: Sequence[Row], column: str, scale: Any = float) -> list[Track]:
    found: dict[str, list[Mark]] = {}
    for part in finals:
        for entry in part["methods"]:
            (low, high), mean = entry["accuracy"]["interval"], entry["accuracy"]["mean"]
            hint = f"{entry['label']}, {part['budget']}: {100 * mean:.2f} % at {number(entry['mean'][column])}"
            mark = Mark(scale(entry["mean"][column]), 100 * mean, 100 * low, 100 * high, hint)
            found.setdefault(entry["label"], []).append(mark)
    return [Track(label, sorted(marks, key=lambda mark: mark.x), _style(label, finals[0])) for label, marks in found.items()]


def _style(label: str, part: Row) -> str:
    return "series-1" if label == part["leader"] else "series-3" if label == "uniform" else "series-2"


def _provenance(content: Row, recipe: str) -> str:
    manifest = content["manifest"]
    rows = [("seeds", ", ".join(map(str, content["seeds"]))), ("begun", str(manifest["created"]))]
    rows += [(f"method {label}", _method_text(entry)) for label, entry in content["methods"].items()]
    makers = dict.fromkeys(json.dumps(row["made_by"]) for part in content["tables"] for entry in part["methods"] for row in entry["rows"])
    rows += [("made by", ", ".join(f"{name} {value}" for name, value in json.loads(text).items())) for text in makers]
    rows.append(("fingerprint of what is common to all", str(manifest["fingerprint"])[:16]))
    text = f"<details><summary>recipe.yaml</summary><pre>{escape(recipe)}</pre></details>"
    return f"<section><h2>Provenance</h2>{pairs(rows)}{text}</section>"


def _method_text(entry: Row) -> str:
    options = ", ".join(f"{name}={value}" for name, value in entry["options"].items())
    return f"{entry['method']}({options})"
