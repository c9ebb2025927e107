"""The page: sections of HTML around the charts, every text escaped, everything inline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bitwright.report.adaptive import adaptive, adaptive_alarms
from bitwright.report.additive import additivity
from bitwright.report.charts import Bar, Dot, Line, bars, dots, heat, lines, number, width_class
from bitwright.report.comparison import is_comparison, render_comparison
from bitwright.report.facts import Facts, Row, alarms, expected_bits, read_facts
from bitwright.report.parts import cells, document, pairs, table, tile
from bitwright.report.quality import quality
from bitwright.report.table import HEADINGS, accuracy_text, amount, bits_text, policy_rows, same_finetuning, size_text
from bitwright.report.transfer import transfer

HALF = 400
"""User units across a chart that shares its row with another."""


def render(run_dir: str | Path) -> str:
    """Return the report of a run, or of a comparison, as one HTML page without any outside reference.

    It shows what the run's files say and computes nothing anew; a run that is not finished has fewer sections.

    Raises:
        RunError: the directory is no run, or a file in it is damaged.
    """
    if is_comparison(run_dir):
        return render_comparison(run_dir)
    facts = read_facts(run_dir)
    return document(facts.name, "".join(section(facts) for section in SECTIONS))


def _headline(facts: Facts) -> str:
    lead = f'<p class="lead">{escape(facts.description)}</p>' if facts.description else ""
    return f'<h1>{escape(facts.name)}</h1>{lead}<div class="tiles">{"".join(_tiles(facts))}</div>'


def _tiles(facts: Facts) -> list[str]:
    """Return the figures at the top: accuracy, bits, BitOps, size."""
    tiles = []
    if facts.evaluation:
        quantized, original = facts.evaluation["quantized"], facts.evaluation["float"]
        change = 100 * (quantized["top1"] - original["top1"])
        style = "up" if change >= 0 else "down"
        note = f'<span class="{style}">{change:+.2f} points on float</span>'
        tiles.append(tile(f"{100 * quantized['top1']:.2f} %", "test accuracy", note))
        tiles.append(tile(f"{100 * original['top1']:.2f} %", "float network", f"<span>{quantized['n']:,} test images</span>"))
    record = facts.evaluation.get("quantized") or facts.found
    if record:
        ratio = 32 / record["average_weight_bits"]
        tiles.append(tile(bits_text(record["average_weight_bits"]), "bits a weight", f"<span>{ratio:.1f}× fewer than float32</span>"))
        tiles.append(tile(bits_text(record["average_activation_bits"]), "bits an activation", "<span>weighted by count</span>"))
        tiles.append(tile(amount(record["bitops"]), "BitOps an image", "<span>MACs × w × a</span>"))
    if facts.artefact:
        equal = "bit for bit" if not facts.artefact.get("largest_difference") else "layer by layer"
        tiles.append(tile(size_text(facts.artefact["bytes"]), f"{escape(facts.artefact['to'])} file", f"<span>checked {equal}</span>"))
    if facts.artefact.get("latency"):
        taken = facts.artefact["latency"]
        predicted = f"<span>predicted {taken['predicted_ns'] / 1e6:.3g} ms; {escape(taken['target'])}, n = {taken['n']}</span>"
        tiles.append(tile(f"{taken['measured_ns'] / 1e6:.3g} ms", "measured latency of a sample", predicted))
    return tiles


def _alarms(facts: Facts) -> str:
    found = [*alarms(facts), *adaptive_alarms(facts)]
    if not found and not facts.policy and not facts.adaptive:
        return ""
    items = "".join(f'<p class="alarm">{escape(text)}</p>' for text in found)
    return f"<section><h2>Alarms</h2>{items or (CALM_ADAPTIVE if facts.adaptive else CALM)}</section>"


CALM = '<p class="calm">None: every free width moved, the policy uses several widths, and no proposal had to be repaired.</p>'
CALM_ADAPTIVE = '<p class="calm">None: decisions differ from image to image, each is best served by its own, and the budget is kept.</p>'


def _policies(facts: Facts) -> str:
    rows = policy_rows(facts)
    if not rows:
        return ""
    groups = [_policy_table([row for row in rows if row.group == "main"])]
    same = [row for row in rows if row.group == "same"]
    if same:
        groups.append("<h3>After equal, shorter fine-tuning</h3>" + _policy_table(same))
    compared = same or ([row for row in rows if row.name != "float"] if same_finetuning(facts) else [])
    points = [_dot(row.name, row.record, chosen=row.chosen) for row in compared]
    chart = "<h3>Test accuracy with 95 % intervals</h3>" + dots(points, unit="%") if len(points) > 1 else ""
    note = "Averages count every site, pinned ends included. The interval is Wilson's 95 % over the test images, for one training."
    return f'<section><h2>Policies of the same budget</h2>{"".join(groups)}{_verdict(facts)}{chart}<p class="note">{note}</p></section>'


def _policy_table(rows: Sequence[Any]) -> str:
    lines_ = [f'<tr class="{"chosen" if row.chosen else ""}">{cells(row.cells)}</tr>' for row in rows]
    return table(HEADINGS, lines_)


def _verdict(facts: Facts) -> str:
    verdict = facts.baselines.get("random")
    if not verdict:
        return ""
    errors = verdict["standard_errors"]
    much = f", {errors:+.1f} standard errors of that mean" if errors is not None else ""
    mean = f"{100 * verdict['mean']:.2f} ± {100 * verdict['standard_error']:.2f} %"
    side = "above" if verdict["gap"] >= 0 else "below"
    text = f"{verdict['n']} random policies average {mean}; the found policy is {100 * abs(verdict['gap']):.2f} points {side}{much}."
    return f"<p>{escape(text)}</p>"


def _dot(name: str, record: Row, *, chosen: bool) -> Dot:
    low, high = record["interval"]
    style = "series-1" if chosen else "series-2"
    return Dot(name, 100 * record["top1"], 100 * low, 100 * high, accuracy_text(record).partition(" ")[0], style)


def _bits(facts: Facts) -> str:
    if facts.policy is None or not facts.sites:
        return ""
    total = max(1, sum(site["weights"] for site in facts.sites))
    rows = [_site_bar(facts, site, total) for site in facts.sites if site["name"] in facts.policy]
    top = max(8.0, max(row.value for row in rows if row.value <= 16) if any(row.value <= 16 for row in rows) else 8.0)
    keys = "".join(f'<span><i class="swatch {width_class(w)}"></i>{w}</span>' for w in range(1, 9))
    legend = f'<p class="legend"><span>bits a weight</span>{keys}<span><i class="swatch w9"></i>16, 32</span></p>'
    note = "The text gives weight and activation width, and the site's share of all weights. A dot marks a pinned site."
    return f'<section><h2>Bits per site</h2>{legend}{bars(rows, top)}<p class="note">{note}</p></section>'


def _site_bar(facts: Facts, site: Row, total: int) -> Bar:
    assert facts.policy is not None
    bits = facts.policy[site["name"]]
    pinned = " ·" if len(site["choices"]) == 1 else ""
    share = 100 * site["weights"] / total
    hint = f"{site['name']}: {site['kind']}, {site['weights']:,} weights, {site['macs']:,} MACs, {bits!r}"
    return Bar(site["name"] + pinned, float(bits.w), f"W{bits.w} A{bits.a}   {share:.1f} %", width_class(bits.w), hint)


def _trajectory(facts: Facts) -> str:
    steps, paths = expected_bits(facts)
    if not steps:
        shown = _search_table(facts)
        return f"<section><h2>Search</h2>{shown}</section>" if shown else ""
    chart = heat(paths, steps, x_label="step", title="expected bits of each site over the search")
    cost = "".join(_cost_chart(facts, k) for k in range(len(facts.budgets)))
    note = "Each row is a free site; its colour is the expected weight width, and the figure at its end the last value."
    return f'<section><h2>Search</h2>{_search_table(facts)}<h3>Expected bits</h3>{chart}<p class="note">{note}</p>{cost}</section>'


def _search_table(facts: Facts) -> str:
    if not facts.found:
        return ""
    uniform = facts.found.get("uniform") or {}
    rows = [("method", str(facts.found["method"])), ("steps", f"{facts.found['steps']:,}"), ("seconds", f"{facts.found['seconds']:.0f}")]
    rows += [("budget", text) for text in facts.found["budgets"]]
    rows.append(("loss before fine-tuning", number(facts.found["loss"])))
    if uniform:
        rows.append(("… of the uniform policy", number(uniform["loss"])))
    return pairs(rows)


def _cost_chart(facts: Facts, k: int) -> str:
    """Draw what the method expected to spend, as a share of the budget."""
    budget = facts.budgets[k]
    told = [line for line in facts.search if line.get("expected") and len(line["expected"]) > k]
    if len(told) < 2 or not budget["limit"]:
        return ""
    shares = [line["expected"][k] / budget["limit"] for line in told]
    line = Line(budget["cost"], [float(entry["step"]) for entry in told], shares)
    chart = lines([line], x_label="step", y_label="expected cost / budget", height=200, limit=1.0)
    return f"<h3>{escape(budget['text'])}</h3>{chart}"


def _curves(facts: Facts) -> str:
    parts = []
    for stage, title in (("finetune", "Fine-tuning at the found policy"), ("float", "Training of the float network")):
        rows = facts.curves[stage]
        if len(rows) < 2:
            continue
        loss = lines([Line("loss", *_column(rows, "loss"))], x_label="epoch", y_label="training loss", width=HALF)
        curve = Line("accuracy", *_column(rows, "selection", 100.0), style="series-3")
        accuracy = lines([curve], x_label="epoch", y_label="selection accuracy, %", width=HALF)
        parts.append(f'<h3>{title}</h3><div class="pair"><div>{loss}</div><div>{accuracy}</div></div>')
    return f"<section><h2>Training</h2>{''.join(parts)}</section>" if parts else ""


def _column(rows: Iterable[Row], name: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    points = [(float(row["epoch"]), factor * row[name]) for row in rows if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _bins(facts: Facts) -> str:
    if not facts.statistics:
        return ""
    rows = []
    for layer, pair in facts.statistics.items():
        before, after = pair["before"], pair["after"]
        figures = (before["variance"], after["variance"], before["entropy"], after["entropy"])
        rows.append(f"<tr>{cells((layer, str(after['bits']), *map(number, figures)))}</tr>")
    headings = ("layer", "bits", "in-bin variance before", "after", "entropy before", "after")
    note = (
        "Variance is the mean squared distance of a latent weight to its level, in squared steps (1/12 = 0.0833 if spread evenly); "
        "entropy is that of how the levels are used, at most the number of bits."
    )
    return f'<section><h2>Weights in their bins</h2>{table(headings, rows)}<p class="note">{note}</p></section>'


def _provenance(facts: Facts) -> str:
    manifest = facts.manifest
    rows = [("fingerprint of the recipe", str(manifest["fingerprint"])[:16]), ("begun", str(manifest["created"]))]
    rows += [(name, str(version)) for name, version in manifest["versions"].items()]
    rows += [(f"stage {name}", _stage_text(stage)) for name, stage in manifest["stages"].items()]
    if facts.artefact:
        rows.append((f"{facts.artefact['to']} file", json.dumps(facts.artefact.get("parts", {}))))
    recipe = f"<details><summary>recipe.yaml</summary><pre>{escape(facts.recipe)}</pre></details>"
    return f"<section><h2>Provenance</h2>{pairs(rows)}{recipe}</section>"


def _stage_text(stage: Row) -> str:
    seconds = f", {stage['seconds']:.1f} s" if "seconds" in stage else ""
    return f"finished {stage['finished']}{seconds}"


SECTIONS: tuple[Callable[[Facts], str], ...] = (
    _headline,
    _alarms,
    _policies,
    quality,
    adaptive,
    _bits,
    transfer,
    additivity,
    _trajectory,
    _curves,
    _bins,
    _provenance,
)
