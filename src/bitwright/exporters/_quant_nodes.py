"""Which widths a QONNX file really has: read from its ``Quant`` and ``BipolarQuant`` nodes, layer by layer, and compared with its policy.

A layer is found by its weight: the node that says the weight's grid, and from there the operation that multiplies it. What else that
operation reads is followed back, through calls that only move values, to the node that says the grid of the input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitwright.errors import ExportError
from bitwright.exporters import TensorCheck
from bitwright.policy import Bits

GRIDS = ("Quant", "BipolarQuant")
_MOVES = """Reshape Transpose Flatten Squeeze Unsqueeze Pad Slice Split Gather Expand MaxPool Identity Cast"""
MOVES = frozenset(_MOVES.split())
"""Calls that give no value but those they read, and the zeros of a padding."""


class Nodes:
    """The nodes of a graph by what they make and by what they read, and its constants.

    Args:
        onnx: the package.
        model: a QONNX model.
    """

    def __init__(self, onnx: Any, model: Any):
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes = list(model.graph.node)

    def width(self, node: Any) -> int:
        """Return the bits that a node rounds to; raises `ValueError` where they are no whole number."""
        if node.op_type == "BipolarQuant":
            return 1
        found = np.unique(self.constants[node.input[3]])
        if found.size != 1 or found[0] != int(found[0]):
            raise ValueError(f"'{node.name}' has {found[:4].tolist()} bits")
        return int(found[0])

    def grid_before(self, tensor: str) -> Any:
        """Return the node whose grid a tensor is on; None where it is on none."""
        node = self.makers.get(tensor)
        while node is not None and node.op_type in MOVES:
            node = self.makers.get(node.input[0])
        return node if node is not None and node.op_type in GRIDS else None

    def called(self, name: str) -> list[Any]:
        """Return the nodes of a name, which is numbered where a tensor is rounded to its grid again after it was moved."""
        return [node for node in self.nodes if re.fullmatch(rf"{re.escape(name)}(_\d+)?", node.name)]

    def products(self, tensor: str) -> Iterator[tuple[Any, str]]:
        """Yield the operations that read a weight, moved or not, each with the name of its other operand."""
        for node in self.readers.get(tensor, []):
            if node.op_type in (*MOVES, *GRIDS):
                for made in node.output:
                    yield from self.products(made)
            else:
                yield node, node.input[0] if node.input[0] != tensor else node.input[1]


def recount(onnx: Any, model: Any, content: Mapping[str, Any]) -> tuple[TensorCheck, ...]:
    """Return a row for each quantized input of a layer, after comparing the nodes of all weights and inputs with the policy.

    Args:
        onnx: the package.
        model: a QONNX model.
        content: what the file says of itself; see `bitwright.exporters._onnx_file`.

    Raises:
        ExportError: a node has another width than the policy says, or there is none; the message names the layer.
    """
    nodes = Nodes(onnx, model)
    rows = [row for address, bits, initializer, _ in content["weights"] for row in _layer(nodes, address, Bits(*bits), initializer)]
    weighted = {address for address, *_ in content["weights"]}
    products = {address: Bits(*bits) for address, bits in content["layers"].items() if address not in weighted}
    return (*rows, *(row for address, bits in products.items() if bits.a <= 8 for row in _operands(nodes, address, bits)))


def _layer(nodes: Nodes, address: str, bits: Bits, initializer: str) -> Iterator[TensorCheck]:
    if bits.w <= 8:
        grid = next((node for node in nodes.readers.get(initializer, []) if node.op_type in GRIDS), None)
        _compare(nodes, address, "weight", bits.w, grid)
    inputs = [nodes.grid_before(tensor) for _, tensor in nodes.products(initializer)] if bits.a <= 8 else []
    for grid in (*inputs, *(nodes.called(f"{address}.input_quant") if inputs else ())):
        _compare(nodes, address, "input", bits.a, grid)
    if inputs:
        yield TensorCheck(f"{address}.input", "activation", bits.a, "Quant", None, None)


def _operands(nodes: Nodes, address: str, bits: Bits) -> Iterator[TensorCheck]:
    for side in ("left", "right"):
        name = f"{address}.{side}"
        for grid in nodes.called(f"{name}_quant") or [None]:
            _compare(nodes, address, f"{side} operand", bits.a, grid)
        yield TensorCheck(name, "activation", bits.a, "Quant", None, None)


def _compare(nodes: Nodes, address: str, part: str, width: int, grid: Any) -> None:
    """Raise `ExportError` unless a node is there and has the width."""
    found = None if grid is None else nodes.width(grid)
    if found != width:
        has = "no Quant node" if found is None else f"{found} bit{'s' * (found != 1)} in its {grid.op_type} node"
        raise ExportError(f"the policy says {width} bits for the {part} of '{address}', which has {has}")
