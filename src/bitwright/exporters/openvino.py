"""OpenVINO's own format: a network whose layers run in 8-bit integers or bfloat16 as the policy says, read back from the runtime.

The model is written as ONNX in memory and converted. Activations of 8 bits are quantize/dequantize pairs, of fewer bits, and where they
are averaged over tokens, a ``FakeQuantize`` of so many levels. A compiled network has one type for all that is not in integers: bfloat16
if the policy has 16-bit layers, else float32; the file says which one to compile with (``runtime_options`` under ``bitwright`` in its
``rt_info``).

Before the file may stay it is compiled and run: every layer's executed precision is compared with the policy, and the outputs with
the network's, because some integer paths compute activations of few bits wrongly without saying so.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import fx

from bitwright.errors import ExportError
from bitwright.exporters import Check, Exporter, Source, Verification, outputs
from bitwright.exporters._claims import bound_of, fitting, samples_of
from bitwright.exporters._emission import ActivationForm, Emission, Form, Grid
from bitwright.exporters._graph import capture, kind_of
from bitwright.exporters._miscomputed import allowed, typical
from bitwright.exporters._onnx_file import answer_gap, content_of_text, content_text
from bitwright.exporters._openvino_nodes import recount, state_widths
from bitwright.exporters._parity import Share, output_gaps
from bitwright.exporters._rewrite import rewrite, spatial_mean
from bitwright.exporters._sample import SAMPLES
from bitwright.exporters._writing import Writer
from bitwright.exporters.onnx import QDQ, Written, inputs_of, required, written
from bitwright.policy import Bits

FORMAT = "bitwright-openvino-1"
DOMAIN = "org.openvinotoolkit"
BLANK = "0" * 64
INTEGER = ("i8", "u8")
LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution", "Subgraph")
"""What the runtime calls layers."""


class FewLevels(ActivationForm):
    """Quantize and dequantize at 8 bits; a FakeQuantize of so many levels below, and where an average over tokens reads the values.

    OpenVINO gives wrong values for the average of a linear layer's result over tokens behind a quantization and a dequantization.
    """

    def write(self, writer: Writer, x: str, grid: Grid, name: str, readers: Sequence[fx.Node]) -> tuple[str, str, int]:
        """Write the nodes."""
        averaged = any(kind_of(reader) == "mean" and not spatial_mean(reader) for reader in readers)
        if grid.high - grid.low == 255 and not averaged:
            out, codes, zero = QDQ().write(writer, x, grid, name, readers)
            return out, codes, zero
        bounds = [writer.constant(np.float32(code * grid.step), f"{name}_bound") for code in (grid.low, grid.high)]
        levels = grid.high - grid.low + 1
        out = writer.node("FakeQuantize", [x, *bounds, *bounds], name=f"{name}_q", domain=DOMAIN, levels=levels)
        return str(out), "", 0


FORM = Form(FewLevels(), native=(4,), round_biases=False, clip_codes=False)
"""Biases stay in float: the runtime adds them to what the integers give, scaled."""


class NamedNorms(Emission):
    """Writes a BatchNorm beside its layer as a product and a sum of the layer's name.

    OpenVINO takes a layer that it merges a BatchNorm into by the name of what it made of the BatchNorm: a number where the shift is zero.
    """

    def _call(self, node: fx.Node) -> Any:
        name = self._name(node, "batch_norm") if kind_of(node) == "batch_norm" else ""
        if not name:
            return super()._call(node)
        shape = [1, -1] + [1] * (node.meta["val"].dim() - 2)
        gain, shift = (self.writer.constant(v.astype(np.float32).reshape(shape), f"{name}_constant") for v in self._gain_and_shift(node))
        x = self.env[cast(fx.Node, node.args[0])]
        return self.writer.node("Add", [self.writer.node("Mul", [x, gain], name=f"{name}_gain"), shift], name=name)


@dataclass(frozen=True)
class OpenVINO(Exporter):
    """OpenVINO's format (two files, .xml and .bin), its executed precisions compared with the policy.

    Attributes:
        outputs: how far outputs may differ from the network's, as a share of the largest; with activations of fewer than 8 bits no
            further than the rounding of floats explains (`bitwright.exporters._miscomputed`).
    """

    suffixes = (".xml",)
    companions = (".bin",)
    outputs: Share = 0.05

    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write both files; raises `ExportError` for what cannot be one compiled network."""
        made = converted(source)
        runtime = library()
        model = runtime.Core().read_model(made.model.SerializeToString())
        state_widths(model, made.emitted)
        compiled = compile_model(model, made.emitted.layers)
        content = content_text(
            source, made.program, made.emitted, self.outputs, lambda inputs: compiled(inputs)[compiled.outputs[0]], FORMAT
        )
        model.set_rt_info(json.dumps(runtime_options(made.emitted.layers)), ["bitwright", "runtime_options"])
        model.set_rt_info(content, ["bitwright", "content"])
        model.set_rt_info(BLANK, ["bitwright", "sha256"])
        weights = path.with_name(path.name + ".bin")
        staged = path.with_name(path.name + ".xml")
        try:
            runtime.serialize(model, str(staged), str(weights))
            text = staged.read_bytes()
        finally:
            staged.unlink(missing_ok=True)
        if text.count(BLANK.encode()) != 1:
            raise ExportError("export: the serialized network holds no place for its checksum; report this")
        path.write_bytes(text.replace(BLANK.encode(), checksum(text, weights.read_bytes()).encode()))
        return {"graph": len(text), "weights": weights.stat().st_size}

    def check(self, source: Source, path: Path) -> Check:
        """Compile and run the file; raises `ExportError` for a layer of another precision, or other outputs."""
        made = converted(source)
        model = read(path, path.with_name(path.name + ".bin"))
        compiled = compile_model(model, made.emitted.layers)
        executed = executed_precision(compiled, list(made.emitted.layers))
        wrong = otherwise(executed, made.emitted.layers)
        if wrong:
            raise ExportError(f"export: {wrong}; nothing was written")
        results = compiled(inputs_of(made.program, source))
        found, wanted = [results[port] for port in compiled.outputs], outputs(source.model, source.example)
        share, largest, agreement = output_gaps(wanted, found)
        bounds, median = allowed(made.program, source.example, wanted, self.outputs), typical(wanted, found)
        if share > bounds.largest or median > bounds.typical:
            gap = _gap(share, bounds.largest, "") if share > bounds.largest else _gap(median, bounds.typical, " in half of the samples")
            raise ExportError(f"export: OpenVINO computes other outputs than the network: {gap}{_cause(agreement, made)}")
        facts = {"exact": share == 0.0, "outputs": share, "difference": largest, "agreement": agreement, "executed": executed}
        verified = verify(path, path.with_name(path.name + ".bin"))
        return Check(verified.levels, largest, {**facts, "runtime_options": runtime_options(made.emitted.layers)})

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a file is one of ours."""
        return path.suffix == ".xml" and FORMAT.encode() in path.read_bytes()

    @classmethod
    def verify(cls, path: Path, model: Any = None) -> Verification:
        """Read both files, count levels and run them; raises `ExportError` with the reason for damaged ones."""
        return verify(path, path.with_suffix(".bin"))


def _gap(share: float, most: float, where: str) -> str:
    return f"off by {100 * share:.3g} % of the largest{where}, {100 * most:.3g} % allowed"


def _cause(agreement: float, made: Written) -> str:
    few = [name for name, bits in made.emitted.layers.items() if bits.a < 8]
    cause = f"; activations of fewer than 8 bits, as at '{few[0]}', are a known cause: give them 8, or leave points out" if few else ""
    return f", answers agree on {100 * agreement:.4g} %{cause}; nothing was written"


def library() -> Any:
    """Import OpenVINO; raises `ExportError` that says how to install it."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ExportError(f"export: openvino is not installed ({error}); type pip install 'bitwright[openvino]'") from None


def converted(source: Source) -> Written:
    """Return the network as the ONNX model that is converted."""
    if "openvino" in source.memo:
        found: Written = source.memo["openvino"]
        return found
    library()
    program = capture(source.model, source.example)
    if not program.layers:
        raise ExportError("export: the model has no quantized layer; pass what quantize() returned")
    rewrite(program)
    made = written(required("onnx"), program, source, FORM, {DOMAIN: 1}, NamedNorms)
    source.memo["openvino"] = made
    return made


def runtime_options(layers: Mapping[str, Bits]) -> dict[str, str]:
    """Return what to compile with: the type of all that is not in integers.

    Raises:
        ExportError: some layers are to run in bfloat16 and some in float32.
    """
    half = [name for name, bits in layers.items() if 16 in bits]
    full = [name for name, bits in layers.items() if 32 in bits]
    if half and full:
        both = f"'{half[0]}' has 16 bits and '{full[0]}' 32"
        raise ExportError(f"export: {both}, and an OpenVINO network has one type for all that is not 8-bit; give both 16, or both 32")
    return {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}


def compile_model(model: Any, layers: Mapping[str, Bits]) -> Any:
    """Return a model compiled for one thread of the CPU, with the options that its policy needs."""
    options = {**runtime_options(layers), "INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
    core = library().Core()
    if options["INFERENCE_PRECISION_HINT"] == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ExportError("export: the policy has 16-bit layers and this CPU has no bfloat16; export on one that has, or give 8 or 32 bits")
    try:
        return core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ExportError(f"export: OpenVINO refuses the network ({' '.join(str(error).split())[:200]}); export it again") from None


def expected(bits: Bits) -> str:
    """Return what a layer is to run in: integers where both widths are 8 or fewer, else bfloat16 or float32.

    >>> expected(Bits(8, 8)), expected(Bits(4, 16))
    ('int8', 'bf16 by int4')
    """
    if bits.w <= 8 and bits.a <= 8:
        return "int8"
    kind = "bf16" if 16 in bits else "float32"
    return f"{kind} by int{4 if bits.w <= 4 else 8}" if bits.w <= 8 else kind


def otherwise(executed: Mapping[str, str], layers: Mapping[str, Bits]) -> str:
    """Return which layers run in something else than their widths say, for people; empty where none does."""
    wrong = [f"'{name}' is {layers[name]!r} and runs in {kind}" for name, kind in executed.items() if kind != expected(layers[name])]
    return f"OpenVINO does not run {len(wrong)} layers as the policy says: {'; '.join(wrong[:6])}" if wrong else ""


def executed_precision(compiled: Any, addresses: Sequence[str]) -> dict[str, str]:
    """Return what each layer runs in, as the runtime's own model says: int8, bf16 or float32; ``unknown`` where it is not named."""
    found: dict[str, str] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in op.get_rt_info().items() if key in ("layerType", "originalLayersNames")}
        if info.get("layerType") not in LAYERS:
            continue
        names = info.get("originalLayersNames", "").split(",")
        inputs = [str(port.get_element_type().get_type_name()) for port in op.inputs()]
        for name in names:
            base = name.partition("/")[0]
            address = next((a for a in addresses if base == a or (base.startswith(f"{a}_") and base[len(a) + 1 :].isdigit())), None)
            if address is not None and address not in found:
                found[address] = _spelled(inputs)
    return {address: found.get(address, "unknown") for address in addresses}


def _spelled(inputs: Sequence[str]) -> str:
    if inputs[0] in INTEGER:
        return "int8"
    kind = {"bf16": "bf16", "f32": "float32", "f16": "float16"}.get(inputs[0], inputs[0])
    weights = {"i4": " by int4", "u4": " by int4", "i8": " by int8", "u8": " by int8"}
    return kind + weights.get(inputs[1] if len(inputs) > 1 else "", "")


# ---- files


def checksum(text: bytes, weights: bytes) -> str:
    """Return the SHA-256 of both files, the checksum in the first left blank."""
    digest = hashlib.sha256(text)
    digest.update(weights)
    return digest.hexdigest()


def read(path: Path, weights: Path) -> Any:
    """Return the model in two files; raises `ExportError` with the reason for damaged ones."""
    for file in (path, weights):
        if not file.is_file():
            raise ExportError(f"{file}: no such file; an OpenVINO network is two, .xml and .bin, side by side")
    text, data = path.read_bytes(), weights.read_bytes()
    start = text.find(b'<sha256 value="')
    found = text[start + 15 : start + 79]
    if start < 0 or len(found) != 64:
        raise ExportError(f"{path.name}: has no checksum in it, so bitwright did not write it, or it is cut off; export it again")
    if checksum(text[: start + 15] + BLANK.encode() + text[start + 79 :], data) != found.decode("latin-1"):
        raise ExportError(f"{path.name}: tampered with or damaged: both files do not match the checksum; export it again")
    with fitting(path.name):
        return library().Core().read_model(text, data)


def verify(path: Path, weights: Path) -> Verification:
    """Check two files from the outside: checksum, each operation against the policy, executed precision, and the sample's answer."""
    model = read(path, weights)
    content = content_of_text(path.name, _told(model, "content"), FORMAT)
    layers = {name: Bits(*bits) for name, bits in content["layers"].items()}
    with fitting(path.name):
        rows, samples, most = recount(model, content), samples_of(content), bound_of(content)
        if json.loads(_told(model, "runtime_options")) != runtime_options(layers):
            raise ExportError(
                f"it asks to be compiled with {_told(model, 'runtime_options')}, and its policy with {runtime_options(layers)}"
            )
    compiled = compile_model(model, layers)
    wrong = otherwise(executed_precision(compiled, list(layers)), layers)
    if wrong:
        raise ExportError(f"{path.name}: {wrong}; verify it on a CPU like the one that exported it, or export it again")
    with fitting(path.name):
        gap = answer_gap(content["sample"]["answer"], compiled(samples)[compiled.outputs[0]])
    return Verification(path, "openvino", content["policy"], rows, SAMPLES, gap, most).checked()


def _told(model: Any, key: str) -> str:
    """Return what a file says of itself under a key; empty for nothing."""
    return str(model.get_rt_info(["bitwright", key]).astype(str)) if model.has_rt_info(["bitwright", key]) else ""
