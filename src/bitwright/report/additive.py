"""The part of the report that shows whether the loss is additive."""

from __future__ import annotations

from html import escape

from bitwright.correlation import Correlation
from bitwright.report.charts import Line, cloud
from bitwright.report.facts import Facts, Row
from bitwright.report.parts import pairs

GROUPS = {"budget": ("close below the budget", "series-1"), "choices": ("uniform over the choices", "series-3")}
NOTE = (
    "Each point is a random policy: what its sites' sensitivities, each measured with all other sites in float, add up to, against "
    "the loss of the whole policy; on the dashed line both are equal. An allocation relies on the order alone: the rank correlation."
)


def correlation_text(content: Row | None) -> str:
    """Return a correlation of additivity.json as text.

    >>> correlation_text(None)
    'unavailable: too few different policies lie there'
    """
    return "unavailable: too few different policies lie there" if content is None else str(Correlation(**content))


def additivity(facts: Facts) -> str:
    """Return the section of a check of additivity: foretold against measured loss, and the correlations."""
    content = facts.additivity
    if not content:
        return ""
    series = []
    for drawn, (name, style) in GROUPS.items():
        points = [point for point in content["points"] if point["drawn"] == drawn]
        series.append(Line(name, [point["predicted"] for point in points], [point["measured"] for point in points], style))
    chart = cloud(series, x_label=f"foretold loss ('{content['measure']}')", y_label="measured loss", title="foretold and measured loss")
    rows = [
        (f"rank correlation, {len(content['points'])} policies", str(Correlation(**content["spearman"]))),
        ("… close below the budget alone", correlation_text(content["near_budget"])),
        ("linear correlation", str(Correlation(**content["pearson"]))),
    ]
    good = f"It is, well enough to allocate by: the rank correlation is not below {content['threshold']}."
    verdict = f'<p class="alarm">{escape(content["warning"])}</p>' if content["warning"] else f'<p class="calm">{good}</p>'
    return f'<section><h2>Is the loss additive?</h2>{verdict}{pairs(rows)}{chart}<p class="note">{NOTE}</p></section>'
