"""Every search method at equal budgets and equal fine-tuning: accuracy with intervals, search cost, and which differences are significant.

    python benchmarks/compare_methods.py --data-root DATA --resnet20 RESNET20.th --resnet8 RESNET8.npz [--seeds 0 1 2]

Two networks on CIFAR-10, the public ResNet-20 (91.73 %) and MLPerf Tiny's ResNet-8; four budgets: the BitOps of uniform W4A4, W3A3
and W2A2 with weights of 1 to 8 and activations of 2 to 8 bits, and 2 bits a weight with float activations. The ends stay at 8 bits.
In a short stage every method is fine-tuned for ``--short`` steps of 128 images, in a long one the five that are best on the 2,000
held-out images, and uniform, for ``--long`` steps; all against the float network's soft labels. A seed is a split, a search and a
training. Searches that train, sample or evolve get about 46,000 sample-passes each, one for each training image, instead of their
defaults, so that none is given more than another; the others take what they need. ``--long 0`` leaves the long stage out.
``--search-steps 480`` gives sdq, seam, edmips and fracbits another length than these 120 steps, in runs and files of their own: what a
longer search brings.

The work is one `bitwright compare` a network and kind of budget, under ``--runs``. The same command goes on after a kill, and several
processes that run it at once share the work. Writes results/compare-cifar10-resnet20.csv and results/compare-resnet8.csv (a row a
seed, and rows of means with the difference to uniform, its corrected interval and p-value); ``--no-write`` leaves that to another
process. Rows of budgets that are not asked for stay in the file. Settings for a try: --short 2 --long 2 --set data.held_out=500.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, environment, write

from bitwright.compare import compare
from bitwright.methods import available
from bitwright.progress import Progress

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10-resnet20": {"model": "cifar_resnet20", "options": {}, "lr": 0.04},
    # Its input is 0 to 255, not normalised, and at 0.04 its training goes astray.
    "resnet8": {"model": "resnet8", "options": {"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3}, "lr": 0.01},
}
BUDGETS: dict[str, dict[str, Any]] = {
    "bitops": {
        "budgets": ["bitops<=W4A4", "bitops<=W3A3", "bitops<=W2A2"],
        "weights": [1, 2, 3, 4, 5, 6, 8],
        "activations": [2, 3, 4, 6, 8],
    },
    # The ends alone lift uniform 2 bits above an average of 2, so uniform is 1 bit there; W2A32 is a budget that uniform 2 bits keep.
    "weights": {"budgets": ["weight_bits<=2", "weight_bits<=W2A32"], "weights": list(range(1, 9)), "activations": [32]},
}
STEPS = 120
"""Steps of a search that trains; with 128 images each, forward and backward, about 46,000 sample-passes."""
TRAINED = ("sdq", "seam", "edmips", "fracbits")
LIMPQ = {"epochs": 1, "max_steps": 15}  # a step passes its batch once per width, and once more
SAMPLED: dict[str, dict[str, Any]] = {
    "haq": {"episodes": 60},
    "evolution": {"trials": 90},
}
FAST = {"precision": "bfloat16", "compile": True, "channels_last": True}


def recipe_of(network: str, kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of a network and a kind of budget."""
    settings, budgets = NETWORKS[network], BUDGETS[kind]
    methods = arguments.methods or list(available())
    fast = FAST if arguments.fast else {}
    trained = {"epochs": 1 + arguments.search_steps // 375, "max_steps": arguments.search_steps, "lr": 0.01, **fast}
    options = {**dict.fromkeys(TRAINED, trained), "limpq": {**LIMPQ, **fast}, **SAMPLED}
    section = {
        "methods": methods,
        "seeds": arguments.seeds,
        "budgets": [text for text in budgets["budgets"] if text in arguments.budgets],
        "options": {name: own for name, own in options.items() if name in methods},
        "short": {"max_steps": arguments.short},
        **({"long": {"max_steps": arguments.long}} if arguments.long else {}),
        "best": 5,
    }
    tuned = {"epochs": 1, "batch_size": 128, "lr": settings["lr"], "weight_decay": 2.5e-5, "low_bit_decay": False, **fast}
    return {
        "name": f"compare-{network}-{kind}",
        "threads": 1,
        "data": {"name": "cifar10", "held_out": 2000, "options": settings["options"]},
        "model": {"name": settings["model"], "weights": str(getattr(arguments, network.rpartition("-")[2]))},
        "search": {"budgets": budgets["budgets"][:1], "weights": budgets["weights"], "activations": budgets["activations"]},
        "quantize": {"correct": ["batchnorm"]},
        "finetune": tuned,
        "teacher": "float",
        "compare": section,
    }


def file_of(network: str, arguments: argparse.Namespace) -> str:
    """Return the name of a network's result file."""
    return f"compare-{network}" + ("" if arguments.search_steps == STEPS else f"-{arguments.search_steps}-steps")


def with_others(name: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows and, from the file that is there, those of other budgets, in the order of the budgets."""
    file, new = RESULTS / f"{name}.csv", {row["budget"] for row in rows}
    if file.is_file():
        with file.open(newline="") as opened:
            rows = rows + [row for row in csv.DictReader(opened) if row["budget"] not in new]
    order = [text for kind in BUDGETS.values() for text in kind["budgets"]]
    return sorted(rows, key=lambda row: order.index(row["budget"]))


def rows_of(title: str, directory: Path) -> list[dict[str, str]]:
    """Return the rows of a comparison's table."""
    with (directory / "compare.csv").open(newline="") as file:
        return [{**row, "network": title} for row in csv.DictReader(file)]


def main() -> None:
    """Compare for every network that has a checkpoint, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--resnet20", type=Path, help="checkpoint; without it this network is left out")
    parser.add_argument("--resnet8", type=Path, help="checkpoint; without it this network is left out")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--short", type=int, default=100, help="steps of the first stage (default: 100)")
    parser.add_argument("--long", type=int, default=375, help="steps of the second stage (default: 375, an epoch)")
    parser.add_argument("--search-steps", type=int, default=STEPS, help=f"of searches that train (default: {STEPS})")
    parser.add_argument("--methods", nargs="+", help="by default all there are")
    every = [text for kind in BUDGETS.values() for text in kind["budgets"]]
    parser.add_argument("--budgets", nargs="+", choices=every, default=every[:-1], help="by default all but the last")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipes; may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-fast", dest="fast", action="store_false", help="float32, not compiled")
    parser.add_argument("--no-write", action="store_true", help="only run; another process writes the rows")
    arguments = parser.parse_args()
    made_by = environment()  # of the code that runs, whatever is committed meanwhile
    for network in NETWORKS:
        if getattr(arguments, network.rpartition("-")[2]) is None:
            continue
        rows = []
        for kind in [kind for kind, settings in BUDGETS.items() if set(settings["budgets"]) & set(arguments.budgets)]:
            out = arguments.runs / f"{file_of(network, arguments)}-{kind}"
            place = {"data_root": arguments.data_root, "device": arguments.device, "log": Progress(sys.stderr)}
            recipe = recipe_of(network, kind, arguments)
            for table in compare(recipe, out, overrides=arguments.set, made_by=made_by, **place)["tables"]:
                print(f"{network}, {table['budget']}, {table['stage']}:", *table["sentences"], sep="\n  ", flush=True)
            longer = "" if arguments.search_steps == STEPS else f", searches of {arguments.search_steps} steps"
            rows += rows_of(f"{network}{longer}", out)
        if not arguments.no_write:
            name = file_of(network, arguments)
            print(write(name, with_others(name, rows)))


if __name__ == "__main__":
    main()
