"""The part of the report on input-adaptive bit-widths: who gets how many bits, what it costs, and whether it follows the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitwright.report.charts import Bar as ChartBar
from bitwright.report.charts import Dot, Line, bars, dots, heat, lines
from bitwright.report.facts import Facts
from bitwright.report.parts import cells, pairs, table
from bitwright.report.table import accuracy_text, amount

STYLES = ("series-1", "series-2", "series-3")
HALF = 400
MEASURED, MODELLED = "measured", "modelled"


def adaptive_alarms(facts: Facts) -> list[str]:
    """Return what a reader should know of an adaptive network before trusting it, one sentence each."""
    record = facts.adaptive
    if not record:
        return []
    found = [text[0].upper() + text[1:] + "." for text in record["promise"]["alarms"]]
    kind = record["promise"]["actor"]["kind"]
    if kind in ("layerwise", "controller"):
        gain = (record.get("mixed") or {}).get("permuted", {})
        if gain and gain["gain_interval"][0] <= 0:
            low, high = (100 * value for value in gain["gain_interval"])
            shown = f"{100 * gain['gain']:+.2f} points, 95 %: {low:+.2f} to {high:+.2f}"
            found.append(f"The decisions of other images serve as well as an image's own ({shown}): bits do not follow the input.")
    return [*found, *_bank_alarms(facts.artefact)]


def _bank_alarms(artefact: Mapping[str, Any]) -> list[str]:
    """Return whether a bank is surely less often right than the network that it stands for."""
    if artefact.get("to") != "bank" or artefact["bank"]["gain_interval"][1] >= 0:
        return []
    low, high = (100 * value for value in artefact["bank"]["gain_interval"])
    lost = f"{100 * artefact['bank']['gain']:+.2f} points, 95 %: {low:+.2f} to {high:+.2f}"
    remedy = "Raise export.options.explained, or most, and export again."
    return [f"The bank's members do not stand for all that the network decides ({lost}). {remedy}"]


def adaptive(facts: Facts) -> str:
    """Return the section, empty for a run that is not adaptive."""
    record = facts.adaptive
    if not record:
        return ""
    parts = [_promise(record), _conditions(record), _trends(record), _sites(record), _stream(record), _curve(facts), _bank(facts.artefact)]
    return f"<section><h2>Input-adaptive bit-widths</h2>{''.join(parts)}</section>"


def _promise(record: Mapping[str, Any]) -> str:
    promise, actor = record["promise"], record["promise"]["actor"]
    rows = [
        ("choices of a site", ", ".join(f"W{w}A{a}" for w, a in record["choices"])),
        ("actor", f"{actor['kind']}: {actor['macs']:,} MACs an image at 8 bits, {100 * actor['share_of_macs']:.2f} % of the network's"),
        ("budget", f"{amount(promise['limit'])} BitOps an image on average, the actor's inside"),
        ("promise, on held-out images", _promised(promise)),
        ("decisions that are their site's commonest", f"{100 * promise['agreement']:.1f} %"),
    ]
    permuted = (record.get("mixed") or {}).get("permuted")
    if permuted:
        span = " to ".join(f"{100 * value:+.2f}" for value in permuted["gain_interval"])
        rows.append(("own decisions over those of other images", f"{100 * permuted['gain']:+.2f} points of accuracy (95 %: {span})"))
    return pairs(rows)


def _promised(promise: Mapping[str, Any]) -> str:
    low, high = (100 * value for value in promise["interval"])
    return f"{100 * promise['mean']:.2f} % of it (95 %: {low:.2f} to {high:.2f}; {promise['n']:,} images)"


def _conditions(record: Mapping[str, Any]) -> str:
    rows = [_row(name, one) for name, one in record["conditions"].items()]
    for severity, one in (record.get("mixed") or {}).get("by_severity", {}).items():
        rows.append(_row("mixed, clean part" if severity == "0" else f"mixed, severity {severity}", one))
    headings = ("test images", "n", "accuracy", "mean bits", "BitOps", "of the budget")
    return "<h3>By the quality of the input</h3>" + table(headings, [f"<tr>{cells(row)}</tr>" for row in rows])


def _row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    share = f"{100 * one['share']:.1f} %"
    return name, f"{one['n']:,}", accuracy_text(one), f"{one['bits']:.2f}", amount(one["bitops"]), share


def _trends(record: Mapping[str, Any]) -> str:
    """Draw bits and accuracy against severity, and the rank correlations."""
    found = record.get("corruptions") or {}
    if not found:
        return ""
    bits, accuracy = [], []
    for k, (name, one) in enumerate(found.items()):
        xs = [float(severity) for severity in one["severities"]]
        label = f"{name} (held out)" if one["held_out"] else name
        style = STYLES[k % len(STYLES)]
        bits.append(Line(label, xs, [row["bits"] for row in one["severities"].values()], style))
        accuracy.append(Line(label, xs, [100 * row["top1"] for row in one["severities"].values()], style))
    drawn = "".join(f"<div>{_pair(one, other)}</div>" for one, other in zip(bits, accuracy, strict=True))
    spearman = [
        Dot(name, one["spearman"]["value"], one["spearman"]["low"], one["spearman"]["high"], f"{one['spearman']['value']:+.2f}", "series-1")
        for name, one in found.items()
    ]
    note = (
        "Mean bits over the deciding sites, weighted by their MACs, and accuracy, against severity (0: clean). Below, the rank "
        "correlation of an image's bits with its severity; intervals are 95 %, over images. Its sign is found, not prescribed."
    )
    chart = dots(spearman, unit="", mark=0.0, title="rank correlation of bits with severity")
    return f'<h3>Bits and accuracy by severity</h3>{drawn}<h3>Rank correlation of bits with severity</h3>{chart}<p class="note">{note}</p>'


def _pair(bits: Line, accuracy: Line) -> str:
    left = lines([bits], x_label=f"severity of {bits.name}", y_label="mean bits", width=HALF, height=170, title=bits.name)
    right = lines(
        [accuracy], x_label=f"severity of {bits.name}", y_label="accuracy, %", width=HALF, height=170, title=f"accuracy, {bits.name}"
    )
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def _sites(record: Mapping[str, Any]) -> str:
    """Draw each site's mean bits, a column for every severity of the mix."""
    table_ = (record.get("mixed") or {}).get("sites_by_severity") or {}
    if not table_:
        return ""
    xs = [float(severity) for severity in table_]
    rows = {name: [values[k] for values in table_.values()] for k, name in enumerate(record["sites"])}
    note = "A row is a site, a column a severity of the mix, clean at the left; the figure is that of the highest severity."
    return f'<h3>Bits per site</h3>{heat(rows, xs, x_label="severity", title="bits per site and severity")}<p class="note">{note}</p>'


def _stream(record: Mapping[str, Any]) -> str:
    """Draw a stream whose quality rises and falls."""
    found = record.get("stream")
    if not found:
        return ""
    total = found["each"] * len(found["segments"])

    def places(values: Sequence[float]) -> list[float]:
        return [total * (k + 1) / len(values) for k in range(len(values))]

    severity = [(float(k * found["each"]), float(one["severity"])) for k, one in enumerate(found["segments"])]
    stairs = [(x + dx, level) for x, level in severity for dx in (0.0, found["each"] - 1.0)]
    charts = [
        lines([Line("bits", places(found["bits"]), found["bits"])], x_label="image", y_label="mean bits", height=160),
        lines(
            [Line("accuracy", places(found["accuracy"]), [100 * v for v in found["accuracy"]], "series-3")],
            x_label="image",
            y_label="accuracy, %",
            height=160,
        ),
        lines(
            [Line("severity", [x for x, _ in stairs], [y for _, y in stairs], "series-2")], x_label="image", y_label="severity", height=120
        ),
    ]
    names = [one["condition"] for one in found["segments"] if one["severity"]]
    said = " and then ".join(dict.fromkeys(names))
    note = f"{total:,} test images in a row: {said} come and go. Moving means; the network is told nothing."
    return f'<h3>A stream whose quality changes</h3>{"".join(charts)}<p class="note">{escape(note)}</p>'


def _curve(facts: Facts) -> str:
    rows = facts.curves.get("adaptive", ())
    if len(rows) < 2:
        return ""
    xs = [float(row["epoch"]) for row in rows]
    spent = Line("training", xs, [row["spent"] for row in rows])
    held = Line("selection images, as deployed", xs, [row.get("selection_spent", float("nan")) for row in rows], "series-2")
    cost = lines([spent, held], x_label="epoch", y_label="cost / budget", limit=1.0, width=HALF)
    accuracy = lines(
        [Line("accuracy", xs, [100 * row.get("selection", float("nan")) for row in rows], "series-3")],
        x_label="epoch",
        y_label="selection accuracy, %",
        width=HALF,
    )
    return f'<h3>Joint training</h3><div class="pair"><div>{cost}</div><div>{accuracy}</div></div>'


def _bank(artefact: Mapping[str, Any]) -> str:
    """Show the exported bank beside the network it came from."""
    if artefact.get("to") != "bank":
        return ""
    full, bank, speed = artefact["adaptive"], artefact["bank"], artefact["measured"]
    low, high = (100 * value for value in bank["gain_interval"])
    rows = [
        _row("adaptive network", full),
        _row(f"bank of {artefact['members']}", bank),
        ("its widest member", f"{full['n']:,}", accuracy_text(artefact["widest_member"]), "", amount(artefact["member_bitops"][-1]), ""),
    ]
    headings = ("on the mixed test images", "n", "accuracy", "mean bits", "BitOps", "of the budget")
    uses = [
        ChartBar(f"member {k}", 100 * share, f"{100 * share:.1f} % · {amount(cost)} BitOps")
        for k, (share, cost) in enumerate(zip(artefact["member_use"], artefact["member_bitops"], strict=True))
    ]
    facts = [
        ("number of members", escape(artefact["criterion"])),
        (
            "router",
            f"{artefact['router_macs']:,} MACs; agrees with the nearest member {100 * artefact['router_agreement']:.1f} % of the time",
        ),
        ("bank over adaptive network", f"{100 * bank['gain']:+.2f} points (95 %: {low:+.2f} to {high:+.2f})"),
        (f"speed ({MEASURED})", _speed(speed)),
        (f"BitOps ({MODELLED})", f"{artefact['modelled_bitops_ratio']:.2f}× those of the widest member"),
    ]
    note = "The measured runtime computes all widths in float32, so fewer bits are no faster on it; BitOps model hardware where they are."
    body = table(headings, [f"<tr>{cells(row)}</tr>" for row in rows])
    return f'<h3>Bank of static members</h3>{body}{bars(uses, 100.0)}{pairs(facts)}<p class="note">{note}</p>'


def _speed(speed: Mapping[str, Any]) -> str:
    rates, (low, high) = speed["images_per_second"], speed["ratio_range"]
    where = f"batch {speed['batch']}, {speed['threads']} threads, {speed['runtime']}"
    shown = f"session {rates['session']:.0f}, widest member {rates['widest']:.0f} images/s"
    return f"{shown}: {speed['ratio']:.2f}× ({low:.2f} to {high:.2f}; {where})"
