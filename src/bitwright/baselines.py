"""Baselines of a run: other policies of the same budget, each given the very fine-tuning that the found policy gets beside them."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright import runs
from bitwright.driver import SearchMethod
from bitwright.errors import BudgetError
from bitwright.evaluation import Evaluation, evaluate, paired_difference
from bitwright.job import Job
from bitwright.measure import keep_correct, key_of, recall, row_of, searched, trained
from bitwright.methods import get_method
from bitwright.policy import Policy
from bitwright.recipe import BaselinesSection, make_options
from bitwright.training import FinetuneOptions

ROWS = "baselines.jsonl"
COLUMNS = (
    "policy",
    "average_weight_bits",
    "average_activation_bits",
    "bitops",
    "size",
    "top1",
    "low",
    "high",
    "n",
    "difference",
    "difference_low",
    "difference_high",
    "weight_widths",
    "seed",
)
"""The columns of baselines.csv; the difference is the found policy's accuracy minus this one's, on the same images."""


def baselines_stage(job: Job) -> dict[str, Any]:
    """Fine-tune and evaluate every baseline; write baselines.jsonl row by row, then baselines.json and baselines.csv."""
    section = job.recipe.baselines or BaselinesSection()
    file = job.run.inside(ROWS)
    rows = {row["policy"]: row for row in runs.read_jsonl(file)}
    for label, policy in _entries(job, section):
        if label not in rows:
            rows[label] = _row(job, section, label, policy, list(rows.values()))
            runs.append_jsonl(file, rows[label])
        job.log("baselines", {"policy": label, "top1": rows[label]["top1"]})
    own, table = job.recipe.search.method, list(rows.values())
    verdict = compare_with_random(table, own)
    content = {"finetune": _options(job, section), "found": own, "random": verdict, "rows": table}
    runs.write_text_atomic(job.run.inside("baselines.json"), json.dumps(content, indent=1) + "\n")
    runs.write_text_atomic(job.run.inside("baselines.csv"), _csv(table))
    return {"policies": len(rows), **({"gap": verdict["gap"]} if verdict else {})}


def compare_with_random(rows: Sequence[Mapping[str, Any]], found: str) -> dict[str, Any] | None:
    """Compare the found policy with the random ones: their mean, its standard error, and the gap in such errors.

    >>> rows = [{"policy": "sdq", "top1": 0.9}, {"policy": "random 1", "top1": 0.8}, {"policy": "random 2", "top1": 0.82}]
    >>> round(compare_with_random(rows, "sdq")["standard_errors"], 3)
    9.0
    """
    drawn = [float(row["top1"]) for row in rows if str(row["policy"]).startswith("random ")]
    own = next((float(row["top1"]) for row in rows if row["policy"] == found), None)
    if len(drawn) < 2 or own is None:
        return None
    mean, spread = statistics.fmean(drawn), statistics.stdev(drawn)
    error = spread / math.sqrt(len(drawn))
    gap = own - mean
    return {
        "n": len(drawn),
        "mean": mean,
        "standard_deviation": spread,
        "standard_error": error,
        "low": min(drawn),
        "high": max(drawn),
        "gap": gap,
        "standard_errors": gap / error if error > 0 else None,
        "beaten": sum(own > value for value in drawn),
    }


def _entries(job: Job, section: BaselinesSection) -> Iterator[tuple[str, Policy]]:
    """Yield the found policy and every baseline's, by label."""
    found = job.recipe.search.method
    yield found, job.policy
    for name in section.methods:
        if name == found:
            continue
        if name == "random":
            for k in range(1, section.random + 1):
                yield f"random {k}", _policy(job, name, job.recipe.seed * 1000 + k)
            continue
        try:
            yield name, _policy(job, name, job.recipe.seed)
        except BudgetError as error:  # no single width may fit a budget that mixed widths fit
            job.log("baselines", {"policy": name, "left out": str(error)})


def _policy(job: Job, name: str, seed: int) -> Policy:
    method: SearchMethod[Any] = make_options(get_method(name), {}, f"baselines.{name}")
    problem = job.problem_of(job.network, seed, evaluate=job.problem.loss)
    return searched(problem, method).policy


def _options(job: Job, section: BaselinesSection) -> dict[str, Any] | None:
    return section.finetune if section.finetune is not None else job.recipe.finetune


def _row(job: Job, section: BaselinesSection, label: str, policy: Policy, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of one policy; a policy that another row already has is not trained again."""
    started = time.monotonic()
    key = key_of(policy)
    twin = next((row for row in earlier if row["key"] == key), None)
    own = job.recipe.search.method
    if twin is not None:
        measured = {name: twin[name] for name in ("top1", "top5", "n", "loss", "interval", "per_class")}
    else:
        evaluation = _measure(job, section, policy, key)
        keep_correct(_correct_file(job, key), evaluation)
        measured = evaluation.to_dict()
    row = {"policy": label, "key": key, "same_as": twin["policy"] if twin else None, "seed": job.recipe.seed}
    row |= row_of(job, policy, measured)
    reference = next((other for other in earlier if other["policy"] == own), None)
    paired = None if reference is None else _paired(job, reference, row)
    return {**row, "paired": paired, "seconds": round(time.monotonic() - started, 2)}


def _measure(job: Job, section: BaselinesSection, policy: Policy, key: str) -> Evaluation:
    options = _options(job, section)
    if section.finetune is None and policy == job.policy:
        return evaluate(job.quantized, job.data.test)
    out = job.run.inside("baselines", key)
    settings = None if options is None else make_options(FinetuneOptions, options, "baselines.finetune")
    evaluation = evaluate(trained(job, policy, settings, out), job.data.test)
    shutil.rmtree(out, ignore_errors=True)
    return evaluation


def _paired(job: Job, found: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the found policy's accuracy minus another's on the same test images, with its 95 % interval."""
    first, second = (recall(_correct_file(job, row["key"]), row) for row in (found, other))
    result = paired_difference(first, second)
    return {"difference": result.difference, "interval": list(result.interval)}


def _correct_file(job: Job, key: str) -> Path:
    return job.run.inside("baselines", f"{key}.safetensors")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        paired = row["paired"] or {"difference": 0.0, "interval": [0.0, 0.0]}
        widths = " ".join(f"{width}:{count}" for width, count in row["weight_widths"].items())
        low, high = row["interval"]
        values = {name: row[name] for name in COLUMNS if name in row}
        differences = dict(zip(COLUMNS[9:12], (paired["difference"], *paired["interval"]), strict=True))
        writer.writerow({**values, "low": low, "high": high, **differences, "weight_widths": widths})
    return text.getvalue()
