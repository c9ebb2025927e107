"""What does a mixture of 8-bit integers and bfloat16 gain on this CPU? Engines of one network between bfloat16 and INT8, timed in turns.

    python benchmarks/mixed_latency.py mobilenet_v2 --data-root DATA --checkpoints DIR [--rounds 30] [--policies 40]

Networks: ``resnet18`` (224 pixels, latency only: no checkpoint), ``mobilenet_v2`` (224 pixels, 500 validation images), ``cifar_resnet20``
(10,000 test images) and ``transformer`` (one block of width 768 at batch 1: one token and 128). A latency table is measured and fitted,
budgets between the fastest and the bfloat16 engine are spent by exact allocation (what is least harmful by KL divergence becomes
integers; without weights, what has fewest MACs), and all engines run in turns, single-threaded, batch 1. Ratios are over the bfloat16
engine, paired by round. Accuracy is of the exported engine itself, beside how often it answers as the float network does and, paired over
images, how far it is from the INT8 engine. Adds rows to results/mixed-latency.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from post_training import NETWORKS
from record import RESULTS, environment, mean_interval, write
from torch import Tensor, nn

from bitwright import export, load_data, models, parse_budget, quantize, trace
from bitwright.data import Data
from bitwright.evaluation import Evaluation, paired_difference, score
from bitwright.exporters.openvino import compile_model, read
from bitwright.latency import Table, measure_table, uniform_policies
from bitwright.methods.kl import KL
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, build_choices
from bitwright.quant import QuantOptions
from bitwright.sensitivity import solve
from bitwright.sites import Trace
from bitwright.targets import Target, get_target
from bitwright.timing import Stopwatch

SHARES = (0.75, 0.5, 0.25, 0.1)
"""Budgets: how far from the fastest to the bfloat16 engine, as predicted."""
SECONDS = 0.04
"""For how long an engine runs in one round."""
GAIN = 1.4


class Block(nn.Module):
    """One transformer block, its attention by `scaled_dot_product_attention`."""

    def __init__(self, width: int = 768, heads: int = 12):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, tokens, width] to the same."""
        n, tokens, width = x.shape
        h = self.before(x)
        q, k, v = (layer(h).view(n, tokens, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.project(attended)
        return x + self.narrow(nn.functional.gelu(self.widen(self.between(x))))


class Case:
    """A network in its place: model, sites, the classes it may run in, and images where it has weights."""

    def __init__(self, name: str, model: nn.Module, example: Tensor, data: Data | None, images: int = 0):
        self.name, self.model, self.example, self.data, self.images = name, model.eval(), example, data, images
        self.target: Target = get_target("openvino-x86")
        self.trace: Trace = trace(model, example)
        weights, inputs = (4, 8, 16) if name.startswith("transformer") else (8, 16), (8, 16)
        self.choices = self.target.restrict(self.trace, build_choices(self.trace, weights, inputs, pin_first="free", pin_last="free"))

    def uniform(self, bits: Bits) -> Policy:
        """Return the policy of one pair of widths, and of 16 bits where a site does not run it."""
        return Policy((s.name, bits if bits in self.choices[s.name] or bits.w > 16 else Bits(16, 16)) for s in self.trace.sites)

    def harms(self) -> dict[str, Tensor]:
        """Return what each choice of each site costs in accuracy: KL divergence, or, without weights, the MACs that are not in bfloat16."""
        if self.data is not None:
            free = parse_budget("bitops<=W16A16", self.trace.sites, pins={})
            return KL(images=min(self.images, len(self.data.selection)), batchnorm=False).scores(
                Problem(self.model, self.trace, self.choices, free, self.data)
            )
        return {s.name: torch.tensor([float(s.macs * (32 - sum(b))) for b in self.choices[s.name]]) for s in self.trace.sites}

    def mixtures(self, table: Table) -> dict[str, Policy]:
        """Return the policies of budgets between the fastest engine and the bfloat16 one."""
        harms, found = self.harms(), {}
        least = min(table.predict(policy) for policy in uniform_policies(table.classes))
        most = table.predict({s.name: Bits(16, 16) for s in self.trace.sites})
        for share in SHARES:
            limit = round(least + share * (most - least))
            budget = parse_budget(f"latency<={limit}ns", self.trace.sites, pins={}, costs=(table,))
            found[f"mixed {share:g}"] = solve(Problem(self.model, self.trace, self.choices, budget, self.data), harms)
        return found

    def answers(self, policy: Policy) -> Tensor:
        """Return the logits of the exported engine on the test images, [n, classes]."""
        assert self.data is not None
        options = QuantOptions(points=self.target.points)
        calibration = self.data.example(self.images)
        network = quantize(self.model, policy, calibration=calibration, sites=self.trace.sites, options=options)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            export(network, "openvino", path, example=calibration[:1], policy=policy)
            layers = {layer: policy[site.name] for site in self.trace.sites for layer in site.layers}
            compiled = compile_model(read(path, path.with_suffix(".bin")), layers)
            port = compiled.outputs[0]
            found = [np.array(compiled([x[None].numpy()])[port]) for batch, _ in self.data.test.batches(100) for x in batch]
        return torch.from_numpy(np.concatenate(found))


def cases(name: str, arguments: argparse.Namespace) -> list[Case]:
    """Return the case, or cases, of a name."""
    generator = torch.Generator().manual_seed(0)
    if name == "transformer":
        torch.manual_seed(0)
        block = Block()
        return [Case(f"transformer, tokens {n}", block, torch.randn(2, n, 768, generator=generator), None) for n in (1, 128)]
    if name == "resnet18":
        torch.manual_seed(0)
        return [Case(name, models.build(name), torch.rand(2, 3, 224, 224, generator=generator), None)]
    network = NETWORKS[name]
    data = load_data(network.data, arguments.data_root, held_out=network.held_out, seed=0, **network.options)
    model = network.make(arguments.checkpoints / network.file)
    return [Case(name, model, data.example(), data, network.images)]


def race(stopwatch: Stopwatch, policies: dict[str, Policy], rounds: int) -> dict[str, list[float]]:
    """Return each engine's milliseconds, the median of each round, all engines in turns."""
    runs: dict[str, Callable[[], Any]] = {label: stopwatch.prepare(policy) for label, policy in policies.items()}
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            run()
            own: list[int] = []
            while len(own) < 3 or sum(own) < SECONDS * 1e9:
                start = time.perf_counter_ns()
                run()
                own.append(time.perf_counter_ns() - start)
            taken[label].append(float(np.median(own)) / 1e6)
    return taken


def rows_of(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a case and return a row an engine."""
    table = measure_table(
        case.model, case.trace, case.example, case.target, case.choices, policies=arguments.policies, judged=arguments.judge
    )
    policies = {"float32": case.uniform(Bits(32, 32)), "bf16": case.uniform(Bits(16, 16)), "int8": case.uniform(Bits(8, 8))}
    if case.name.startswith("transformer"):
        policies |= {"bf16 by int8": case.uniform(Bits(8, 16)), "bf16 by int4": case.uniform(Bits(4, 16))}
    policies |= case.mixtures(table)
    taken = race(Stopwatch(case.model, case.trace, case.example, case.target), policies, arguments.rounds)
    errors = table.errors()
    judged = {"judged": len(errors), "median_error": float(np.median(errors)), "worst_error": max(errors)} if errors else {}
    scores: dict[str, Evaluation] = {}
    answers: dict[str, Tensor] = {}
    if case.data is not None:
        labels = torch.cat([y for _, y in case.data.test.batches(100)])
        with torch.no_grad():
            answers["float32"] = torch.cat([case.model(x) for x, _ in case.data.test.batches(100)])
        for label, policy in policies.items():
            if label != "float32":
                answers[label] = case.answers(policy)
            scores[label] = score(answers[label], labels, case.data.classes)
    rows = []
    for label, policy in policies.items():
        ratio = mean_interval([slow / own for slow, own in zip(taken["bf16"], taken[label], strict=True)])
        over = mean_interval([slow / own for slow, own in zip(taken["int8"], taken[label], strict=True)])
        known = [site.name for site in case.trace.sites if policy[site.name] in case.choices[site.name]]
        classes = [table.classes[name][policy[name]] for name in known]
        row = {
            "network": case.name,
            "engine": label,
            "sites": " ".join(f"{classes.count(kind)}x{kind.replace(' ', '-')}" for kind in dict.fromkeys(classes)),
            "ms": round(float(np.percentile(taken[label], 10)), 4),
            "predicted_ms": round(table.predict(policy) / 1e6, 4) if len(known) == len(policy) else "",
            "rounds": arguments.rounds,
            "times_bf16": round(ratio["mean"], 4),
            "times_bf16_interval": round(ratio["interval"], 4),
            "times_int8": round(over["mean"], 4),
            "times_int8_interval": round(over["interval"], 4),
            "goal": ratio["mean"] - ratio["interval"] >= GAIN if label.startswith("mixed") else "",
            **judged,
        }
        if label in scores:
            result, difference = scores[label], paired_difference(scores[label], scores["int8"])
            row |= {"n": result.n, "top1": result.top1, "top1_low": result.interval[0], "top1_high": result.interval[1]}
            row |= {"agreement": float((answers[label].argmax(1) == answers["float32"].argmax(1)).float().mean())}
            low, high = difference.interval
            row |= {"over_int8": difference.difference, "over_int8_low": low, "over_int8_high": high}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure the networks that are named and add their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=["resnet18", "mobilenet_v2", "cifar_resnet20", "transformer"])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--checkpoints", type=Path, help="folder of the public checkpoints")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--policies", type=int, help="timed to fit the table on; by default two a site")
    parser.add_argument("--judge", type=int, default=20, help="further policies that the table is judged on")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made_by = environment()
    for name in arguments.networks:
        for case in cases(name, arguments):
            load = os.getloadavg()[0]
            rows = [{**row, "load": load, **made_by} for row in rows_of(case, arguments)]
            if arguments.no_write:
                continue
            file = RESULTS / "mixed-latency.csv"
            old = [row for row in csv.DictReader(file.open()) if row["network"] != case.name] if file.is_file() else []
            columns = dict.fromkeys(key for row in [*old, *rows] for key in row)
            print(write("mixed-latency", [{key: row.get(key, "") for key in columns} for row in [*old, *rows]]))


if __name__ == "__main__":
    main()
