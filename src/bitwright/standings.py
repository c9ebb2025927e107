"""The standings of a comparison: means over seeds, which differences are significant, and plain sentences that say so."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitwright.evaluation import Corrected, Estimate, corrected, over_seeds

Row = Mapping[str, Any]
SPENT = 0.9
"""A uniform policy that spends less of its budget is handicapped by it, and that is said."""
COSTS = ("average_weight_bits", "average_activation_bits", "bitops", "size")
COLUMNS = (
    "method",
    "budget",
    "seed",
    "stage",
    "top1",
    "low",
    "high",
    "n",
    *COSTS,
    "widths",
    "search_seconds",
    "search_sample_passes",
    "search_steps",
    "search_loss",
    "selection_top1",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "weight_widths",
    "activation_widths",
    "same_as",
    "finetune",
    "left_out",
)
"""The columns of compare.csv, before those that say what made a row; the difference is to uniform, its p-value Holm's."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A method in one table: its rows and which test images are right (bool [n]), both by seed."""

    label: str
    rows: tuple[Row, ...]
    correct: tuple[Tensor, ...]

    @property
    def keys(self) -> list[str]:
        """What names the trainings: equal ones had the same policy, seed and fine-tuning."""
        return [row["key"] for row in self.rows]


def ranked(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return methods from best to worst by mean accuracy on the selection images; of equal ones that of lower loss comes first.

    >>> row = lambda top1, loss: {"selection": {"top1": top1, "loss": loss}}
    >>> ranked({"a": [row(0.9, 1.0)], "b": [row(0.8, 0.1)], "c": [row(0.9, 0.5)]})
    ['c', 'a', 'b']
    """

    def place(label: str) -> tuple[float, float]:
        mean = {name: statistics.fmean(row["selection"][name] for row in rows[label]) for name in ("top1", "loss")}
        return -mean["top1"], mean["loss"]

    return sorted(rows, key=place)


def standings(contenders: Sequence[Contender], left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return a table of methods that had the same fine-tuning at the same budget, as JSON-able data.

    Compared are every method with ``uniform``, and the leader with every other: the leader is the method that is best on the
    selection images, so no test image had a part in choosing it. Holm's correction counts all of these. Two methods with
    the same policy for every seed are the same and no comparison.

    Returns:
        ``methods`` from best to worst on the selection images, each with its rows, means, accuracy and ``against_uniform``;
        ``leader``, ``comparisons``, ``left_out`` (reasons by method), ``sentences``.
    """
    by_label = {contender.label: contender for contender in contenders}
    order = ranked({label: contender.rows for label, contender in by_label.items()})
    in_order = [by_label[label] for label in order]
    pairs = [(a, b) for a, b in _pairs(in_order) if a.keys != b.keys]
    judged = corrected([over_seeds(a.correct, b.correct) for a, b in pairs])
    comparisons = [_comparison(a.label, b.label, result) for (a, b), result in zip(pairs, judged, strict=True)]
    methods = [_method(contender, in_order, comparisons) for contender in in_order]
    table = {"leader": order[0] if order else None, "methods": methods, "comparisons": comparisons, "left_out": dict(left_out)}
    return {**table, "sentences": sentences(table)}


def _pairs(contenders: Sequence[Contender]) -> Iterator[tuple[Contender, Contender]]:
    """Yield what is compared with what, the leader being first: all with uniform, and the leader with the others."""
    uniform = next((contender for contender in contenders if contender.label == "uniform"), None)
    others = [contender for contender in contenders if contender is not uniform]
    if uniform is not None:
        yield from ((contender, uniform) for contender in others)
    if contenders and contenders[0] is not uniform:
        yield from ((contenders[0], contender) for contender in others[1:])


def _comparison(a: str, b: str, result: Corrected) -> dict[str, Any]:
    estimate = result.estimate
    return {
        "a": a,
        "b": b,
        "difference": estimate.mean,
        "interval": [max(-1.0, result.interval[0]), min(1.0, result.interval[1])],
        "p_value": result.p_value,
        "p_value_alone": estimate.p_value,
        "interval_alone": list(estimate.interval()),
        "significant": result.significant,
    }


def _method(contender: Contender, order: Sequence[Contender], comparisons: Sequence[Row]) -> dict[str, Any]:
    rows = contender.rows
    accuracy: Estimate = over_seeds(contender.correct)
    low, high = accuracy.interval()
    means = {name: statistics.fmean(row[name] for row in rows) for name in (*COSTS, "widths")}
    spent = {
        f"search_{name}": statistics.fmean(row["search"][name] for row in rows) for name in ("seconds", "sample_passes", "steps", "loss")
    }
    earlier = order[: order.index(contender)]
    return {
        "label": contender.label,
        "method": rows[0]["search"]["method"],
        "accuracy": {"mean": accuracy.mean, "interval": [max(0.0, low), min(1.0, high)], "seeds": accuracy.seeds, "n": accuracy.n},
        "mean": {**means, **spent, "selection_top1": statistics.fmean(row["selection"]["top1"] for row in rows)},
        "same_as": next((other.label for other in earlier if other.keys == contender.keys), None),
        "against_uniform": next((c for c in comparisons if (c["a"], c["b"]) == (contender.label, "uniform")), None),
        "stopped": any(row["search"]["status"] == "stopped" for row in rows),
        "rows": [_shown(row, k, earlier) for k, row in enumerate(rows)],
    }


def _shown(row: Row, k: int, earlier: Sequence[Contender]) -> dict[str, Any]:
    """Return a row as it is kept: without where its file lies, and with who had the very same policy."""
    kept = {name: value for name, value in row.items() if name not in ("correct", "label")}
    return {**kept, "same_as": next((other.label for other in earlier if other.keys[k] == row["key"]), None)}


# ---- in words


def sentences(table: Row) -> list[str]:
    """Say in plain words whether mixing widths beats uniform here, and which differences are significant."""
    if not table["methods"]:
        return ["No method could run; the reasons are beside their names."]
    return [*_about_uniform(table), *_about_leader(table), *_caution(table)]


def _about_uniform(table: Row) -> Iterator[str]:
    labels = [entry["label"] for entry in table["methods"]]
    if "uniform" not in labels:
        why = table["left_out"].get("uniform", "it did not take part")
        yield f"There is no uniform policy to beat here ({why})."
        return
    against = [c for c in table["comparisons"] if c["b"] == "uniform"]
    ahead, behind, tied = _sorted(against)
    if ahead:
        yield f"Mixed widths beat uniform here: {_listed(ahead, measured=True)}."
    else:
        nearest = f"; the most promising is {_measured(tied[0], 'a')}" if tied and tied[0]["difference"] > 0 else ""
        yield f"Mixed widths do not beat uniform here: no method is significantly ahead of it{nearest}."
    if behind:
        yield f"Significantly worse than uniform: {_listed(behind, measured=True)}."
    if tied:
        yield f"Not significantly different from uniform: {_listed(tied)}."
    twins = _same_as(table, "uniform")
    if twins:
        yield f"The very policy of uniform was found by {', '.join(twins)}."


def _about_leader(table: Row) -> Iterator[str]:
    leader = table["leader"]
    if len(table["methods"]) < 3:
        return
    if leader == "uniform":
        yield "Best on the selection images is uniform itself."
        return
    own = [{**c, "difference": -c["difference"]} for c in table["comparisons"] if c["a"] == leader and c["b"] != "uniform"]
    ahead, behind, tied = _sorted(own)
    parts = [f"significantly worse than it: {_listed(behind, 'b')}"] if behind else []
    parts += [f"significantly better than it: {_listed(ahead, 'b')}"] if ahead else []
    parts += [f"not significantly different from it: {_listed(tied, 'b')}"] if tied else []
    twins = [label for label in _same_as(table, leader) if label != "uniform"]
    parts += [f"with the very same policies: {', '.join(twins)}"] if twins else []
    yield "; ".join([f"Best on the selection images is {leader}", *parts]) + "."


def _caution(table: Row) -> Iterator[str]:
    yield from (text for entry in table["methods"] if entry["label"] == "uniform" for text in _unspent(entry["rows"][0]))
    seeds = table["methods"][0]["accuracy"]["seeds"]
    if seeds == 1:
        yield "One seed: the intervals cover other test images, but not another search and training."
    elif seeds == 2:
        yield "Two seeds tell little of a third: the intervals are wide for that reason."
    stopped = [entry["label"] for entry in table["methods"] if entry["stopped"]]
    if stopped:
        yield f"Stopped by a step or time limit before it was done: {', '.join(stopped)}."


def _unspent(row: Row) -> Iterator[str]:
    """Say when the widest uniform policy is far below the budget: what it loses, it may lose for that."""
    share = max(cost / max(1, limit) for cost, limit in zip(row["search"]["costs"], row["search"]["limits"], strict=True))
    if share < SPENT:
        ((w, a), _), *_ = Counter(map(tuple, row["bits"].values())).most_common()
        yield f"Uniform, W{w}A{a} in most sites, spends {share:.0%} of the budget: no wider one fits. Mind that when you read its accuracy."


def _sorted(comparisons: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return those significantly ahead, significantly behind, and the others; each from the largest difference down."""
    order = sorted(comparisons, key=lambda c: -float(c["difference"]))
    sure = [c for c in order if c["significant"]]
    ahead, behind = [c for c in sure if c["difference"] > 0], [c for c in sure if c["difference"] <= 0]
    return ahead, behind, [c for c in order if not c["significant"]]


def _listed(comparisons: Sequence[Row], side: str = "a", *, measured: bool = False) -> str:
    return ", ".join(_measured(c, side) if measured else f"{c[side]} ({points_text(c['difference'])})" for c in comparisons)


def _measured(c: Row, side: str) -> str:
    low, high = c["interval"]
    return f"{c[side]} ({points_text(c['difference'])} points, {points_text(low)} to {points_text(high)}, {p_text(c['p_value'])})"


def _same_as(table: Row, label: str | None) -> list[str]:
    """Return who has the policies of a method under another label."""
    keys = {entry["label"]: [row["key"] for row in entry["rows"]] for entry in table["methods"]}
    return [other for other, own in keys.items() if label in keys and other != label and own == keys[label]]


def points_text(difference: float) -> str:
    """Write a difference of accuracies in percentage points.

    >>> points_text(0.0123), points_text(-0.00001)
    ('+1.23', '0.00')
    """
    text = f"{100 * difference:+.2f}"
    return "0.00" if float(text) == 0 else text


def p_text(p: float) -> str:
    """Write a p-value.

    >>> p_text(0.0123), p_text(0.00001), p_text(0.3)
    ('p = 0.012', 'p < 0.001', 'p = 0.30')
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"


# ---- as a file


def csv_text(tables: Sequence[Row]) -> str:
    """Return tables as CSV: a row a seed and one of the mean, whose difference to uniform and p-value are Holm's."""
    rows = [row for table in tables for row in _csv_rows(table)]
    makers = list(dict.fromkeys(name for row in rows for name in row if name not in COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *makers], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_rows(table: Row) -> Iterator[dict[str, Any]]:
    place = {"budget": table["budget"], "stage": table["stage"], "finetune": json.dumps(table["finetune"], sort_keys=True)}
    for entry in table["methods"]:
        for row in entry["rows"]:
            yield {"method": entry["label"], **place, **_csv_seed(row)}
        (low, high), makers = entry["accuracy"]["interval"], entry["rows"][-1]["made_by"]
        accuracy = {"top1": entry["accuracy"]["mean"], "low": low, "high": high, "n": entry["accuracy"]["n"]}
        means = {**entry["mean"], "same_as": entry["same_as"]}
        yield {"method": entry["label"], **place, "seed": "mean", **accuracy, **means, **_csv_difference(entry), **makers}
    for label, reason in table["left_out"].items():
        yield {"method": label, **place, "seed": "mean", "left_out": reason}


def _csv_seed(row: Row) -> dict[str, Any]:
    (low, high), search = row["interval"], row["search"]
    spent = {f"search_{name}": search[name] for name in ("seconds", "sample_passes", "steps", "loss")}
    widths = {name: " ".join(f"{w}:{c}" for w, c in row[name].items()) for name in ("weight_widths", "activation_widths")}
    same = {name: row[name] for name in ("seed", "top1", "n", *COSTS, "widths", "same_as")}
    return {**same, "low": low, "high": high, "selection_top1": row["selection"]["top1"], **spent, **widths, **row["made_by"]}


def _csv_difference(entry: Row) -> dict[str, Any]:
    c = entry["against_uniform"]
    if c is None:
        return {}
    return {"difference": c["difference"], "difference_low": c["interval"][0], "difference_high": c["interval"][1], "p_value": c["p_value"]}
