"""Which widths a file of quantization and dequantization nodes really has: read from its graph, layer by layer, compared with its policy.

Weights of any width up to 8 are stored as 8-bit integers, and a clip may leave an activation fewer codes than its grid has, so a graph
shows how many bits are enough and not how many there are: `state_widths` writes these to the weights and the nodes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.errors import ExportError
from bitwright.exporters._claims import all_found, compare
from bitwright.exporters._emission import Emitted
from bitwright.exporters._quant_nodes import MOVES, Nodes
from bitwright.policy import Bits

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FLOATS = {16: "BFLOAT16", 32: "FLOAT"}
"""How weights of more than 8 bits are stored."""


@dataclass(frozen=True)
class Rounding:
    """An activation that a graph rounds: the name of its node, its bits, the tensor of codes, and the lowest and the highest code."""

    name: str
    bits: int
    codes: str
    low: int
    high: int


def state_widths(model: Any, emitted: Emitted) -> None:
    """Write into a model, at each weight and each quantization of an activation, how many bits it has."""
    weights = {record.initializer: record.bits.w for record in emitted.weights}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.doc_string = f"{weights[tensor.name]} bits"
    makers = {name: node for node in model.graph.node for name in node.output}
    for point in emitted.points:
        if point.codes:
            node = makers[point.codes]
            (node if node.op_type == "QuantizeLinear" else makers[node.input[0]]).doc_string = f"{point.bits} bits"


def recount(onnx: Any, model: Any, content: Mapping[str, Any]) -> None:
    """Compare every quantized weight and activation of a graph with the policy of its file.

    Args:
        onnx: the package.
        model: a model of quantization and dequantization nodes.
        content: what the file says of itself; see `bitwright.exporters._onnx_file`.

    Raises:
        ExportError: a width is another than the policy's, a layer is missing, or one is there that the file does not list.
    """
    nodes = Nodes(onnx, model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = {address: Bits(*bits) for address, bits in content["layers"].items()}
    listed = {initializer: str(address) for address, _, initializer, _ in content["weights"]}
    found: set[str] = set()
    for node in nodes.nodes:
        if node.op_type in LAYERS:
            initializer = _weight_of(nodes, node.input[1])
            if initializer in listed:
                address = listed.pop(initializer)
                _weight(onnx, nodes, tensors[initializer], address, layers[address], node.input[1])
                _input(nodes, address, "input", layers[address].a, node.input[0])
                found.add(address)
            elif initializer is not None and initializer != node.input[1]:
                raise ExportError(f"the layer '{node.name}' has a quantized weight that the file does not list")
    if listed:
        raise ExportError(f"no layer of its graph reads the weight '{next(iter(listed))}', which the file lists")
    found.update(_products(nodes, layers, found))
    all_found(layers, found)
    _activations(nodes, content["activations"])


def _weight_of(nodes: Nodes, tensor: str) -> str | None:
    """Return the initializer that a layer's second operand is made of; None where it is computed."""
    maker = nodes.makers.get(tensor)
    if maker is not None and maker.op_type in ("DequantizeLinear", "Cast"):
        tensor = maker.input[0]
    return tensor if tensor in nodes.constants else None


def _weight(onnx: Any, nodes: Nodes, tensor: Any, address: str, bits: Bits, read: str) -> None:
    if bits.w > 8:
        stored = onnx.TensorProto.DataType.Name(tensor.data_type)
        if stored != FLOATS[bits.w]:
            raise ExportError(f"the policy says {bits.w} bits for the weight of '{address}', which is stored as {stored}")
        return
    if read not in nodes.makers or nodes.makers[read].op_type != "DequantizeLinear":
        raise ExportError(f"the policy says {bits.w} bits for the weight of '{address}', which is no integers with a scale")
    compare("weight", address, bits.w, _stated(tensor))


def _input(nodes: Nodes, address: str, part: str, width: int, tensor: str) -> None:
    rounding = _rounding_before(nodes, tensor)
    if width <= 8:
        compare(part, address, width, None if rounding is None else rounding.bits)
    elif rounding is not None and not rounding.name.startswith("point:"):
        compare(part, address, width, rounding.bits)


def _products(nodes: Nodes, layers: Mapping[str, Bits], found: set[str]) -> Iterator[str]:
    """Yield the products of two activations that are there, both operands compared with the policy."""
    for address in layers.keys() - found:
        for node in nodes.called(address):
            if node.op_type == "MatMul" and _weight_of(nodes, node.input[1]) is None:
                for side, tensor in zip(("left operand", "right operand"), node.input, strict=True):
                    _input(nodes, address, side, layers[address].a, tensor)
                yield address


def _rounding_before(nodes: Nodes, tensor: str) -> Rounding | None:
    """Return what a tensor was rounded by, moved or not; None where it is on no grid."""
    node = nodes.makers.get(tensor)
    while node is not None and node.op_type in MOVES:
        node = nodes.makers.get(node.input[0])
    return _rounding(nodes, node) if node is not None and node.op_type == "DequantizeLinear" else None


def _rounding(nodes: Nodes, dequantize: Any) -> Rounding | None:
    """Return what codes that are dequantized were rounded by; raises `ExportError` for a grid without a meaning."""
    codes = dequantize.input[0]
    node, bounds = nodes.makers.get(codes), (0, 255)
    if node is not None and node.op_type == "Clip":
        bounds = tuple(int(nodes.constants[name]) for name in node.input[1:3])  # type: ignore[assignment]
        node = nodes.makers.get(node.input[0])
    if node is None or node.op_type != "QuantizeLinear":
        return None
    bits, (low, high), zero, step = _stated(node), bounds, int(nodes.constants[node.input[2]]), float(nodes.constants[node.input[1]])
    pairs = [(nodes.constants[a], nodes.constants[b]) for a, b in zip(node.input[1:], dequantize.input[1:], strict=True)]
    same = all(b.size and np.all(a == b) for a, b in pairs)  # before a float layer the one scale is repeated for each channel
    lowest, highest = _codes(bits, zero)
    if not (same and 0 < step < np.inf and lowest <= low <= high <= highest):
        allowed = f"codes from {low} to {high} by steps of {step:.3g}, and {bits} bits allow {lowest} to {highest}"
        raise ExportError(f"the grid of '{node.name}' has {allowed}" if same else f"'{node.name}' is not dequantized by its own grid")
    return Rounding(node.name, bits, codes, low, high)


def _codes(bits: int, zero: int) -> tuple[int, int]:
    """Return the codes that a width allows, given the code of zero.

    >>> _codes(4, 0), _codes(4, 128), _codes(1, 128)
    ((0, 15), (120, 135), (127, 129))
    """
    if zero == 128:  # signed; of one bit there are two signs and no zero
        half = 1 << max(bits - 1, 0)
        return zero - half, zero + max(half - 1, 1)
    return zero, zero + (1 << bits) - 1


def _stated(part: Any) -> int:
    """Return the bits that a weight or a node says it has."""
    number, _, word = part.doc_string.partition(" ")
    if word != "bits" or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 32:
        raise ExportError(f"'{part.name}' does not say how many bits it has")
    return int(number)


def _activations(nodes: Nodes, listed: list[list[Any]]) -> None:
    """Raise `ExportError` unless a file lists all activations that its graph rounds, as they are."""
    made = [_rounding(nodes, node) for node in nodes.nodes if node.op_type == "DequantizeLinear"]
    graph = {r.codes: (r.bits, r.low, r.high) for r in made if r is not None}
    told = {codes: (bits, low, high) for _, bits, codes, low, high in listed}
    for codes in graph.keys() | told.keys():
        if graph.get(codes) != told.get(codes):
            spelled = [f"{g[0]} bits, codes {g[1]} to {g[2]}" if g else "no grid" for g in (told.get(codes), graph.get(codes))]
            raise ExportError(f"the file says of '{codes}': {spelled[0]}; its graph has {spelled[1]}")
