"""Time of a training step against float at its best in the same precision, interleaved in one run, on the CIFAR ResNet-20.

    python benchmarks/qat_step.py [--rounds 30] [--threads 1] [--device cpu] [--precision bfloat16]

The steps are those that the recipes run: forward, backward and optimizer, compiled, channels-last, batch 128 of random images.
A round times every variant once; a ratio is taken within a round. No variant may recompile while its widths change: that is an
error here. Writes results/qat-step.csv: median ratio of the rounds with its 95 % interval (order statistics), per variant.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from record import environment, write
from torch import nn

from bitwright.costs import parse_budget
from bitwright.data import TensorSplit
from bitwright.methods.sdq import SDQ
from bitwright.models import build
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.training.finetune import FinetuneOptions, build_loss, build_optimizer, set_memory_order

Step = Callable[[], None]


def training_step(model: nn.Module, options: FinetuneOptions, device: torch.device) -> Step:
    """Return one optimizer step on a fixed batch."""
    set_memory_order(model.train().to(device), channels_last=options.channels_last)
    loss_of, optimizer = build_loss(model, None, options), build_optimizer(model, options)
    x = torch.randn(128, 3, 32, 32, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if options.channels_last else x
    y, pull = torch.randint(0, 10, (128,), device=device), torch.zeros((), device=device)

    def step() -> None:
        loss = loss_of(x, y, pull)
        float(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def search_step(model: nn.Module, activations: tuple[int, ...], options: FinetuneOptions, device: torch.device) -> Step:
    """Return one step of SDQ's first phase; widths and gates change at every step."""
    found = trace(model, torch.zeros(1, 3, 32, 32))
    choices = build_choices(found, range(1, 9), activations)
    pins = {name: allowed[0] for name, allowed in choices.items() if len(allowed) == 1}
    split = TensorSplit(torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (1024,)), classes=10)
    budget = parse_budget("weight_bits<=2.5", found.sites, pins=pins)
    problem = Problem(model.to(device), found, choices, budget, SearchData(split, split))
    method = SDQ(epochs=1000, compile=True, channels_last=True, precision=options.precision)
    state = method.start(problem)

    def step() -> None:
        method.step(problem, state, None)

    return step


def variants(precision: str, device: torch.device) -> dict[str, Step]:
    """Return the steps to time, by name; ``float best`` is what the others are set against."""
    best = FinetuneOptions(lr=1e-4, compile=True, channels_last=True, precision=precision)
    names = [site.name for site in trace(build("cifar_resnet20"), torch.zeros(1, 3, 32, 32)).sites]
    images = torch.randn(64, 3, 32, 32)

    def net() -> nn.Module:
        return build("cifar_resnet20")

    def quantized(w: int, a: int) -> nn.Module:
        ends = Bits(8, 8 if a < 16 else 32)
        policy = Policy((name, ends if name in (names[0], names[-1]) else Bits(w, a)) for name in names)
        return quantize(net(), policy, calibration=images)

    return {
        "float best": training_step(net(), best, device),
        "float32 eager": training_step(net(), FinetuneOptions(lr=1e-4), device),
        "qat W2A32": training_step(quantized(2, 32), best, device),
        "qat W4A4": training_step(quantized(4, 4), best, device),
        "sdq search W": search_step(net(), (32,), best, device),
        "sdq search WA": search_step(net(), (2, 3, 4, 5, 6, 7, 8), best, device),
    }


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by order statistics (binomial, normal approximation)."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    low, high = ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]
    return statistics.median(ordered), low, high


def main() -> None:
    """Warm up, time the rounds and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    steps = variants(arguments.precision, torch.device(arguments.device))
    for step in steps.values():
        for _ in range(3):
            step()
    torch._dynamo.config.error_on_recompile = True
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["float best"], strict=True)]
        middle, low, high = median_interval(ratios)
        setting = {"precision": arguments.precision, "threads": arguments.threads, "device": arguments.device}
        rows.append({"variant": name, **setting, "n": len(ratios), "ratio": middle, "low": low, "high": high, **environment()})
        print(f"{name:16s} {middle:.3f} [{low:.3f}, {high:.3f}]  {statistics.median(values) * 1e3:.0f} ms", flush=True)
    print(write(f"qat-step-{arguments.device}-{arguments.precision}", rows))


if __name__ == "__main__":
    main()
