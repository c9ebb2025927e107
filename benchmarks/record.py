"""Rows of results: every row says which commit, machine and versions it came from."""

from __future__ import annotations

import csv
import math
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import bitwright

RESULTS = Path(__file__).resolve().parent.parent / "results"
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % points of Student's t, by degrees of freedom; 1.96 beyond."""


def environment() -> dict[str, str]:
    """Return commit, hardware and versions."""
    root = RESULTS.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = f"python {platform.python_version()} torch {torch.__version__} bitwright {bitwright.__version__}"
    return {"commit": commit + ("+" if changed else ""), "hardware": device, "versions": versions}


def _processor() -> str:
    """Return the processor's name and the number of its logical cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name} x{sum(line.startswith('processor') for line in lines) or 1}"


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Return n, mean and the half-width of its 95 % interval (Student's t; nan for one value)."""
    n = len(values)
    half = T95.get(n - 1, 1.96) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return {"n": n, "mean": statistics.fmean(values), "interval": half}


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows to ``results/NAME.csv``, in place of what was there, and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
