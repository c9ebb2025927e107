"""Post-training quantization without labels: 512 images (96 of 224 pixels) choose widths and correct the network; nothing is trained.

    python benchmarks/post_training.py --data-root DATA --checkpoints DIR [--networks …] [--budgets …] [--no-ablation] [--runs runs/ptq]

For every network: the policy of label-free Fisher sensitivities at each average of weight bits over all layers, ends included, with
8-bit activations, and the strong uniform baseline, the same quantizer and the same corrections at one width everywhere. For the first
network also the worth of each step: the same policy at ``--ablated`` bits without it, and with it alone. Accuracies are on the
test images, beside the mean KL divergence from the float network there, which is far less noisy; differences of accuracy to uniform of
the same average are paired over images. A seed draws the 512 images. Seconds are processor time on one thread: search
(sensitivities and allocation) and quantization (calibration and corrections).
Writes results/post-training.csv; row files in --runs let several processes share the work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from folded import FoldedNetwork
from record import environment, write
from torch import Tensor, nn

from bitwright import load_data, parse_budget, quantize, runs, search, trace
from bitwright.data import Data
from bitwright.evaluation import Evaluation, paired_difference, score
from bitwright.methods.fisher import Fisher
from bitwright.models import build, load_weights
from bitwright.policy import Policy
from bitwright.problem import Problem, build_choices
from bitwright.quant.corrections import STEPS
from bitwright.sites import Trace

CORRECT = ("compensate", "rounding", "refine", "bias", "batchnorm")
ACTIVATION = 8
UNIFORM = (4, 3, 2)
BATCH = 100


@dataclass(frozen=True)
class Network:
    """A trained network: how it is made from its file, and the images it was trained on."""

    make: Callable[[Path], nn.Module]
    file: str
    data: str
    held_out: int
    options: dict[str, Any]
    correct: tuple[str, ...] = CORRECT
    images: int = 512


def loaded(name: str) -> Callable[[Path], nn.Module]:
    """Return what makes a reference network with the weights of a file."""

    def make(path: Path) -> nn.Module:
        model = build(name)
        load_weights(model, path)
        return model

    return make


RAW = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3}
CENTRED = {"mean": [128 / 255] * 3, "std": [128 / 255] * 3, "labels": "imagenet"}
NETWORKS = {
    "cifar_resnet20": Network(loaded("cifar_resnet20"), "akamaster_resnet20-12fca82f.th", "cifar10", 5000, {}),
    "cifar_resnet56": Network(loaded("cifar_resnet56"), "akamaster_resnet56-4bfd9763.th", "cifar10", 5000, {}),
    "resnet8": Network(loaded("resnet8"), "mlperf_tiny_resnet8.npz", "cifar10", 5000, RAW),
    # No more images at 224 pixels, as all of them pass through the network at once; it has no BatchNorm left.
    "mobilenet_v2": Network(FoldedNetwork, "mobilenet_v2_1.0_224_qat8.npz", "imagenette224", 20, CENTRED, ("equalize", *CORRECT[:-1]), 96),
}


@dataclass(frozen=True)
class Bench:
    """A network in its place: model, data and sites, and how rows about it are made."""

    name: str
    network: Network
    model: nn.Module
    data: Data
    trace: Trace
    seed: int
    folder: Path
    logits: Tensor

    def problem(self, budget: float) -> Problem:
        """Return the search problem of an average of weight bits over all layers."""
        choices = build_choices(self.trace, range(1, 9), (ACTIVATION,), pin_first="free", pin_last="free")
        budgets = parse_budget(f"weight_bits<={budget}", self.trace.sites, pins={})
        return Problem(self.model, self.trace, choices, budgets, self.data, seed=self.seed)

    def policy(self, budget: float) -> tuple[Policy, float]:
        """Return the policy that is found, and the seconds it took; it is kept in a file."""
        file = self.folder / f"{self.name}-{self.seed}-{budget}.policy.json"
        if not file.exists():
            started = time.process_time()
            found = search(self.problem(budget), Fisher(errors="second-order", block="channel", samples=self.network.images)).policy
            file.write_text(json.dumps({"policy": found.to_json(), "seconds": time.process_time() - started}))
        content = json.loads(file.read_text())
        return Policy.from_json(content["policy"]), content["seconds"]

    def measure(self, arm: str, policy: Policy, correct: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a policy and its corrections, unless it is known."""
        file = self.folder / f"{self.name}-{self.seed}-{arm.replace(' ', '-')}.json"
        if not file.exists():
            started = time.process_time()
            network = quantize(
                self.model, policy, calibration=self.data.example(self.network.images), correct=correct, sites=self.trace.sites
            )
            seconds = time.process_time() - started
            logits = logits_of(network, self.data)
            result = score(logits, torch.cat([y for _, y in self.data.test.batches(BATCH)]), self.data.classes)
            divergence = F.kl_div(logits.log_softmax(1), self.logits.log_softmax(1), reduction="batchmean", log_target=True)
            weights = sum(site.weights for site in self.trace.sites)
            average = sum(site.weights * policy[site.name].w for site in self.trace.sites) / weights
            row = {"network": self.name, "seed": self.seed, "arm": arm, "average_weight_bits": average, "activation_bits": ACTIVATION}
            row |= {"correct": " ".join(correct), "n": result.n, "top1": result.top1}
            row |= {
                "top1_low": result.interval[0],
                "top1_high": result.interval[1],
                "kl": float(divergence),
                "quantize_seconds": round(seconds, 1),
                **facts,
            }
            runs.save_tree(file.with_suffix(".safetensors"), {"correct": result.correct})
            file.write_text(json.dumps(row))
            print(
                self.name,
                self.seed,
                arm,
                f"{100 * result.top1:.2f} %",
                f"KL {row['kl']:.4f}",
                f"{average:.3f} bits",
                f"{seconds:.1f} s",
                flush=True,
            )
        known: dict[str, Any] = json.loads(file.read_text())
        return known

    def result(self, row: dict[str, Any]) -> Evaluation:
        """Return the evaluation of a row, as far as a paired difference needs it."""
        file = self.folder / f"{self.name}-{self.seed}-{row['arm'].replace(' ', '-')}.safetensors"
        return Evaluation(row["top1"], None, row["n"], 0.0, (0.0, 1.0), (), runs.load_tree(file)["correct"])


def logits_of(model: nn.Module, data: Data) -> Tensor:
    """Return what a network says of the test images, [n, classes]."""
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in data.test.batches(BATCH)])


def rows_of(bench: Bench, budgets: Sequence[float], ablated: float | None) -> list[dict[str, Any]]:
    """Return all rows of a network."""
    labels = torch.cat([y for _, y in bench.data.test.batches(BATCH)])
    correct, same = bench.network.correct, {"float_top1": score(bench.logits, labels, bench.data.classes).top1}
    rows = []
    for width in UNIFORM:
        policy = Policy({site.name: (width, ACTIVATION) for site in bench.trace.sites})
        rows.append(bench.measure(f"uniform {width}", policy, correct, same))
    uniform = {row["average_weight_bits"]: row for row in rows}
    for budget in budgets:
        policy, seconds = bench.policy(budget)
        widths = " ".join(str(bits.w) for bits in policy.values())
        row = bench.measure(f"fisher {budget}", policy, correct, {**same, "search_seconds": round(seconds, 1), "widths": widths})
        if budget in uniform:
            difference = paired_difference(bench.result(row), bench.result(uniform[budget]))
            low, high = difference.interval
            row |= {"over_uniform": difference.difference, "over_uniform_low": low, "over_uniform_high": high}
        rows.append(row)
    if ablated is not None:
        policy, _ = bench.policy(ablated)
        for step in STEPS:
            without = [name for name in STEPS if (name in correct) != (name == step)]
            rows.append(bench.measure(f"{'without' if step in correct else 'with'} {step}", policy, without, same))
            rows.append(bench.measure(f"only {step}", policy, [step], same))
        rows.append(bench.measure("none", policy, [], same))
    return rows


def main() -> None:
    """Measure every network and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the public checkpoints")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 3.5, 3.0, 2.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ablated", type=float, default=3.0)
    parser.add_argument("--no-ablation", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/ptq"))
    parser.add_argument("--no-write", action="store_true", help="only run; another process writes the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    made_by, rows = environment(), []
    for name in arguments.networks:
        network = NETWORKS[name]
        model = network.make(arguments.checkpoints / network.file).eval()
        for seed in arguments.seeds:
            data = load_data(network.data, arguments.data_root, held_out=network.held_out, seed=seed, **network.options)
            data = replace(data, fit=data.fit.take(network.images))
            bench = Bench(name, network, model, data, trace(model, data.example()), seed, arguments.runs, logits_of(model, data))
            ablated = None if arguments.no_ablation or (name, seed) != (arguments.networks[0], arguments.seeds[0]) else arguments.ablated
            rows += [{**row, "threads": 1, **made_by} for row in rows_of(bench, arguments.budgets, ablated)]
    if not arguments.no_write:
        columns = dict.fromkeys(key for row in rows for key in row)
        print(write("post-training", [{key: row.get(key, "") for key in columns} for row in rows]))


if __name__ == "__main__":
    main()
