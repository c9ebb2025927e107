"""QONNX: arbitrary widths as ``Quant`` and ``BipolarQuant`` nodes, for FPGA flows (hls4ml, FINN) and for QONNX's own tools.

Each activation on a grid is a ``Quant`` node, and so is each weight: the initializer holds values of the grid, the node says which grid.
One-bit weights are a ``BipolarQuant`` of -1 and 1, their scale is multiplied after the layer. BatchNorms stay nodes of their own: folding
one into a narrow weight can take it off its grid. Biases are float.

The file is run by ``qonnx`` before it may stay, each tensor on a grid compared with the network's as codes: given the network's own tensors
before it, and from the example on. ``bitops`` adds up what QONNX's inference cost counts, layer by layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from bitwright.errors import ExportError
from bitwright.exporters import Check, Exporter, Source, Verification
from bitwright.exporters import outputs as network_outputs
from bitwright.exporters._claims import fitting
from bitwright.exporters._emission import ActivationForm, Coded, Emission, Form, Grid, PointRecord, WeightRecord, for_outputs
from bitwright.exporters._graph import capture, run
from bitwright.exporters._onnx_file import FORMAT, content_of, read_model, stamp, verify_file
from bitwright.exporters._parity import Parity, Share, Steps, allowed_outputs, codes_of, is_exact, judge, output_gaps, rows
from bitwright.exporters._quant_nodes import recount
from bitwright.exporters._rewrite import rewrite
from bitwright.exporters._writing import Writer
from bitwright.exporters.onnx import QONNX_DOMAIN, Written, inputs_of, required, written
from bitwright.policy import Bits
from bitwright.sites import Site

DOMAINS = {QONNX_DOMAIN: 1}


class QuantForm(ActivationForm):
    """Rounding and clipping in one node, its result in float."""

    def write(self, writer: Writer, x: str, grid: Grid, name: str, readers: Sequence[fx.Node]) -> tuple[str, str, int]:
        """Write the node."""
        width = 1 if (grid.low, grid.high) in ((-1, 1), (0, 1)) else int(grid.high - grid.low).bit_length()
        return _quant(writer, x, np.float32(grid.step), width, name, signed=grid.signed), "", 0


def _quant(writer: Writer, x: str, scale: Any, width: int, name: str, *, signed: bool, narrow: bool = False) -> str:
    scales, zero, bits = (
        writer.constant(np.asarray(value, np.float32), f"{name}_{part}") for part, value in (("scale", scale), ("zero", 0), ("bits", width))
    )
    attributes: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
    return str(writer.node("Quant", [x, scales, zero, bits], name=f"{name}_quant", domain=QONNX_DOMAIN, **attributes))


class QuantEmission(Emission):
    """Writes layers with ``Quant`` nodes at their weights, and leaves BatchNorms and ReLUs where they are."""

    def __init__(self, writer: Writer, program: Any, form: Form):
        super().__init__(writer, program, form)
        self.after: dict[str, Any] = {}

    def _affine(self, node: fx.Node, kind: str, values: list[Any]) -> tuple[None, fx.Node]:
        return None, node

    def _only_quantized(self, node: fx.Node) -> bool:
        return False

    def _write_codes(self, coded: Coded, scale: Any, codes: Any) -> tuple[str, Any]:
        """Write values on a grid and the node that says which; scales of one bit wait for the layer's result."""
        name, width = coded.address, coded.bits.w
        largest = np.abs(codes).max(initial=0)
        if width == 1:
            steps = scale * largest
            if largest == 0 or not np.all(np.abs(codes) == largest):
                raise ExportError(f"export: the weight of '{name}' has one bit and values other than -s and s, which no Bipolar node says")
            initializer = self._hold(name, np.sign(codes), coded.bits, scale)
            self.after[name] = steps
            one = self.writer.constant(np.float32(1), f"{name}.weight_scale")
            return str(self.writer.node("BipolarQuant", [initializer, one], name=f"{name}.weight_quant", domain=QONNX_DOMAIN)), steps
        if codes.min(initial=0) < -(2 ** (width - 1)) or codes.max(initial=0) > 2 ** (width - 1) - 1:
            found = "a grid without zero (half-integer levels), which a Quant node of its width cannot say"
            raise ExportError(f"export: the weight of '{name}' is on {found}; quantize with quantizer='lsq'")
        initializer = self._hold(name, codes * scale.astype(np.float32), coded.bits, scale)
        steps = _squeezed(scale.astype(np.float32))
        return _quant(self.writer, initializer, steps, width, f"{name}.weight", signed=True), scale

    def _hold(self, name: str, values: Any, bits: Bits, scale: Any) -> str:
        initializer = self.writer.constant(np.asarray(values, np.float32), f"{name}.weight")
        self.emitted.weights.append(WeightRecord(name, bits, initializer, _axis(scale)))
        return initializer

    def _bias(self, bias: Any, affine: Any, step: float | None, weight_step: Any, name: str) -> str:
        return "" if bias is None else self.writer.constant(bias.float().numpy(), f"{name}.bias")

    def _convolution(self, kind: str, values: list[Any], x: str, w: str, b: str, name: str) -> str:
        late = name in self.after
        out = super()._convolution(kind, values, x, w, "" if late else b, name)
        weight = values[1].codes if isinstance(values[1], Coded) else values[1]
        # ONNX infers the kernel's shape; QONNX's tools want to read it
        self.writer.nodes[-1].attribute.append(self.writer.onnx.helper.make_attribute("kernel_shape", list(weight.shape[2:])))
        if not late:
            return out
        dims, axis = int(kind[-2]), 1 if kind.startswith("conv_transpose") else 0
        groups = int(values[6]) if axis and len(values) > 6 else 1
        return self._rescaled(out, name, axis, values[2] if len(values) > 2 else None, dims, groups)

    def _linear(self, node: fx.Node, x: str, w: str, b: str, name: str) -> str:
        if name not in self.after:
            return super()._linear(node, x, w, b, name)
        out = super()._linear(node, x, w, "", name)
        axis = 1 if self._turns(node) else 0
        return self._rescaled(out, name, axis, self.env[node.args[2]] if len(node.args) > 2 and node.args[2] is not None else None, 0)  # type: ignore[index]

    def _rescaled(self, out: str, name: str, axis: int, bias: Any, dims: int, groups: int = 1) -> str:
        """Multiply a layer's result by its weight's scales, which the groups of a transposed convolution share, and add the bias."""
        steps = self.after.pop(name)
        channel = np.moveaxis(steps, axis, 0).reshape(steps.shape[axis], -1)[:, 0]
        shape = [-1] + [1] * dims
        scales = for_outputs(channel, len(channel) * groups) if np.any(channel != channel[0]) else channel[:1]
        out = self.writer.node("Mul", [out, self.writer.constant(scales.reshape(shape).astype(np.float32), f"{name}.scale")])
        if bias is not None:
            out = self.writer.node("Add", [out, self.writer.constant(bias.float().numpy().reshape(shape), f"{name}.bias")])
        return out


def _squeezed(scale: Any) -> Any:
    """Return scales without axes along which they are equal; a number where all are."""
    for axis in range(scale.ndim):
        if np.all(scale == scale.take([0], axis)):
            scale = scale.take([0], axis)
    return scale.reshape(()) if scale.size == 1 else scale


def _axis(scale: Any) -> int | None:
    """Return the axis along which scales differ."""
    shape = _squeezed(scale).shape
    return next((axis for axis, size in enumerate(shape) if size > 1), None)


@dataclass(frozen=True)
class Qonnx(Exporter):
    """``Quant`` nodes, run by ``qonnx``.

    Attributes:
        batch: images that the file's input has; FPGA flows want 1.
        steps: how many steps a code may differ by when the file is given the network's own tensors before it; where all scales are powers
            of two and every call sums integers, it may not differ at all. On average codes may differ by the share of
            their grid that so many steps of 8 bits are.
        outputs: how far outputs may differ, as a share of the largest, likewise; two steps of the coarsest activation grid, 5 to 30 %,
            where not given.
    """

    suffixes = (".qonnx",)
    batch: int = 1
    steps: Steps = 1
    outputs: Share | None = None

    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write the file; raises `ExportError` for a call or a grid that has no QONNX form here."""
        onnx = required("onnx")
        made = self._written(source)
        stamp(onnx, made.model, source, made.program, made.emitted, allowed_outputs(made.program, self.outputs), run_qonnx)
        data = made.model.SerializeToString(deterministic=True)
        path.write_bytes(data)
        sizes = {tensor.name: len(tensor.raw_data) for tensor in made.model.graph.initializer}
        weights = sum(sizes[record.initializer] for record in made.emitted.weights)
        return {"weights": weights, "tensors": sum(sizes.values()) - weights, "graph": len(data) - sum(sizes.values())}

    def check(self, source: Source, path: Path) -> Check:
        """Run the file in ``qonnx`` and compare; raises `ExportError` unless it reproduces the network within the bounds."""
        model, made = read_model(required("onnx"), path), self._written(source)
        parity = compare(source, made, model)
        judge(parity, self.steps, allowed_outputs(made.program, self.outputs), "qonnx")
        verified = self.verify(path)
        return Check(verified.levels, parity.difference, parity.to_dict())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a file is one of ours."""
        data = path.read_bytes() if path.suffix in (".qonnx", ".onnx") else b""
        return FORMAT.encode() in data and QONNX_DOMAIN.encode() in data

    @classmethod
    def verify(cls, path: Path, model: Any = None) -> Verification:
        """Read a file, compare the widths in its nodes with its policy, count its levels and run it.

        Raises:
            ExportError: it is damaged or tampered with, or does not keep its policy; the message says which.
        """
        onnx = required("onnx")
        model = read_model(onnx, path)
        content = content_of(path.name, model)
        with fitting(path.name):
            inputs = recount(onnx, model, content)
        verified = verify_file(onnx, path, run_qonnx)
        return replace(verified, to="qonnx", tensors=(*verified.tensors, *inputs))

    def _written(self, source: Source) -> Written:
        tools()
        program = capture(source.model, source.example)
        if not program.marks and not program.layers:
            raise ExportError("export: the model has no quantized layer; pass what quantize() returned")
        rewrite(program)
        made = written(required("onnx"), program, source, Form(QuantForm(), round_biases=False), DOMAINS, QuantEmission)
        _fix_batch(made.model, self.batch)
        return made


# ---- running


def tools() -> Any:
    """Return the package ``qonnx``; raises `ExportError` that says how to install it."""
    try:
        import qonnx  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ExportError(f"export: qonnx is not installed ({error}); type pip install 'bitwright[qonnx]'") from None
    return qonnx


def _fix_batch(model: Any, batch: int) -> None:
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and (dims[0].dim_param or dims[0].dim_value):
            dims[0].dim_value = batch


def run_qonnx(data: bytes, inputs: Mapping[str, Any]) -> list[Any]:
    """Run a model in ``qonnx`` and return its outputs."""
    model = required("onnx").ModelProto()
    model.ParseFromString(data)
    context = execute(model, inputs)[0]
    return [context[value.name] for value in model.graph.output]


def execute(model: Any, inputs: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a model node by node in ``qonnx``.

    Args:
        model: with nodes in execution order; its batch is set to that of the inputs.
        inputs: by name.
        given: tensors that later nodes read instead of what the model computes for them.

    Returns:
        All tensors, and what the model computed for those that were given.
    """
    tools()
    from qonnx.core.modelwrapper import ModelWrapper  # noqa: PLC0415
    from qonnx.core.onnx_exec import execute_node  # noqa: PLC0415
    from qonnx.transformation.infer_shapes import InferShapes  # noqa: PLC0415

    _fix_batch(model := _copied(model), len(next(iter(inputs.values()))))
    with warnings.catch_warnings(), _runnable_nodes(model.ir_version):
        warnings.simplefilter("ignore")
        wrapper = ModelWrapper(model).transform(InferShapes())
        context = wrapper.make_empty_exec_context()
        context.update({name: np.asarray(value) for name, value in inputs.items()})
        opset = next(entry.version for entry in wrapper.model.opset_import if entry.domain in ("", "ai.onnx"))
        computed = {}
        for node in wrapper.graph.node:
            execute_node(node, context, wrapper.graph, opset)
            for name in node.output:
                if given is not None and name in given:
                    computed[name], context[name] = context[name], given[name]
    return context, computed


@contextmanager
def _runnable_nodes(version: int) -> Iterator[None]:
    """Let qonnx wrap single nodes in models of the file's IR version: it takes the newest that onnx knows, ONNX Runtime may know it not."""
    from qonnx.core import onnx_exec  # noqa: PLC0415

    made = onnx_exec.qonnx_make_model

    def older(graph: Any, **options: Any) -> Any:
        model = made(graph, **options)
        model.ir_version = min(model.ir_version, version)
        return model

    onnx_exec.qonnx_make_model = older
    try:
        yield
    finally:
        onnx_exec.qonnx_make_model = made


def _copied(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def compare(source: Source, made: Written, model: Any) -> Parity:
    """Compare a file with the network on the example: every tensor on a grid, alone and chained, and the outputs."""
    wanted, (_, marked) = network_outputs(source.model, source.example), run(made.program, source.example)
    points = made.emitted.points
    tensors = {point.node: made.tensors[point.node] for point in points}
    inputs = inputs_of(made.program, source)
    whole, _ = execute(model, inputs)
    given, alone = execute(model, inputs, {tensors[point.node]: marked[point.node].detach().numpy() for point in points})
    codes = {point.node: codes_of(marked[point.node], point) for point in points}

    def compared(found: Mapping[str, Any]) -> Any:
        return rows(points, codes, {node: codes_of(torch.from_numpy(found[name]), _of(points, node)) for node, name in tensors.items()})

    results = [value.name for value in model.graph.output]
    share, largest, agreement = output_gaps(wanted, [whole[name] for name in results])
    last, _, _ = output_gaps(wanted, [given[name] for name in results])
    return Parity(is_exact(made.program), compared(alone), compared(whole), share, largest, agreement, last)


def _of(points: Sequence[PointRecord], node: str) -> PointRecord:
    return next(point for point in points if point.node == node)


# ---- QONNX's own count


def inference_costs(path: str | Path) -> dict[str, dict[str, float]]:
    """Return the MACs and bit operations that ``qonnx``'s inference cost counts for each layer of a file, zero weights included."""
    tools()
    from qonnx.analysis.inference_cost import inference_cost  # noqa: PLC0415
    from qonnx.core.modelwrapper import ModelWrapper  # noqa: PLC0415
    from qonnx.transformation.infer_datatypes import InferDataTypes  # noqa: PLC0415
    from qonnx.transformation.infer_shapes import InferShapes  # noqa: PLC0415
    from qonnx.util.inference_cost import compute_bops_and_macs  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ModelWrapper(str(path)).transform(InferShapes()).transform(InferDataTypes(allow_scaledint_dtypes=True))
        costs = inference_cost(model, discount_sparsity=False, cost_breakdown=True)["node_cost"]
    counted = {name: compute_bops_and_macs(cost) for name, cost in costs.items()}
    return {name: {"bitops": bops, "macs": macs} for name, (bops, macs) in counted.items()}


def costs_by_site(counted: Mapping[str, Mapping[str, float]], sites: Sequence[Site]) -> dict[str, float]:
    """Return the bit operations that were counted for each site: its layers summed.

    Raises:
        ExportError: a node was counted that belongs to no site.
    """
    owner = {layer: site.name for site in sites for layer in site.layers}
    totals = dict.fromkeys((site.name for site in sites), 0.0)
    for name, cost in counted.items():
        layer = name if name in owner else name.rpartition("_")[0]  # a second call of a layer is numbered
        if layer not in owner:
            raise ExportError(f"export: qonnx counts a node '{name}' that belongs to no site")
        totals[owner[layer]] += cost["bitops"]
    return totals
