"""A stopwatch for policies: whole networks at random mixtures of classes, timed in turns on a target's runtime.

The network is captured once, with every site at 8 bits; each policy then is that graph with some sites' quantizers left out, which
is what `quantize` makes of it, and takes a fraction of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitwright.exporters import Source, _plain_copy
from bitwright.exporters._emission import Coded, Emission, Form
from bitwright.exporters._graph import capture
from bitwright.exporters._rewrite import rewrite
from bitwright.exporters._writing import Writer, text
from bitwright.exporters.onnx import QDQ, executed_precision, refuse_integers, required, session, written
from bitwright.exporters.openvino import DOMAIN, FORM, compile_model, library
from bitwright.latency import Timing
from bitwright.policy import Bits, Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.sites import Trace
from bitwright.targets import Target

WARM = 5
"""Runs before the first that counts."""
Run = Callable[[], Any]


class AtPolicy(Emission):
    """Writes a network of 8 bits at a policy: sites beyond 8 bits lose their quantizers."""

    def __init__(self, writer: Writer, program: Any, form: Form, layers: Mapping[str, Bits]):
        super().__init__(writer, program, form)
        self.layers = layers
        self.integers = any(bits.w <= 8 and bits.a <= 8 for bits in layers.values())

    def _mark(self, node: fx.Node) -> Any:
        mark = self.program.marks[cast(int, node.args[1])]
        bits = self.layers.get(mark.address, Bits(8, 8))
        if mark.role == "weight":
            coded = cast(Coded, super()._mark(node))
            if bits.w > 8:
                return (coded.codes * coded.scale).float()
            limit = 2 ** (bits.w - 1)
            return coded._replace(codes=coded.codes.clamp(-limit, limit - 1), bits=bits)
        if bits.a > 8 or (mark.role == "point" and not self.integers):
            return text(self.writer, self.env[cast(fx.Node, node.args[0])])
        return super()._mark(node)


class Stopwatch:
    """Times policies of one network.

    Args:
        model: float network.
        trace: its sites.
        example: an input.
        target: whose runtime runs them.
    """

    def __init__(self, model: nn.Module, trace: Trace, example: Tensor, target: Target):
        self.trace, self.target = trace, target
        self.sample = example[:1].detach().cpu()
        plain = _plain_copy(model)
        policy = Policy((site.name, Bits(8, 8)) for site in trace.sites)
        options = QuantOptions(points=target.points, rule="minmax")
        with torch.no_grad():
            eight = quantize(plain, policy, calibration=example[:2].cpu(), sites=trace.sites, skip=trace.skipped, options=options).eval()
        self.source = Source(eight, example[:2].cpu(), policy, None)
        self.program = capture(eight, self.source.example)
        rewrite(self.program)

    def prepare(self, policy: Policy) -> Run:
        """Return what runs one sample at a policy; raises `ExportError` where ONNX Runtime runs float layers of it in integers."""
        layers = {layer: policy[site.name] for site in self.trace.sites for layer in site.layers}
        openvino = self.target.latency == "openvino"
        form = FORM if openvino else Form(QDQ())

        def emission(writer: Writer, program: Any, form: Form) -> Emission:
            return AtPolicy(writer, program, form, layers)

        made = written(required("onnx"), self.program, self.source, form, {DOMAIN: 1} if openvino else None, emission)
        data = made.model.SerializeToString()
        if openvino:
            compiled = compile_model(library().Core().read_model(data), layers)
            request, inputs = compiled.create_infer_request(), [self.sample.numpy()]
            return lambda: request.infer(inputs)
        refuse_integers(executed_precision(made.model, list(layers)), layers)
        running, given = session(data), {self.program.inputs[0]: self.sample.numpy()}
        return lambda: running.run(None, given)

    def time(self, policies: Sequence[Policy], seconds: float, turns: int, log: Callable[[str], None] | None = None) -> list[Timing]:
        """Time policies in turns, so that what else the machine does meets all of them alike."""
        runs = []
        for k, policy in enumerate(policies):
            runs.append(self.prepare(policy))
            if log is not None:
                log(f"compiled {k + 1} of {len(policies)} networks")
        taken: list[list[int]] = [[] for _ in policies]
        for turn in range(turns):
            for k, run in enumerate(runs):
                taken[k] += _turn(run, seconds)
            if log is not None:
                log(f"turn {turn + 1} of {turns} timed")
        return [_timing(policy, own) for policy, own in zip(policies, taken, strict=True)]


def _turn(run: Run, seconds: float) -> list[int]:
    for _ in range(WARM):
        run()
    taken: list[int] = []
    while len(taken) < WARM or sum(taken) < seconds * 1e9:
        start = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - start)
    return taken


def _timing(policy: Policy, taken: Sequence[int]) -> Timing:
    """Return what stands for a network's runs, and their spread."""
    fastest, typical, middle = np.percentile(np.asarray(taken), [0, 10, 50])
    return Timing(policy, int(typical), int(fastest), int(middle), len(taken))
