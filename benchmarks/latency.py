"""Is latency predicted well enough to spend as a budget? Judged on policies that nothing was fitted on.

    python benchmarks/latency.py cifar_resnet20 3x32x32 openvino-x86 --policies 40 --judge 20

A row of results/latency.csv: how far predictions of whole networks are from measurements (median and worst), and what the uniform
networks take. Wanted: at most 10 % in the median and 25 % at worst.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, environment, write

from bitwright import models
from bitwright.latency import Table, measure_table
from bitwright.problem import build_choices
from bitwright.sites import trace
from bitwright.targets import get_target

MEDIAN, WORST = 0.10, 0.25


def measured(name: str, shape: str, target_name: str, policies: int | None, judged: int, seed: int) -> Table:
    model = models.build(name).eval()
    example = torch.rand(2, *map(int, shape.split("x")), generator=torch.Generator().manual_seed(seed))
    traced, target = trace(model, example), get_target(target_name)
    widths = (8, 16) if target.latency == "openvino" else (8, 32)
    choices = target.restrict(traced, build_choices(traced, widths, widths, pin_first="free", pin_last="free"))
    return measure_table(model, traced, example, target, choices, policies=policies, judged=judged, seed=seed, log=print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shape", metavar="CxHxW")
    parser.add_argument("target")
    parser.add_argument("--policies", type=int)
    parser.add_argument("--judge", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="also write the latency table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = measured(arguments.model, arguments.shape, arguments.target, arguments.policies, arguments.judge, arguments.seed)
    if arguments.table is not None:
        table.save(arguments.table)
    errors = table.errors()
    kinds = list(dict.fromkeys(kind for known in table.terms.values() for kind in known))
    row = {
        "model": arguments.model,
        "shape": arguments.shape,
        "target": table.target,
        "runtime": table.machine["runtime"],
        "processor": table.machine["processor"],
        "fitted": len(table.fitted),
        "n": len(errors),
        "median_error": round(float(np.median(errors)), 4),
        "worst_error": round(max(errors), 4),
        "kept": float(np.median(errors)) <= MEDIAN and max(errors) <= WORST,
        "uniform_ms": " ".join(f"{kind}:{timing.typical / 1e6:.4f}" for kind, timing in zip(kinds, table.fitted, strict=False)),
        "clock": "wall, one thread, tenth percentile of the runs",
    }
    row = {"load": os.getloadavg()[0], **row, **environment()}
    file = RESULTS / "latency.csv"
    old = list(csv.DictReader(file.open())) if file.is_file() else []
    kept = [other for other in old if (other["model"], other["target"]) != (row["model"], row["target"])]
    write("latency", [*kept, row])
    print(row)


if __name__ == "__main__":
    main()
