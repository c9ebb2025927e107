"""Transfer of policies that SEAM finds on proxy data sets, and whether the certificate's verdict foretells it.

    python benchmarks/transfer.py --data-root DATA --weights RESNET20.th [--arms …] [--finetune EPOCHS] [--runs runs/transfer]

Every arm searches with the same method and steps; proxies of 2,000 images (4 % of CIFAR-10's 50,000): good ones (CIFAR-10 itself,
CIFAR-100, Fashion-MNIST), the same without the margin term, bad ones (noise, constant, labels shuffled, one class, blurred, grey, 40
images), and the target itself. Beside them: uniform, and 20 random policies within the same budget. Measured on the target: the
loss before any training, and with --finetune the test accuracy after so many epochs on the labels, the same for every policy, with
its paired difference to the policy searched on the target. Row files in --runs let several processes share the work.
Writes results/transfer.csv.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor

from bitwright import evaluate, finetune, load_data, parse_budget, quantize, runs, search, trace
from bitwright.certificate import certify
from bitwright.data import Data, TensorSplit
from bitwright.evaluation import Evaluation, paired_difference
from bitwright.methods.random import Random
from bitwright.methods.seam import SEAM
from bitwright.models import build, load_weights
from bitwright.policy import Policy
from bitwright.problem import Problem, build_choices
from bitwright.proxy import adapt, reduced
from bitwright.training import FinetuneOptions

IMAGES = 2000
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


def proxy_data(arm: str, root: Path, seed: int) -> Data:
    """Return the images of a proxy."""
    images = 40 if arm == "tiny" else IMAGES
    name, change = CHANGES.get(arm, ("cifar100" if arm == "tiny" else arm, None))
    data = reduced(load_data(name, root, held_out=IMAGES, seed=seed), images, seed)
    return data if change is None else changed(data, change)


def policy_of(arm: str, target: Problem, arguments: argparse.Namespace, seed: int) -> tuple[Policy, dict[str, Any]]:
    """Search one arm's policy; return it with what the search cost and, for a proxy, the certificate."""
    method = SEAM(max_steps=arguments.steps, epochs=1000, batch_size=64, channels_last=True)
    started = time.process_time()
    if arm == "uniform":
        policy = target.uniform()
        assert policy is not None
        return policy, {}
    if arm.startswith("random "):
        problem = Problem(target.model, target.trace, target.choices, target.budgets, target._data, seed=seed * 1000 + int(arm[7:]))
        return search(problem, Random()).policy, {}
    if arm == "target":
        result = search(target, method)
        return result.policy, {"images": 50000, "sample_passes": result.sample_passes, "seconds": time.process_time() - started}
    plain = arm.removesuffix(" without margin")
    proxy = adapt(target.model, target.trace, (3, 32, 32), proxy_data(plain, arguments.data_root, seed), ADAPT, seed=seed)
    problem = target.on(proxy.model, proxy.data)
    result = search(problem, method if plain == arm else replace(method, margin=0.0))
    spent = {"sample_passes": result.sample_passes + proxy.sample_passes, "seconds": time.process_time() - started}
    content = certify(target, problem, result.policy)
    low, high = content["correlation"]["interval"]
    facts = {"correlation": content["correlation"]["value"], "correlation_low": low, "correlation_high": high, "safe": content["safe"]}
    foretold = {f"predicted_{name}": value for name, value in content["predicted"].items()}
    return result.policy, {"images": len(proxy.data.fit) + len(proxy.data.selection), **spent, **facts, **foretold}


def measure(arm: str, target: Problem, data: Data, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the row of an arm, unless it is known."""
    file = arguments.runs / f"{arm.replace(' ', '-')}-{seed}-{arguments.steps}-{arguments.finetune}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    policy, facts = policy_of(arm, target, arguments, seed)
    widths = " ".join(str(bits.w) for bits in policy.values())
    asked = {"arm": arm, "seed": seed, "budget": arguments.budget, "steps": arguments.steps}
    row = {**asked, **facts, "loss": target.loss(policy), "widths": widths}
    if arguments.finetune:
        network = quantize(target.model, policy, calibration=data.example(512), correct=("batchnorm",), sites=target.sites)
        options = FinetuneOptions(epochs=arguments.finetune, lr=0.02, precision="bfloat16", compile=True, channels_last=True)
        finetune(network, data.fit, options, seed=seed)
        result = evaluate(network, data.test)
        runs.save_tree(file.with_suffix(".safetensors"), {"correct": result.correct})
        row |= {"finetune_epochs": arguments.finetune, "top1": result.top1}
    file.write_text(json.dumps(row))
    print(row, flush=True)
    return row


def recorded(row: dict[str, Any], arguments: argparse.Namespace) -> Evaluation:
    """Return the evaluation of a row, as far as a paired difference needs it."""
    file = arguments.runs / f"{row['arm'].replace(' ', '-')}-{row['seed']}-{arguments.steps}-{arguments.finetune}.safetensors"
    correct = runs.load_tree(file)["correct"]
    return Evaluation(row["top1"], None, len(correct), 0.0, (0.0, 1.0), (), correct)


def main() -> None:
    """Measure every arm and write the rows."""
    without = [f"{name} without margin" for name in PROXIES[:3]]
    every = ["target", *PROXIES, *without, "uniform", *(f"random {k}" for k in range(1, RANDOM + 1))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--arms", nargs="+", default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", default="weight_bits<=3.03", help="just holds uniform 3 bits between ends of 8")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--finetune", type=int, default=0, help="epochs of the same fine-tuning for every policy; 0 leaves it out")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--no-write", action="store_true", help="only run; another process writes the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    made_by = environment()
    model = build(arguments.model)
    load_weights(model, arguments.weights)
    rows = []
    for seed in arguments.seeds:
        data = load_data("cifar10", arguments.data_root, held_out=5000, seed=seed)
        traced = trace(model.eval(), data.example())
        choices = build_choices(traced, range(1, 9), (32,))
        pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
        target = Problem(model, traced, choices, parse_budget(arguments.budget, traced.sites, pins=pins), data, seed=seed)
        own = [measure(arm, target, data, arguments, seed) for arm in arguments.arms]
        reference = next((row for row in own if row["arm"] == "target" and "top1" in row), None)
        for row in own:
            if reference is not None and "top1" in row:
                difference = paired_difference(recorded(row, arguments), recorded(reference, arguments))
                low, high = difference.interval
                row |= {"difference": difference.difference, "difference_low": low, "difference_high": high}
            rows.append({**row, "model": arguments.model, "threads": 1, "n": 1, **made_by})
    if not arguments.no_write:
        columns = dict.fromkeys(key for row in rows for key in row)
        print(write("transfer", [{name: row.get(name, "") for name in columns} for row in rows]))


if __name__ == "__main__":
    main()
