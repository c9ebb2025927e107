"""FPGA: mixed-width networks as QONNX files and as hls4ml circuits, on the digits and on ResNet-20.

1. A perceptron and a convolutional network learn the digits; their widths come from Fisher sensitivities within a budget of bit
   operations; they are fine-tuned with power-of-two scales, written as QONNX, converted by hls4ml and compiled with g++. Every test image
   goes through the C simulation, and its outputs are compared bit for bit.
2. QONNX's own inference cost is compared with `bitops`, site by site, for those and for a ResNet-20 of random widths 1 to 8.

    python benchmarks/fpga.py [NETWORK …]   # needs pip install 'bitwright[fpga]' and g++; five minutes on one slow core
"""

from __future__ import annotations

import csv
import importlib.metadata
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from record import RESULTS, environment, write
from torch import Tensor, nn

from bitwright import models
from bitwright.costs import BitOps, WeightBits, parse_budget
from bitwright.data import Data, load_data
from bitwright.driver import search
from bitwright.exporters import export
from bitwright.exporters.qonnx import costs_by_site, inference_costs
from bitwright.fpga import compare, on_input_grid, simulate, to_hls4ml
from bitwright.methods import get_method
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, build_choices
from bitwright.quant import quantize
from bitwright.quant.convert import QuantOptions
from bitwright.sites import Trace, trace

BUDGET = "bitops<=W4A4"
OPTIONS = QuantOptions(scales="power_of_two", per_channel=False)


def perceptron() -> nn.Module:
    """Return a network of four linear layers."""
    layers = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    """Return a network of three convolutions and a linear layer."""
    convolutions = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(12, 10))


CIRCUITS = {"perceptron": perceptron, "convolutional": convolutional}
RESIDUAL = "cifar_resnet20"


def main(names: Sequence[str]) -> None:
    """Write results/fpga.csv and results/qonnx-cost.csv; rows of networks that are not named stay."""
    data = load_data("digits", None, held_out=200, seed=0)
    versions = {name: importlib.metadata.version(name) for name in ("qonnx", "hls4ml", "onnxruntime")}
    place = {**environment(), "tools": " ".join(f"{name} {version}" for name, version in versions.items())}
    for name in names or (*CIRCUITS, RESIDUAL):
        rows, counted = ([], residual()) if name == RESIDUAL else circuit(name, CIRCUITS[name], data)
        for file, new in (("fpga", rows), ("qonnx-cost", counted)):
            print(write(file, [*_others(file, name), *({**row, **place} for row in new)]))


def _others(file: str, name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{file}.csv"
    return [row for row in csv.DictReader(path.read_text().splitlines()) if row["network"] != name] if path.is_file() else []


def circuit(name: str, build: Callable[[], nn.Module], data: Data) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Train, search, fine-tune, export, convert, compile, compare."""
    torch.manual_seed(0)
    fit, test = (on_input_grid(split.batch(torch.arange(len(split)), None)[0]) for split in (data.fit, data.test))
    labels, wanted = (split.batch(torch.arange(len(split)), None)[1] for split in (data.fit, data.test))
    net = trained(build(), fit, labels, 60, 0.01)
    traced = trace(net, fit[:1])
    pins = {site: Bits(8, 8) for site in (traced.first, traced.last)}
    choices = build_choices(traced, range(2, 9), range(2, 9))
    problem = Problem(net, traced, choices, parse_budget(BUDGET, traced.sites, pins=pins), data, seed=0)
    policy = search(problem, get_method("fisher")()).policy
    quantized = trained(quantize(net, policy, calibration=fit, options=OPTIONS), fit, labels, 20, 0.002)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.qonnx"
        artefact = export(quantized, "qonnx", file, example=test[:32], policy=policy)
        counted = compared_costs(name, file, traced, policy)
        made = to_hls4ml(file, Path(folder) / "project")
        began = time.perf_counter()
        seen = compare(made, quantized, test)
        seconds = time.perf_counter() - began
        answers = simulate(made, test)
    with torch.no_grad():
        floats, ours = (model.eval()(test).argmax(1) for model in (net, quantized))
    row = {
        "network": name,
        "policy": " ".join(f"{site}:W{bits.w}A{bits.a}" for site, bits in policy.items()),
        "average_weight_bits": f"{WeightBits().total(traced.sites, policy) / sum(s.weights for s in traced.sites):.3f}",
        "bitops": BitOps().total(traced.sites, policy),
        "float_top1": f"{accuracy(floats, wanted):.4f}",
        "quantized_top1": f"{accuracy(ours, wanted):.4f}",
        "c_simulation_top1": f"{accuracy(answers.argmax(1), wanted):.4f}",
        "qonnx_largest_difference": artefact.largest_difference,
        "images": seen.samples,
        "images_differing": seen.differing,
        "largest_difference": seen.largest,
        "compile_and_run_seconds": f"{seconds:.0f}",
    }
    return [row], counted


def trained(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> nn.Module:
    """Train with Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def accuracy(found: Tensor, wanted: Tensor) -> float:
    """Return the share of right answers."""
    return float((found == wanted).float().mean())


def residual() -> list[dict[str, object]]:
    """Compare costs on ResNet-20 with widths drawn from 1 to 8: cost depends on shapes and widths alone."""
    torch.manual_seed(0)
    net, images = models.build(RESIDUAL).eval(), torch.randn(8, 3, 32, 32)
    traced = trace(net, images)
    draw = torch.randint(1, 9, (len(traced.sites), 2)).tolist()
    policy = Policy((site.name, Bits(w, max(2, a))) for site, (w, a) in zip(traced.sites, draw, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet20.qonnx"
        quantized = quantize(net, policy, calibration=images, options=QuantOptions(scales="power_of_two"))
        export(quantized, "qonnx", file, example=images[:2], policy=policy)
        return compared_costs(RESIDUAL, file, traced, policy)


def compared_costs(name: str, file: Path, traced: Trace, policy: Policy) -> list[dict[str, object]]:
    """Return both counts of every site."""
    theirs = costs_by_site(inference_costs(file), traced.sites)
    return [
        {
            "network": name,
            "site": site.name,
            "bits": repr(policy[site.name]),
            "bitops": BitOps()(site, policy[site.name]),
            "qonnx_bops": int(theirs[site.name]),
        }
        for site in traced.sites
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
