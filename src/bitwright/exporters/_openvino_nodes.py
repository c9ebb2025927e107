"""Which widths an OpenVINO network really has: read from its operations, layer by layer, and compared with its policy.

A ``FakeQuantize`` says its levels. Weights of any width up to 8 may be 8-bit integers: `state_widths` writes the width to their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitwright.errors import ExportError
from bitwright.exporters import TensorCheck
from bitwright.exporters._claims import all_found, compare
from bitwright.exporters._emission import Emitted
from bitwright.policy import Bits

LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_MOVES = """Reshape Transpose Squeeze Unsqueeze Pad MaxPool StridedSlice Slice Split VariadicSplit Gather Broadcast Convert"""
MOVES = frozenset(_MOVES.split())
"""Operations between a rounding and its reader, or a constant and its reader, that move values."""
SCALES = ("Subtract", "Multiply")
"""What makes values of integers, where the second operand is a constant."""
STORED = {16: ("bf16",), 32: ("f32",)}
INTEGERS = ("i4", "u4", "i8", "u8")


def state_widths(model: Any, emitted: Emitted) -> None:
    """Write into the names of a model's weights how many bits they have."""
    widths = {record.initializer: record.bits.w for record in emitted.weights}
    for op in model.get_ops():
        name = op.get_friendly_name()
        if op.get_type_name() == "Constant" and name in widths:
            op.set_friendly_name(stated(name, widths[name]))


def stated(initializer: str, width: int) -> str:
    """Return the name of a weight of a width.

    >>> stated("conv1.weight", 4)
    'conv1.weight: 4 bits'
    """
    return f"{initializer}: {width} bits"


def recount(model: Any, content: Mapping[str, Any]) -> tuple[TensorCheck, ...]:
    """Return a row for each weight and each quantized input of a layer, after comparing all of a network's with its policy.

    Args:
        model: an OpenVINO model.
        content: what the file says of itself; see `bitwright.exporters._onnx_file`.

    Raises:
        ExportError: a width is another than the policy's, a layer is missing, or one is there that the file does not list.
    """
    layers = {address: Bits(*bits) for address, bits in content["layers"].items()}
    listed = {initializer: (str(address), axis) for address, _, initializer, axis in content["weights"]}
    rows: list[TensorCheck] = []
    found: set[str] = set()
    for op in (op for op in model.get_ordered_ops() if op.get_type_name() in LAYERS):
        constant, address = _source(op, 1), op.get_friendly_name().partition("/")[0]
        if constant.get_type_name() == "Constant":
            initializer = constant.get_friendly_name().rpartition(": ")[0]
            if initializer in listed:
                address, axis = listed.pop(initializer)
                rows += [_weight(constant, initializer, address, layers[address], axis), *_input(op, 0, address, layers[address])]
                found.add(address)
            elif constant.get_output_element_type(0).get_type_name() != "f32":
                raise ExportError(f"the layer '{op.get_friendly_name()}' has a quantized weight that the file does not list")
        elif address in layers:
            rows += [row for side in (0, 1) for row in _input(op, side, address, layers[address])]
            found.add(address)
    if listed:
        raise ExportError(f"no layer of its graph reads the weight '{next(iter(listed))}', which the file lists")
    all_found(layers, found)
    return tuple(rows)


def _source(op: Any, port: int) -> Any:
    """Return the operation that an operand comes from, moved or scaled or not."""
    node = op.input_value(port).get_node()
    while node.get_type_name() in MOVES or (node.get_type_name() in SCALES and _is_constant(node.input_value(1).get_node())):
        node = node.input_value(0).get_node()
    return node


def _is_constant(node: Any) -> bool:
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _weight(constant: Any, initializer: str, address: str, bits: Bits, axis: int | None) -> TensorCheck:
    stored, name = str(constant.get_output_element_type(0).get_type_name()), constant.get_friendly_name()
    compare("weight", address, str(bits.w), name.removeprefix(f"{initializer}: ").removesuffix(" bits"))
    if stored not in STORED.get(bits.w, INTEGERS):
        raise ExportError(f"the policy says {bits.w} bits for the weight of '{address}', which is stored as {stored}")
    if bits.w > 8:
        return TensorCheck(address, "weight", bits.w, stored, None, None)
    values = np.asarray(constant.data).astype(np.float32)
    groups = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return TensorCheck(address, "weight", bits.w, stored, max(len(np.unique(group)) for group in groups), 2**bits.w)


def _input(op: Any, port: int, address: str, bits: Bits) -> Iterator[TensorCheck]:
    part = ("input", "right operand")[port]
    rounding = _source(op, port)
    levels = _levels(rounding) if rounding.get_type_name() == "FakeQuantize" else None
    if bits.a <= 8:
        wanted = (2, 3) if bits.a == 1 else (2**bits.a,)  # the signs of a step, with the zero between them
        compare(part, address, bits.a, bits.a if levels in wanted else f"{levels} levels")
        yield TensorCheck(f"{address}.{part}", "activation", bits.a, "FakeQuantize", None, None)
    elif levels is not None and levels < 256:  # of 8 bits are points, which layers of more bits read too
        compare(part, address, bits.a, f"{levels} levels")


def _levels(rounding: Any) -> int:
    """Return the levels of a rounding; raises `ExportError` for bounds without a meaning."""
    bounds = [np.asarray(rounding.input_value(port).get_node().data, np.float64) for port in range(1, 5)]
    levels = int(rounding.get_attributes()["levels"])
    if not all(np.isfinite(bound).all() for bound in bounds) or not ((bounds[0] < bounds[1]).all() and (bounds[2] < bounds[3]).all()):
        low, high = (float(bound.flat[0]) for bound in bounds[:2])
        raise ExportError(f"'{rounding.get_friendly_name()}' rounds what is between {low:.3g} and {high:.3g}")
    return levels
