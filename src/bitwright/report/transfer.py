"""The part of the report that shows a transfer certificate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from bitwright.report.charts import Line, lines
from bitwright.report.facts import Facts, Row
from bitwright.report.parts import cells, table

HALF = 400
STYLES = {"float": "series-2", "found": "series-1", "uniform": "series-3"}
WHERE = {"target": "on the target's images", "proxy": "on the proxy's images"}


def transfer(facts: Facts) -> str:
    """Return the section of a search on a proxy: the verdict and why, layer sensitivities on both, class margins."""
    content = facts.certificate
    if not content:
        return ""
    word = "safe to transfer" if content["safe"] else "not safe to transfer"
    style = "calm" if content["safe"] else "alarm"
    proxy = facts.found.get("proxy") or {}
    searched = f"Searched on {proxy['images']:,} images of {proxy['data']}. " if proxy else ""
    reasons = "".join(f"<li>{escape(reason[0].upper() + reason[1:])}.</li>" for reason in content["reasons"])
    looked = f"{searched}The target was looked at through {content['samples']} of its images, without labels."
    return (
        f'<section><h2>Transfer from the proxy</h2><p class="{style}">Verdict: {word}.</p><ul>{reasons}</ul>'
        f'{_sensitivities(content)}{_margins(content)}<p class="note">{escape(looked)}</p></section>'
    )


def _sensitivities(content: Row) -> str:
    layers = content["correlation"]["layers"]
    if len(layers) < 2:
        return ""
    both = [_standardised([pair[side] for pair in layers.values()]) for side in (0, 1)]
    places = list(range(1, len(layers) + 1))
    series = [Line("proxy", places, both[0], "series-1"), Line("target", places, both[1], "series-2")]
    low, high = content["correlation"]["interval"]
    head = f"Layer sensitivities: rank correlation {content['correlation']['value']:.2f} (95 %: {low:.2f} to {high:.2f})"
    chart = lines(series, x_label="free site, in execution order", y_label="log sensitivity, standardised")
    rows = [f"<tr>{cells((name, f'{own:.2f}', f'{other:.2f}'))}</tr>" for name, own, other in zip(layers, *both, strict=True)]
    numbers = table(("site", "proxy", "target"), rows)
    return f"<h3>{escape(head)}</h3>{chart}<details><summary>numbers</summary>{numbers}</details>"


def _standardised(values: Sequence[float]) -> list[float]:
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]


def _margins(content: Row) -> str:
    charts = []
    for name, histogram in content["margins"].items():
        middles = [(a + b) / 2 for a, b in zip(histogram["edges"], histogram["edges"][1:], strict=False)]
        series = [Line(label, middles, counts, STYLES[label]) for label, counts in histogram["counts"].items()]
        means = ", ".join(f"{label} {value:.3f}" for label, value in histogram["mean"].items())
        chart = lines(series, x_label="class margin over feature spread", y_label="images", width=HALF)
        charts.append(f'<div><h3>Class margins {WHERE[name]}</h3>{chart}<p class="note">Means: {escape(means)}.</p></div>')
    return f'<div class="pair">{"".join(charts)}</div>'
