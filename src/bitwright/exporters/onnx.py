"""ONNX with quantization and dequantization nodes: one file for ONNX Runtime, and for whatever else reads the standard.

Every activation on a grid is a ``QuantizeLinear`` (uint8; zero is 128 on signed grids), below 8 bits a ``Clip`` of those integers,
and a ``DequantizeLinear``; every weight is integer codes and a ``DequantizeLinear`` with a scale for each output channel; a bias is
int32. ONNX Runtime makes integer kernels of that. BatchNorms are folded into the scales and biases of the layer before them. A layer
with float weights reads its input with a scale for each channel, all equal, because ONNX Runtime would round its weights otherwise.

The file is checked with `onnx.checker` and run by ONNX Runtime before it may stay: each activation's codes are compared with the
network's, given the network's own codes before it and from the example on, and the outputs as well.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError
from bitwright.exporters import Check, Exporter, Source, Verification, spelled_fallbacks
from bitwright.exporters import outputs as network_outputs
from bitwright.exporters._claims import fitting
from bitwright.exporters._emission import ActivationForm, Emission, Emitted, Form, Grid, PointRecord, WeightRecord, float_layers
from bitwright.exporters._graph import Program, capture, run
from bitwright.exporters._kept_float import keep_float
from bitwright.exporters._onnx_file import FORMAT, content_of, read_model, stamp, verify_file
from bitwright.exporters._parity import Parity, Share, Steps, allowed_outputs, codes_of, is_exact, judge, output_gaps, rows
from bitwright.exporters._qdq_nodes import recount, state_widths
from bitwright.exporters._rewrite import rewrite
from bitwright.exporters._writing import Writer
from bitwright.policy import Bits

OPSET, IR = 21, 10
OPSET_INT2, IR_INT2 = 25, 13
"""What the standard needs for INT2."""
QONNX_DOMAIN = "qonnx.custom_op.general"
"""Where the operators of QONNX are: a file with them is of another format."""
INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")


class QDQ(ActivationForm):
    """Quantize, clip the integers where there are fewer than 8 bits, dequantize."""

    def write(self, writer: Writer, x: str, grid: Grid, name: str, readers: Sequence[fx.Node]) -> tuple[str, str, int]:
        """Write three nodes, or two."""
        zero = 128 if grid.signed else 0
        step, origin = writer.constant(np.float32(grid.step), f"{name}_scale"), writer.constant(np.uint8(zero), f"{name}_zero")
        codes = writer.node("QuantizeLinear", [x, step, origin], name=f"{name}_q")
        low, high = grid.low + zero, grid.high + zero
        if low > 0 or high < 255:
            bounds = [writer.constant(np.uint8(bound), f"{name}_bound") for bound in (low, high)]
            codes = writer.node("Clip", [codes, *bounds], name=f"{name}_clip")
        return str(writer.node("DequantizeLinear", [codes, step, origin], name=f"{name}_dq")), str(codes), zero


@dataclass(frozen=True)
class Written:
    """A program and the model that was made of it; ``tensors`` names what each node of the program became."""

    program: Program
    model: Any
    emitted: Emitted
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Onnx(Exporter):
    """Quantization and dequantization nodes of the ONNX standard, run by ONNX Runtime.

    Attributes:
        types: ``int8`` stores weights of few bits in 8-bit integers, so that integer kernels apply; ``native`` uses INT4 and INT2 for
            layers whose activations stay in float, which have no integer kernel to lose.
        steps: how many steps a code may differ by when the file is given the network's own codes before it; where all scales are
            powers of two and every call sums integers, it may not differ at all. On average codes may differ by the
            share of their grid that so many steps of 8 bits are.
        outputs: how far outputs may differ, as a share of the largest, likewise; two steps of the coarsest activation grid, 5 to 30 %,
            where not given.
        fallback: ``report`` lists layers that the runtime runs in float, or is not seen to run in integers, though both widths are 8 or
            fewer; ``raise`` refuses them.
    """

    suffixes = (".onnx",)
    types: Literal["int8", "native"] = "int8"
    steps: Steps = 1
    outputs: Share | None = None
    fallback: Literal["report", "raise"] = "report"

    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write the file; raises `ExportError` for a call that has no ONNX form here."""
        onnx = required("onnx")
        written = self._written(source)
        stamp(onnx, written.model, source, written.program, written.emitted, allowed_outputs(written.program, self.outputs), run_session)
        data = written.model.SerializeToString(deterministic=True)
        path.write_bytes(data)
        sizes = {tensor.name: len(tensor.raw_data) for tensor in written.model.graph.initializer}
        codes = sum(sizes[record.initializer] for record in written.emitted.weights)
        return {"weights": codes, "tensors": sum(sizes.values()) - codes, "graph": len(data) - sum(sizes.values())}

    def check(self, source: Source, path: Path) -> Check:
        """Run the file and compare; raises `ExportError` unless it reproduces the network within the bounds."""
        onnx = required("onnx")
        model = read_model(onnx, path)
        written = self._written(source)
        executed = executed_precision(model, list(written.emitted.layers))
        refuse_integers(executed, written.emitted.layers)
        parity = compare(source, written, model)
        judge(parity, self.steps, allowed_outputs(written.program, self.outputs), "ONNX Runtime")
        verified = self.verify(path)
        expected_float = float_layers(written.emitted.layers)
        fell = {name: kind for name, kind in executed.items() if not kind.startswith("int") and name not in expected_float}
        if fell and self.fallback == "raise":
            ask = "quantize with a target or points, or give fallback='report'"
            raise ExportError(f"export: ONNX Runtime does not run these in integers: {spelled_fallbacks(fell)}; {ask}")
        facts = {**parity.to_dict(), "executed": executed, "float_fallbacks": fell}
        return Check(verified.levels, parity.difference, facts)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a file is one of ours."""
        data = path.read_bytes() if path.suffix == ".onnx" else b""
        return FORMAT.encode() in data and QONNX_DOMAIN.encode() not in data

    @classmethod
    def verify(cls, path: Path, model: Any = None) -> Verification:
        """Read a file, compare its nodes with its policy, count its levels and run it.

        Raises:
            ExportError: it is damaged or tampered with, or does not keep its policy; the message says which.
        """
        onnx = required("onnx")
        verified = verify_file(onnx, path, run_session)
        model = read_model(onnx, path)
        content = content_of(path.name, model)
        with fitting(path.name):
            recount(onnx, model, content)
        return verified

    def _written(self, source: Source) -> Written:
        if "onnx" not in source.memo:
            source.memo["onnx"] = self._write(source)
        found: Written = source.memo["onnx"]
        return found

    def _write(self, source: Source) -> Written:
        onnx = required("onnx")
        program = capture(source.model, source.example)
        if not program.marks and not program.layers:
            raise ExportError("export: the model has no quantized layer; pass what quantize() returned")
        rewrite(program)
        made = written(onnx, program, source, Form(QDQ(), native=(2, 4) if self.types == "native" else ()))
        state_widths(made.model, made.emitted)
        return made


def required(package: str) -> Any:
    """Import a package of the extra; raises `ExportError` that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"export: {package} is not installed ({error}); type pip install 'bitwright[onnx]'") from None


def written(
    onnx: Any,
    program: Program,
    source: Source,
    form: Form,
    domains: Mapping[str, int] | None = None,
    emits: Callable[[Writer, Program, Form], Emission] = Emission,
) -> Written:
    """Return a program as an ONNX model, written by a kind of `Emission`."""
    writer = Writer(onnx, program.inputs[0])
    writer.taken.update(program.inputs)
    emission = emits(writer, program, form)
    emitted = emission.write()
    taken: set[str] = set(program.inputs)
    outputs = [name if name not in taken and not taken.add(name) else writer.node("Identity", [name]) for name in emission.outputs]  # type: ignore[func-returns-value]
    helper = onnx.helper
    inputs = [_value_info(onnx, node.name, node.meta["val"]) for node in program.graph.nodes if node.name in program.inputs]
    leaves = _output_values(program)
    results = [_value_info(onnx, name, value) for name, value in zip(outputs, leaves, strict=True)]
    graph = helper.make_graph(writer.nodes, "bitwright", inputs, results, writer.initializers)
    two = any(tensor.data_type == onnx.TensorProto.INT2 for tensor in writer.initializers)
    imports = [helper.make_opsetid("", OPSET_INT2 if two else OPSET)]
    imports += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    model = helper.make_model(graph, opset_imports=imports, producer_name="bitwright")
    model.ir_version = IR_INT2 if two else IR
    if isinstance(form.activations, QDQ):
        values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        keep_float(onnx, model, {point.codes: values[point.node].shape for point in emitted.points})
    tensors = {node.name: value for node, value in emission.env.items() if isinstance(value, str)}
    return Written(program, model, emitted, tensors)


def _output_values(program: Program) -> list[Any]:
    output = next(node for node in program.graph.nodes if node.op == "output")
    return [leaf.meta["val"] for leaf in tree_leaves(output.args) if isinstance(leaf, fx.Node)]


def _value_info(onnx: Any, name: str, value: Tensor) -> Any:
    shape = [size if isinstance(size, int) else "batch" for size in value.shape]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(value.dtype).removeprefix("torch.")))
    return onnx.helper.make_tensor_value_info(name, kind, shape)


# ---- running


def session(data: bytes, optimized: Path | None = None) -> Any:
    """Return a session of ONNX Runtime on one thread."""
    runtime = required("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"export: ONNX Runtime refuses the file ({str(error).splitlines()[0][:200]})") from None


def run_session(data: bytes, inputs: Mapping[str, Any]) -> list[Any]:
    """Run a model in ONNX Runtime and return its outputs."""
    return list(session(data).run(None, dict(inputs)))


def inputs_of(program: Program, source: Source) -> dict[str, Any]:
    """Return the example by the names of a program's inputs."""
    example = source.example
    values = list(example.values()) if isinstance(example, Mapping) else list(example) if isinstance(example, tuple) else [example]
    return {name: value.numpy() for name, value in zip(program.inputs, values, strict=True)}


def compare(source: Source, written: Written, model: Any) -> Parity:
    """Compare a file with the network on the example: every activation's codes, alone and chained, and the outputs."""
    program, points = written.program, [point for point in written.emitted.points if point.codes]
    wanted, (_, marked) = network_outputs(source.model, source.example), run(program, source.example)
    codes = {point.node: codes_of(marked[point.node], point) for point in points}
    given = inputs_of(program, source)
    count = len(model.graph.output)
    whole = session(with_codes(model, points, cut=False)).run(None, given)
    parts = {f"given:{point.codes}": codes[point.node].astype(np.uint8) for point in points}
    cut = session(with_codes(model, points, cut=True)).run(None, {**given, **parts})
    alone, chained = (
        rows(points, codes, dict(zip([point.node for point in points], result[count:], strict=True))) for result in (cut, whole)
    )
    share, largest, agreement = output_gaps(wanted, whole[:count])
    last, _, _ = output_gaps(wanted, cut[:count])
    return Parity(is_exact(program), alone, chained, share, largest, agreement, last)


def with_codes(model: Any, points: Sequence[PointRecord], *, cut: bool) -> bytes:
    """Return a model that gives each activation's codes as well, and, if ``cut``, goes on with codes that it is given instead."""
    onnx = required("onnx")
    changed = type(model)()
    changed.CopyFrom(model)
    graph = changed.graph
    for point in points:
        graph.output.append(onnx.helper.make_tensor_value_info(point.codes, onnx.TensorProto.UINT8, None))
        if cut:
            graph.input.append(onnx.helper.make_tensor_value_info(f"given:{point.codes}", onnx.TensorProto.UINT8, None))
    if cut:
        names = {point.codes for point in points}
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in names:
                node.input[0] = f"given:{node.input[0]}"
    return bytes(changed.SerializeToString())


def executed_precision(model: Any, addresses: Sequence[str]) -> dict[str, str]:
    """Return what ONNX Runtime runs for each layer: its node after all optimisations, as ``int8: QLinearConv`` or ``float32: Conv``.

    It is ``unknown`` where no node has the layer's name.
    """
    import tempfile  # noqa: PLC0415  (only where it is used)

    onnx = required("onnx")
    with tempfile.TemporaryDirectory() as folder:
        session(model.SerializeToString(), Path(folder) / "optimized.onnx")
        nodes = onnx.load(str(Path(folder) / "optimized.onnx")).graph.node
    found = {}
    for node in nodes:
        base = re.sub(r"(_token_\d+|_nchwc|_nhwc|_quant|/[A-Za-z]+Fusion.*)+$", "", node.name)
        address = next((name for name in (base, re.sub(r"_\d+$", "", base)) if name in addresses), None)
        if address is not None and address not in found and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            kind = "int8" if node.op_type.startswith(INTEGER_KERNELS) else "int4" if node.op_type == "MatMulNBits" else "float32"
            found[address] = f"{kind}: {node.op_type}"
    return {address: found.get(address, "unknown") for address in addresses}


def refuse_integers(executed: Mapping[str, str], layers: Mapping[str, Bits]) -> None:
    """Raise `ExportError` for layers with float weights that ONNX Runtime runs in integers, having rounded their weights."""
    rounded = {name: kind for name, kind in executed.items() if kind.startswith("int") and layers[name].w > 8}
    if rounded:
        ask = "give them 8 bits or fewer, or quantize without points"
        found = f"rounds the float weights of these and runs them in integers: {spelled_fallbacks(rounded)}"
        raise ExportError(f"export: ONNX Runtime {found}; {ask}")


__all__ = ["Onnx", "WeightRecord"]
