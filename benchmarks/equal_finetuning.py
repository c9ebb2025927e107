"""Is the policy worth anything? The same short fine-tuning for SDQ's policy, uniform 2 bits, Fisher's and random ones of equal cost.

    python benchmarks/equal_finetuning.py --data-root DATA --weights RESNET20.th [--only sdq "random 1" …]

Takes the quick recipe's budget, data and learning rate, with 3 epochs on the labels (no teacher, so no blended images)
for every policy. ``--only``
runs some of the policies, so that several processes can share the work; without it whatever is missing is run and
results/equal-finetuning.csv is written: one row per policy and a row of the random mean, its
standard error, and SDQ's gap in standard errors. ``uniform W2`` has the pinned ends beside its 2 bits and so costs 0.02 bits more
than the budget of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from record import environment, write

from bitwright.driver import search
from bitwright.evaluation import evaluate
from bitwright.job import Job
from bitwright.methods import get_method
from bitwright.pipeline import run_stages
from bitwright.policy import Bits, Policy
from bitwright.recipe import load_recipe, make_options
from bitwright.runs import write_text_atomic
from bitwright.training import FinetuneOptions, finetune

RECIPE = "cifar10-resnet20-sdq-quick"
LABELS = ["sdq", "uniform W2", "fisher", *(f"random {k}" for k in range(1, 11))]


def policy_of(label: str, job: Job) -> Policy:
    """Return the policy of a label."""
    if label == "sdq":
        return job.policy
    if label == "uniform W2":
        pins = job.problem.pins
        return Policy((name, pins.get(name, Bits(2, 32))) for name in job.choices)
    name, _, number = label.partition(" ")
    problem = job.problem_of(job.network, job.recipe.seed * 1000 + int(number or 0), evaluate=lambda _: 0.0)
    return search(problem, get_method(name)()).policy


def measure(label: str, job: Job, options: FinetuneOptions, made_by: dict[str, str]) -> dict[str, Any]:
    """Fine-tune and evaluate a policy, unless that was done, and return its row."""
    file = job.run.inside("equal", f"{label.replace(' ', '-')}.json")
    if not file.exists():
        policy = policy_of(label, job)
        model = job.quantize(policy)
        finetune(model, job.data.fit, options, seed=job.recipe.seed)
        result = evaluate(model, job.data.test)
        costs = job.describe(policy)
        widths = " ".join(f"{w}:{c}" for w, c in costs["weight_widths"].items())
        row = {"policy": label, "n": result.n, "top1": result.top1, "low": result.interval[0], "high": result.interval[1]}
        row |= {name: costs[name] for name in ("average_weight_bits", "bitops", "size")} | {"weight_widths": widths}
        write_text_atomic(file, json.dumps({**row, "epochs": options.epochs, "seed": job.recipe.seed, **made_by}))
        print(row, flush=True)
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def main() -> None:
    """Run what is asked for; write the table when all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/equal-finetuning"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=LABELS)
    arguments = parser.parse_args()
    made_by = environment()  # of the code that runs, whatever is committed meanwhile
    recipe = load_recipe(RECIPE, [f"model.weights={arguments.weights}"])
    job = Job.open(recipe, arguments.out, data_root=arguments.data_root)
    run_stages(job, ["search"])
    options = make_options(FinetuneOptions, {**(recipe.finetune or {}), "mixup": 0.0, "epochs": arguments.epochs}, "finetune")
    rows = [measure(label, job, options, made_by) for label in arguments.only or LABELS]
    if arguments.only:
        return
    drawn = [row["top1"] for row in rows if row["policy"].startswith("random ")]
    error = statistics.stdev(drawn) / len(drawn) ** 0.5
    mean = {"policy": "random mean", "n": len(drawn), "top1": statistics.fmean(drawn), "standard_error": error}
    gap = {"policy": "sdq - random mean", "n": len(drawn), "top1": rows[0]["top1"] - mean["top1"]}
    print(write("equal-finetuning", [*rows, {**mean, **environment()}, {**gap, **environment(), "standard_errors": gap["top1"] / error}]))


if __name__ == "__main__":
    main()
