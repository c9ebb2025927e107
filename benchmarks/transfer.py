"""Transfer of policies that SEAM finds on proxy data sets: what it costs, and whether the certificate's verdict foretells it.

    python benchmarks/transfer.py --data-root DATA --weights RESNET20.th [--arms …] [--finetune EPOCHS] [--runs runs/transfer]
    python benchmarks/transfer.py --data-root DATA --model cifar_resnet56 --weights RESNET56.th --finetune 1
    python benchmarks/transfer.py --data-root DATA --target cifar100 --budget 'weight_bits<=W3A32' --finetune 1
        --weights runs/cifar100-resnet20-seam/float.safetensors
    python benchmarks/transfer.py --data-root DATA --target imagenette224 --model folded --weights MOBILENET_V2.npz --finetune 2
        --budget 'weight_bits<=W5A32'

Every proxy arm searches with the same method and steps. For CIFAR-10 proxies have 2,000 images (4 % of its 50,000): good ones
(CIFAR-10 itself, CIFAR-100, Fashion-MNIST), the same without the margin term, and bad ones (noise, constant, labels shuffled, one
class, blurred, grey, 40 images). For CIFAR-100 the proxy is 800 images of CIFAR-10 (4 % of the 20,000 there are); its float
network comes from `bitwright run cifar100-resnet20-seam`. For the 224-pixel subset proxies are 2,000 images of CIFAR: that tells of
transfer across size and stem, not of scale. Beside them: the same search on the target with as many steps ("target") and with one
pass over all of it ("target epoch"), uniform, and 20 random policies within the same budget. Measured on the target: the loss before
any training, and with --finetune the test accuracy after so many epochs on the labels, the same for every policy, with its paired
difference to "target epoch" (or "target"), with several seeds also of all together. A sample-pass is one image forward; backward counts
two more. Seconds are processor time. Row files in --runs let several processes share the work. Rows of other arms and seeds stay in the
file. Writes results/transfer.csv, or with --finetune results/transfer-TARGET-MODEL.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from folded import FoldedNetwork
from record import RESULTS, environment, write
from torch import Tensor

from bitwright import evaluate, finetune, load_data, parse_budget, quantize, runs, search, trace
from bitwright.certificate import certify
from bitwright.data import Data, TensorSplit
from bitwright.evaluation import Evaluation, over_seeds, paired_difference
from bitwright.methods.random import Random
from bitwright.methods.seam import SEAM
from bitwright.models import build, load_weights
from bitwright.policy import Policy
from bitwright.problem import Problem, build_choices
from bitwright.proxy import adapt, reduced
from bitwright.training import FinetuneOptions

MADE_BY = environment()
"""Of the code that runs, whatever is committed meanwhile; kept with each result."""
ADAPT = FinetuneOptions(epochs=5, lr=0.02)
RANDOM = 20
Change = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def changed(data: Data, change: Change) -> Data:
    """Return a data set whose images (float, 0 to 1) and labels were changed."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for split in (data.fit, data.selection):
        assert isinstance(split, TensorSplit)
        images, labels = split.images[split._rows].float() / 255, split.labels[split._rows]
        images, labels = change(images, labels, generator)
        look = {"classes": split.classes, "mean": split.mean[: images.shape[1]], "std": split.std[: images.shape[1]]}
        splits.append(TensorSplit(images, labels, augment=split.augment, **look))
    return replace(data, fit=splits[0], selection=splits[1], shape=tuple(splits[0].images.shape[1:]))


def blurred(x: Tensor, y: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Average over 9 x 9 pixels."""
    return F.avg_pool2d(F.pad(x, (4, 4, 4, 4), mode="reflect"), 9, stride=1), y


CHANGES: dict[str, tuple[str, Change]] = {
    "noise": ("cifar10", lambda x, y, g: (torch.rand(x.shape, generator=g), y)),
    "constant": ("cifar10", lambda x, y, g: (torch.full_like(x, 0.5), y)),
    "shuffled labels": ("cifar10", lambda x, y, g: (x, y[torch.randperm(len(y), generator=g)])),
    "one class": ("cifar10", lambda x, y, g: (x, torch.zeros_like(y))),
    "blurred": ("cifar100", blurred),
    "grey": ("cifar100", lambda x, y, g: (x.mean(1, keepdim=True), y)),
}
PROXIES = ("cifar10", "cifar100", "fashion_mnist", *CHANGES, "tiny")
CENTRED = {"mean": [128 / 255] * 3, "std": [128 / 255] * 3, "labels": "imagenet"}


@dataclass(frozen=True)
class Target:
    """A target data set: what is held out of it, its proxies and how many images they have, and its fine-tuning."""

    held_out: int
    proxies: tuple[str, ...]
    images: int
    finetune: FinetuneOptions
    options: dict[str, Any] = field(default_factory=dict)
    adapt: FinetuneOptions = ADAPT


CIFAR = FinetuneOptions(lr=0.02, precision="bfloat16", compile=True, channels_last=True)
SMALL = FinetuneOptions(lr=0.001, batch_size=32, channels_last=True)
TARGETS = {
    "cifar10": Target(5000, PROXIES, 2000, CIFAR),
    "cifar100": Target(2000, ("cifar10",), 800, CIFAR),
    # a network without BatchNorms does not survive the others' learning rate
    "imagenette224": Target(100, ("cifar10", "cifar100"), 2000, SMALL, CENTRED, replace(ADAPT, lr=0.002)),
}


@dataclass(frozen=True)
class Bench:
    """A target in its place: the problem and data of one seed, and how rows about it are made."""

    target: Target
    problem: Problem
    data: Data
    seed: int
    arguments: argparse.Namespace

    def file(self, arm: str, kind: str) -> Path:
        """Return where something about an arm is kept."""
        arguments = self.arguments
        place = arguments.runs / f"{arguments.target}-{arguments.model}"
        place.mkdir(parents=True, exist_ok=True)
        return Path(place / f"{arm.replace(' ', '-')}-{self.seed}-{arguments.steps}{kind}")

    def searched(self, arm: str) -> tuple[Policy, dict[str, Any]]:
        """Return an arm's policy and what its search cost, unless they are known."""
        file = self.file(arm, ".search.json")
        if not file.exists():
            policy, facts = self._search(arm)
            known = {"facts": {**facts, "loss": self.problem.loss(policy)}, "made_by": MADE_BY}
            file.write_text(json.dumps({"policy": policy.to_json(), **known}))
        content = json.loads(file.read_text())
        return Policy.from_json(content["policy"]), content["facts"]

    def _search(self, arm: str) -> tuple[Policy, dict[str, Any]]:
        method = SEAM(max_steps=self.arguments.steps, epochs=1000, batch_size=64, channels_last=True)
        problem, started = self.problem, time.process_time()
        if arm == "uniform":
            policy = problem.uniform()
            assert policy is not None
            return policy, {}
        if arm.startswith("random "):
            seed = self.seed * 1000 + int(arm[7:])
            other = Problem(problem.model, problem.trace, problem.choices, problem.budgets, self.data, seed=seed)
            return search(other, Random()).policy, {}
        if arm in ("target", "target epoch"):
            result = search(problem, method if arm == "target" else replace(method, max_steps=None, epochs=1))
            spent = {"sample_passes": result.sample_passes, "seconds": time.process_time() - started}
            return result.policy, {"images": len(self.data.fit) + len(self.data.selection), **spent}
        plain = arm.removesuffix(" without margin")
        images = self.proxy_data(plain)
        proxy = adapt(problem.model, problem.trace, self.data.shape, images, self.target.adapt, seed=self.seed)
        source = problem.on(proxy.model, proxy.data)
        result = search(source, method if plain == arm else replace(method, margin=0.0))
        spent = {"sample_passes": result.sample_passes + proxy.sample_passes, "seconds": time.process_time() - started}
        content = certify(problem, source, result.policy)
        low, high = content["correlation"]["interval"]
        facts = {"correlation": content["correlation"]["value"], "correlation_low": low, "correlation_high": high, "safe": content["safe"]}
        foretold = {f"predicted_{name}": value for name, value in content["predicted"].items()}
        return result.policy, {"images": len(proxy.data.fit) + len(proxy.data.selection), **spent, **facts, **foretold}

    def proxy_data(self, arm: str) -> Data:
        """Return the images of a proxy."""
        images = 40 if arm == "tiny" else self.target.images
        name, change = CHANGES.get(arm, ("cifar100" if arm == "tiny" else arm, None))
        data = reduced(load_data(name, self.arguments.data_root, held_out=2000, seed=self.seed), images, self.seed)
        return data if change is None else changed(data, change)

    def measure(self, arm: str) -> dict[str, Any]:
        """Return the row of an arm."""
        policy, facts = self.searched(arm)
        arguments, problem = self.arguments, self.problem
        row = {"target": arguments.target, "arm": arm, "seed": self.seed, "budget": arguments.budget, "steps": arguments.steps, **facts}
        row["widths"] = " ".join(str(bits.w) for bits in policy.values())
        if arguments.finetune:
            file = self.file(arm, f"-{arguments.finetune}.json")
            if not file.exists():
                network = quantize(problem.model, policy, calibration=self.data.example(512), correct=("batchnorm",), sites=problem.sites)
                finetune(network, self.data.fit, replace(self.target.finetune, epochs=arguments.finetune), seed=self.seed)
                result = evaluate(network, self.data.test, batch_size=100)
                runs.save_tree(file.with_suffix(".safetensors"), {"correct": result.correct})
                figures = {"finetune_epochs": arguments.finetune, "n": result.n, "top1": result.top1}
                file.write_text(json.dumps({**figures, **MADE_BY}))
            row |= json.loads(file.read_text())
        else:
            row |= json.loads(self.file(arm, ".search.json").read_text())["made_by"]
        print(row, flush=True)
        return row

    def result(self, row: dict[str, Any]) -> Evaluation:
        """Return the evaluation of a row, as far as a paired difference needs it."""
        correct = runs.load_tree(self.file(row["arm"], f"-{self.arguments.finetune}.safetensors"))["correct"]
        return Evaluation(row["top1"], None, len(correct), 0.0, (0.0, 1.0), (), correct)

    def rows(self, arms: list[str]) -> list[dict[str, Any]]:
        """Return the rows of some arms; accuracies are compared with the search on the target."""
        own = [self.measure(arm) for arm in arms]
        whole = [row for name in ("target epoch", "target") for row in own if row["arm"] == name and "top1" in row]
        for row in own if whole else ():
            difference = paired_difference(self.result(row), self.result(whole[0]))
            low, high = difference.interval
            row |= {"compared_with": whole[0]["arm"], "difference": difference.difference, "difference_low": low, "difference_high": high}
        return own


def over(benches: list[Bench], arms: list[str]) -> list[dict[str, Any]]:
    """Return what each arm's accuracy differs by over several seeds, by the pigeonhole bootstrap over seeds and test images."""
    results = {arm: [bench.result(bench.measure(arm)) for bench in benches] for arm in arms}
    whole = next((arm for arm in ("target epoch", "target") if arm in arms), None)
    if whole is None:
        return []
    rows = []
    for arm in arms:
        own, other = ([result.correct for result in results[name]] for name in (arm, whole))
        estimate = over_seeds(own, other)
        low, high = estimate.interval() if arm != whole else (0.0, 0.0)
        first = benches[0]
        seeds = " ".join(str(bench.seed) for bench in benches)
        row = {"target": first.arguments.target, "arm": arm, "seed": f"mean of {seeds}", "budget": first.arguments.budget}
        row |= {"steps": first.arguments.steps, "finetune_epochs": first.arguments.finetune, "n": estimate.n}
        row |= {"top1": over_seeds(own).mean, "compared_with": whole}
        rows.append({**row, "difference": estimate.mean, "difference_low": low, "difference_high": high})
    return rows


def with_others(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows and, from the file that is there, those of other arms and seeds."""
    file, new = RESULTS / f"{name}.csv", {(row["arm"], str(row["seed"])) for row in rows}
    if not file.is_file():
        return rows
    with file.open(newline="") as opened:
        old: list[dict[str, Any]] = [row for row in csv.DictReader(opened) if (row["arm"], row.get("seed", "")) not in new]
    return sorted(old + rows, key=lambda row: str(row["seed"]))


def network_of(arguments: argparse.Namespace, classes: int) -> torch.nn.Module:
    """Return the trained float network."""
    if arguments.model == "folded":
        return FoldedNetwork(arguments.weights).eval()
    model = build(arguments.model, num_classes=classes)
    load_weights(model, arguments.weights)
    return model.eval()


def prepared(arguments: argparse.Namespace, seed: int) -> Bench:
    """Return the target of one seed in its place."""
    target = TARGETS[arguments.target]
    data = load_data(arguments.target, arguments.data_root, held_out=target.held_out, seed=seed, **target.options)
    model = network_of(arguments, data.classes)
    traced = trace(model, data.example())
    choices = build_choices(traced, range(1, 9), (32,))
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    problem = Problem(model, traced, choices, parse_budget(arguments.budget, traced.sites, pins=pins), data, seed=seed)
    return Bench(target, problem, data, seed, arguments)


def flags(description: str | None) -> argparse.ArgumentParser:
    """Return the options that say what is searched, and where."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--model", default="cifar_resnet20", help="a reference network, or `folded`: a graph file (benchmarks/folded.py)")
    parser.add_argument("--target", choices=list(TARGETS), default="cifar10")
    parser.add_argument("--arms", nargs="+", help="all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", default="weight_bits<=3.03", help="just holds uniform 3 bits in ResNet-20 with 10 classes")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--no-write", action="store_true", help="only run; another process writes the rows")
    return parser


def main() -> None:
    """Measure every arm and write the rows."""
    parser = flags(__doc__)
    parser.add_argument("--finetune", type=int, default=0, help="epochs of the same fine-tuning for every policy; 0 leaves it out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = TARGETS[arguments.target]
    good = [name for name in target.proxies if name not in (*CHANGES, "tiny")]
    proxies = [*(good if arguments.finetune else target.proxies), *(f"{name} without margin" for name in good)]
    whole = ["target", *(["target epoch"] if arguments.finetune else [])]
    arms = arguments.arms or [*whole, *proxies, "uniform", *(f"random {k}" for k in range(1, RANDOM + 1))]
    found, benches = [], []
    for seed in arguments.seeds:
        benches.append(prepared(arguments, seed))
        found += benches[-1].rows(arms)
    if arguments.finetune and len(benches) > 1:
        found += over(benches, arms)
    rows = [{**MADE_BY, **row, "model": arguments.model, "threads": 1} for row in found]
    if not arguments.no_write:
        name = f"transfer-{arguments.target}-{arguments.model}" if arguments.finetune else "transfer"
        rows = with_others(name, rows)
        columns = dict.fromkeys(key for row in rows for key in row)
        print(write(name, [{key: row.get(key, "") for key in columns} for row in rows]))


if __name__ == "__main__":
    main()
