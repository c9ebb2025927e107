"""Time of an adaptive training step against a static one, interleaved in one run, on the CIFAR ResNet-20.

    python benchmarks/adaptive_step.py [--rounds 20] [--threads 1] [--device cpu] [--precision bfloat16] [--eager]

The steps are those that the recipes run: forward, backward and optimizer, compiled, channels-last, batch 128 of random images.
``static W3A3`` is plain quantization-aware training; ``counterfactual`` runs the batch again with one site of each sample at another
width; ``pathwise`` computes the drawn width and one neighbour for every sample and site; ``drawn`` the drawn width alone (REINFORCE
and random bits). A round times every variant once, and a ratio is taken within a
round. No variant may recompile while widths and temperatures change: that is an error here. On one thread of a CPU the time is that of
the process, so that a busy machine does not disturb it. Writes results/adaptive-step-*.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from qat_step import median_interval, training_step
from record import environment, write
from torch import nn

from bitwright.adaptive.network import Mode, Space, adapt
from bitwright.adaptive.objective import forced_losses, sample_losses
from bitwright.adaptive.relaxations import Draw
from bitwright.models import build
from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.training.finetune import FinetuneOptions, build_optimizer, set_memory_order

Step = Callable[[], None]
CHOICES = (Bits(2, 2), Bits(3, 3), Bits(4, 4))


def adaptive_step(model: nn.Module, mode: str, options: FinetuneOptions, device: torch.device) -> Step:
    """Return one step of the joint training; the draws change at every step."""
    images = torch.randn(128, 3, 32, 32, device=device)
    found = trace(model, images[:1].cpu())
    ends = (found.names[0], found.names[-1])
    choices = {name: [Bits(8, 8)] if name in ends else list(CHOICES) for name in found.names}
    net = adapt(model.to(device), Space.of(found, choices, 389_000_000), images).train()
    modes: dict[str, Mode] = {"counterfactual": "probing", "pathwise": "pathwise", "drawn": "drawn"}
    net.mode = modes[mode]
    set_memory_order(net, channels_last=options.channels_last)
    weights = build_optimizer(net, FinetuneOptions(lr=options.lr, low_bit_decay=False), without=list(net.actor.parameters()))
    actor = torch.optim.Adam(net.actor.parameters(), lr=1e-4)
    losses = sample_losses(net, options)
    again = forced_losses(net, options)
    if options.compile:
        losses, again = torch.compile(losses, dynamic=False), torch.compile(again, dynamic=False)
    x = images.contiguous(memory_format=torch.channels_last) if options.channels_last else images
    y, generator, count = torch.randint(0, 10, (128,), device=device), torch.Generator().manual_seed(0), [0]

    def step() -> None:
        count[0] += 1
        temperature = 5.0 / (1 + 0.1 * count[0])
        draw = Draw.of((len(net.space.names), 128, len(CHOICES)), generator, temperature, 1.0).to(device)
        site = torch.randint(0, len(net.space.names), (128,), generator=generator).to(device)
        task, spent, size, logp, other, gate = losses(x, y, draw, None, site)
        objective = task.mean() + 0.1 * spent.mean() + 1e-3 * size.mean()
        if mode == "counterfactual":
            with torch.no_grad(), net.replaying():
                changed = again(x, y, other)
            objective = objective + ((changed - task.detach()) * gate).mean()
        if mode == "drawn":
            objective = objective + (task.detach() * logp).mean()
        float(objective.detach())
        objective.backward()
        for optimizer in (weights, actor):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def variants(options: FinetuneOptions, device: torch.device) -> dict[str, Step]:
    """Return the steps to time, by name; the first is what the others are set against."""
    names = [site.name for site in trace(build("cifar_resnet20"), torch.zeros(1, 3, 32, 32)).sites]
    policy = Policy((name, Bits(8, 8) if name in (names[0], names[-1]) else Bits(3, 3)) for name in names)
    static = quantize(build("cifar_resnet20"), policy, calibration=torch.randn(64, 3, 32, 32))
    return {
        "static W3A3": training_step(static, options, device),
        **{mode: adaptive_step(build("cifar_resnet20"), mode, options, device) for mode in ("counterfactual", "pathwise", "drawn")},
    }


def main() -> None:
    """Warm up, time the rounds and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile; the static step neither")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    options = FinetuneOptions(lr=1e-4, compile=not arguments.eager, channels_last=True, precision=arguments.precision)
    steps = variants(options, torch.device(arguments.device))
    for step in steps.values():
        for _ in range(3):
            step()
    torch._dynamo.config.error_on_recompile = True
    alone = arguments.threads == 1 and arguments.device == "cpu"
    clock = time.process_time if alone else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            started = clock()
            step()
            times[name].append(clock() - started)
    base, rows = next(iter(steps)), []
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values, times[base], strict=True)]
        middle, low, high = median_interval(ratios)
        setting = {"precision": arguments.precision, "compiled": not arguments.eager, "threads": arguments.threads}
        setting["clock"] = "process" if alone else "wall"
        rows.append(
            {"variant": name, **setting, "device": arguments.device, "n": len(ratios), "ratio": middle, "low": low, "high": high}
            | {"milliseconds": 1e3 * statistics.median(values)}
            | environment()
        )
        print(f"{name:12s} {middle:.3f} [{low:.3f}, {high:.3f}]  {statistics.median(values) * 1e3:.0f} ms", flush=True)
    print(write(f"adaptive-step-{arguments.device}-{arguments.precision}{'-eager' if arguments.eager else ''}", rows))


if __name__ == "__main__":
    main()
