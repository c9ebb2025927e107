"""The table of a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bitwright.report import comparison
from bitwright.report.adaptive import adaptive_alarms
from bitwright.report.facts import Facts, alarms, read_facts
from bitwright.report.quality import condition_rows, records_of
from bitwright.report.table import HEADINGS, PolicyRow, policy_rows


def show(run_dir: str | Path, console: Console | None = None) -> None:
    """Print what a run has: its policies side by side, its alarms, its files; raises `RunError` if it is no run."""
    console = console or new_console()
    if comparison.is_comparison(run_dir):
        comparison.show(run_dir, console)
        return
    facts = read_facts(run_dir)
    rows = policy_rows(facts)
    groups = {"main": "result", "same": "after equal, shorter fine-tuning"}
    for group, title in groups.items():
        own = [row for row in rows if row.group == group]
        if own:
            console.print(_table(own, f"{facts.name}: {title}"))
    show_quality(records_of(facts), console)
    for text in _notes(facts):
        console.print(text, highlight=False)
    bank = facts.artefact.get("to") == "bank"
    artefact = Path(str(facts.artefact.get("file", "bank.json" if bank else "model.safetensors"))).name
    for name in ("policy.json", f"export/{artefact}", "report.html"):
        if (Path(run_dir) / name).is_file():
            console.print(f"{name.partition('/')[0].partition('.')[0]}: {Path(run_dir) / name}", highlight=False, soft_wrap=True)


def show_quality(records: Mapping[str, Any], console: Console | None = None) -> None:
    """Print networks under conditions side by side, nothing where there are none."""
    if not records:
        return
    headings, rows = condition_rows(records)
    table = Table(title="image quality: accuracy, %", box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "condition" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    (console or new_console()).print(table)


def new_console() -> Console:
    """Return a console on the output; one that is no terminal has no width of its own, and 120 cuts nothing off."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _table(rows: Sequence[PolicyRow], title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for heading in HEADINGS:
        left = heading in ("policy", "widths")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "widths")
    for row in rows:
        table.add_row(*row.cells, style="bold" if row.chosen else "")
    return table


def _notes(facts: Facts) -> list[str]:
    verdict = facts.baselines.get("random")
    notes = []
    if verdict:
        mean = f"{100 * verdict['mean']:.2f} ± {100 * verdict['standard_error']:.2f} %"
        side = "above" if verdict["gap"] >= 0 else "below"
        notes.append(f"mean of {verdict['n']} random policies: {mean}; the found one is {100 * abs(verdict['gap']):.2f} points {side}")
    if facts.found and not facts.evaluation:
        notes += [f"found: {text}" for text in facts.found["budgets"]]
    if facts.certificate and facts.certificate["safe"]:
        notes.append("safe to transfer from the proxy: " + "; ".join(facts.certificate["reasons"]))
    return notes + [f"! {text}" for text in (*alarms(facts), *adaptive_alarms(facts))]
