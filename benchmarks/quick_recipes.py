"""Accuracy of the quick CIFAR-10 recipes from the public 91.73 % ResNet-20: three seeds, the last epoch's network, whole test set.

    python benchmarks/quick_recipes.py --data-root DATA --weights RESNET20.th [--seeds 0 1 2] [--recipes …] [--set …] [--runs runs]

Runs that are in ``--runs`` already are not repeated, so several processes may share the work and a last one write the rows.
Writes results/quick-recipes.csv: a row per seed and a row of the mean with its 95 % interval (Student's t over seeds).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from record import environment, mean_interval, write

from bitwright.pipeline import run

RECIPES = ("cifar10-resnet20-sdq-quick", "cifar10-resnet20-sdq-quick-a4")


def measure(recipe: str, seed: int, arguments: argparse.Namespace, made_by: dict[str, str]) -> dict[str, Any]:
    """Run a recipe with a seed, unless that was done, and return its row."""
    name = "-".join([recipe, *arguments.set, f"seed{seed}"])
    out, file = arguments.runs / name, arguments.runs / f"{name}.row.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    overrides = [f"seed={seed}", f"model.weights={arguments.weights}", f"threads={arguments.threads}", *arguments.set]
    run(recipe, out, data_root=arguments.data_root, overrides=overrides)
    evaluation = json.loads((out / "evaluation.json").read_text())
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    search = json.loads((out / "search.json").read_text())
    quantized, full = evaluation["quantized"], evaluation["float"]
    row = {
        "recipe": recipe,
        "changed": " ".join(arguments.set),
        "seed": seed,
        "epochs": yaml.safe_load((out / "recipe.yaml").read_text())["finetune"]["epochs"],
        "threads": arguments.threads,
        "n": quantized["n"],
        "top1": quantized["top1"],
        "float_top1": full["top1"],
        "average_weight_bits": quantized["average_weight_bits"],
        "average_activation_bits": quantized["average_activation_bits"],
        "bitops": quantized["bitops"],
        "size": quantized["size"],
        "weight_widths": " ".join(f"{w}:{c}" for w, c in quantized["weight_widths"].items()),
        "search_seconds": round(search["seconds"], 1),
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        **made_by,
    }
    file.write_text(json.dumps(row))
    return row


def main() -> None:
    """Measure, and write the rows once all are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="only run; another process writes the rows")
    arguments = parser.parse_args()
    made_by = environment()  # of the code that runs, whatever is committed meanwhile
    rows = []
    for recipe in arguments.recipes:
        own = [measure(recipe, seed, arguments, made_by) for seed in arguments.seeds]
        summary = mean_interval([row["top1"] for row in own])
        rows += [*own, {**own[-1], "seed": "mean", "n": summary["n"], "top1": summary["mean"], "interval": summary["interval"]}]
        print(recipe, [row["top1"] for row in own], summary, flush=True)
    if not arguments.no_write:
        print(write("quick-recipes", rows))


if __name__ == "__main__":
    main()
