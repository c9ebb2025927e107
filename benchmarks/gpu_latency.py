"""GPU: what bf16, INT8 and FP8 take a layer on a CUDA device, and whether the kernels that ran are of that precision.

    python benchmarks/gpu_latency.py [resnet18 mobilenet_v2 block] [--batch 64] [--rounds 30] [--print]

Needs a CUDA device (elsewhere it says so and stops) and `pip install 'bitwright[llm]'` for torchao. Every distinct convolution and linear
layer of ResNet-18 and MobileNetV2 at 224 pixels, and a transformer block (width 768, 12 heads, 197 tokens), through `torch.compile`:

- bf16: the layer itself, channels-last; a 1x1 convolution also as a linear layer over its pixels, as which 8 bits run it.
- int8, fp8: torchao's dynamic quantization of activations by token and weights by channel, of linear layers and 1x1 convolutions; all
  that happens at run time (finding scales, rounding) is in the time. Other convolutions have no such kernel, and their rows say so.

A row of results/gpu-latency.csv says what was asked for and what was executed, which is read from the names of the kernels in a profile of
the compiled layer (`bitwright.kernels`); `confirmed` is False wherever any product ran in another precision, or in one that its name does
not tell, and then the row is no measurement of what was asked. Times are of the GPU alone: a CUDA graph of 20 calls is replayed between
two events, so launches cost nothing and inputs stay in the cache. Forms of one layer alternate in rounds; `median_us` is a call's
microseconds, `low_us` and `high_us` the quartiles of the n rounds. `error` is the relative RMS difference from float32 on random inputs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from record import RESULTS, environment, write
from torch import Tensor, nn

from bitwright import models
from bitwright.kernels import Precision, executed, is_linear, operands_of, ran_as, unsupported

NETWORKS = ("resnet18", "mobilenet_v2", "block")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CALLS = 20
"""Calls in a graph: what is timed at once."""
WARM = 5
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer as one form: what is run on what, and how many products that takes."""

    name: str
    form: str
    module: nn.Module
    shape: tuple[int, ...]
    alike: int = 1
    products: int = 1


class Block(nn.Module):
    """A transformer block as in ViT-Base: four linear layers beside attention, which stays in bf16."""

    def __init__(self, width: int = 768, heads: int = 12):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, tokens, width]`` of the same."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.between(x))))


def cases(network: str, batch: int) -> list[Case]:
    """Return what is timed of a network: each distinct layer in its forms, with how many layers are like it."""
    if network == "block":
        return [Case("block", "block", Block(), (batch, 197, 768), products=4)]
    model = models.build(network).eval()
    seen: dict[tuple[Any, ...], list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]]] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            key = (type(module), module.weight.shape, inputs[0].shape, output.shape, getattr(module, "groups", 1))
            seen.setdefault(key, []).append((name, module, tuple(inputs[0].shape), tuple(output.shape)))

        return record

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    found = []
    for alike in seen.values():
        name, module, inputs, outputs = alike[0]
        form = "linear" if isinstance(module, nn.Linear) else "convolution"
        found.append(Case(name, form, module, (batch, *inputs[1:]), len(alike)))
        if form == "convolution" and is_linear(module):
            found.append(Case(name, "pixels", as_linear(module), (batch * outputs[2] * outputs[3], inputs[1]), len(alike)))
    return found


def as_linear(convolution: nn.Module) -> nn.Linear:
    """Return a 1x1 convolution as a linear layer; a strided one reads only the pixels that it keeps."""
    weight, bias = convolution.weight, convolution.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.eval()


def prepared(case: Case, precision: Precision, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a case's module in a precision, its input, and its float32 output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator).to(device)
    with torch.no_grad():
        wanted = case.module.to(device, torch.float32).eval()(x)
    module = cloned(case.module).to(device, torch.bfloat16)
    x = x.bfloat16()
    if x.dim() == 4:
        module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if precision != "bf16":
        quantize(module, precision)
    return module, x, wanted


def cloned(module: nn.Module) -> nn.Module:
    """Return a copy for inference."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def quantize(module: nn.Module, precision: Precision) -> None:
    """Put torchao's dynamic 8-bit scheme on all linear layers of a module, in place."""
    from torchao.quantization import (  # noqa: PLC0415  (an extra)
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    kind = {"int8": Int8DynamicActivationInt8WeightConfig, "fp8": Float8DynamicActivationFloat8WeightConfig}[precision]
    quantize_(module, kind(granularity=PerRow(), set_inductor_config=False))


def compiled(module: nn.Module, x: Tensor) -> tuple[Call, dict[str, str]]:
    """Return a compiled call of a module, and the operands of the kernels that were generated for it."""
    from torch._inductor.utils import run_and_get_code  # noqa: PLC0415

    torch._dynamo.reset()
    run = torch.compile(module, dynamic=False, fullgraph=True)
    _, code = run_and_get_code(run, x)
    return (lambda: run(x)), operands_of("\n".join(code))


def kernels(call: Call) -> list[str]:
    """Return the names of the kernels that one call runs."""
    from torch.autograd import DeviceType  # noqa: PLC0415
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")]


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph, and the call that owns the weights and inputs that it reads: they must outlive it."""

    graph: torch.cuda.CUDAGraph
    call: Call


def recorded(call: Call) -> Recorded:
    """Return `CALLS` calls as a CUDA graph, warmed on a stream of its own as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return Recorded(graph, call)


def replayed(recording: Recorded) -> float:
    """Return the microseconds of a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    recording.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / CALLS


def timed(recordings: Sequence[Recorded], rounds: int) -> list[dict[str, float]]:
    """Return the median and the quartiles of each recording; a round replays every one once, each round beginning with another."""
    taken: list[list[float]] = [[] for _ in recordings]
    for recording in recordings:
        for _ in range(WARM):
            replayed(recording)
    for turn in range(rounds):
        for k in range(len(recordings)):
            place = (turn + k) % len(recordings)
            taken[place].append(replayed(recordings[place]))
    return [spread(values) for values in taken]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles and how many there are."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_us": round(middle, 3), "low_us": round(low, 3), "high_us": round(high, 3), "n": len(values)}


def rows_of(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of a case: what is asked for, what ran, and what it took."""
    rows: list[dict[str, Any]] = []
    recordings: list[Recorded] = []
    timings: list[dict[str, Any]] = []
    for precision in asked(case):
        facts: dict[str, Any] = {"layer": case.name, "alike": case.alike, "form": case.form, "asked": precision}
        facts |= {"input": "x".join(map(str, case.shape)), "weight": weight_text(case.module)}
        rows.append(facts | {"executed": "", "confirmed": False, "skipped": refused(case, precision) or ""})
        if rows[-1]["skipped"]:
            continue
        try:
            recording, seen = measured(case, precision, device)
        except Exception as error:  # what these versions cannot run is a row, and not the end of the others
            rows[-1]["skipped"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            continue
        rows[-1].update(seen)
        recordings.append(recording)
        timings.append(rows[-1])
    for row, found in zip(timings, timed(recordings, rounds), strict=True):
        row.update(found)
    return rows


def asked(case: Case) -> tuple[Precision, ...]:
    """Return the precisions of a case: a 1x1 convolution is asked for 8 bits in its form ``pixels``."""
    return ("bf16",) if case.form == "convolution" and is_linear(case.module) else PRECISIONS


def refused(case: Case, precision: Precision) -> str | None:
    """Return why a case does not run in a precision on this GPU; None where it may."""
    layers = [layer for layer in case.module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    capability = torch.cuda.get_device_capability()
    return next(filter(None, (unsupported(layer, precision, capability) for layer in layers)), None)


def measured(case: Case, precision: Precision, device: torch.device) -> tuple[Recorded, dict[str, Any]]:
    """Return a case in a precision, recorded, and what its kernels and outputs show."""
    module, x, wanted = prepared(case, precision, device)
    with torch.no_grad():
        call, operands = compiled(module, x)
        names = kernels(call)
        error = float((call().float() - wanted).norm() / wanted.norm())
        recording = recorded(call)
    found = executed(names, operands)
    text = " ".join(f"{kind} x{count}" for kind, count in sorted(found.items())) or "no product seen"
    facts = {"executed": text, "confirmed": ran_as(precision, found, case.products), "error": round(error, 5)}
    return recording, facts | {"kernels": "; ".join(name[:90] for name in dict.fromkeys(names))}


def weight_text(module: nn.Module) -> str:
    """Return a layer's weight shape; nothing for a block."""
    return "x".join(map(str, module.weight.shape)) if isinstance(module, (nn.Conv2d, nn.Linear)) else ""


def main() -> None:
    """Time what was asked for and write its rows; those of other networks stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--print", action="store_true", help="print the rows and write nothing")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.networks} - {*NETWORKS})
    if unknown:
        parser.error(f"no network {unknown[0]!r}; give some of {', '.join(NETWORKS)}")
    if arguments.rounds < 2 or arguments.batch < 17:
        parser.error(
            f"{arguments.rounds} rounds at batch {arguments.batch}; give 2 rounds or more and a batch of 17, which torch._int_mm needs"
        )
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    try:
        from torchao.quantization.utils import recommended_inductor_config_setter  # noqa: PLC0415  (an extra)
    except ImportError as error:
        parser.error(f"torchao is not installed ({error}); pip install 'bitwright[llm]'")
    recommended_inductor_config_setter()  # for all precisions alike
    torch._inductor.config.fx_graph_cache = False  # a cached graph would show no code
    torch.backends.cudnn.allow_tf32 = False  # float32 is what errors are relative to
    file = RESULTS / "gpu-latency.csv"
    place = {"unit": "us", "clock": f"GPU events about a CUDA graph of {CALLS} calls", "batch": arguments.batch, **environment()}
    for network in arguments.networks or NETWORKS:
        rows = []
        for case in cases(network, arguments.batch):
            for row in rows_of(case, arguments.rounds, torch.device("cuda")):
                rows.append({"network": network, **row, **place})
                print({key: row.get(key) for key in ("layer", "form", "asked", "executed", "confirmed", "skipped", "median_us")})
        if not arguments.print:
            old = list(csv.DictReader(file.open())) if file.is_file() else []
            write("gpu-latency", [*(other for other in old if other["network"] != network), *rows])


if __name__ == "__main__":
    main()
