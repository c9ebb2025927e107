"""Layers with float weights, written so that ONNX Runtime leaves them in float, whatever is on a grid around them.

Between a ``DequantizeLinear`` and a ``QuantizeLinear`` ONNX Runtime rounds a convolution's float weights to 8 bits with one scale, and runs
it in integers. Its default session does so (the transformer ``WeightBiasQuantization``), unless the input's scale is a vector, for which
``QLinearConv`` has no place. So such a layer reads a dequantization of its own, which repeats the scale for each channel: the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitwright.exporters._quant_nodes import MOVES

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What the runtime rounds, and the product that it fuses into a `Gemm`."""


def keep_float(onnx: Any, model: Any, shapes: Mapping[str, Sequence[Any]]) -> None:
    """Change a model so that no layer with float weights reads a dequantization with a single scale.

    Args:
        onnx: the package.
        model: with nodes in execution order.
        shapes: of the tensors of codes, by name; an open size is no int.
    """
    made = _Dequantizations(onnx, model, shapes)
    for node in list(model.graph.node):
        if node.op_type in LAYERS and made.is_float(node.input[1]):
            node.input[0] = made.apart(node.input[0])
        made.nodes.append(node)
    kept = made.read()
    del model.graph.node[:]
    model.graph.node.extend(kept)


class _Dequantizations:
    """The nodes of a model, and the dequantizations that layers with float weights have for themselves."""

    def __init__(self, onnx: Any, model: Any, shapes: Mapping[str, Sequence[Any]]):
        self.onnx, self.graph, self.shapes = onnx, model.graph, shapes
        self.nodes: list[Any] = []
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.replaced: dict[str, str] = {}

    def is_float(self, weight: str) -> bool:
        """Return whether a weight is a constant, rounded to bfloat16 or not, and no codes."""
        maker = self.makers.get(weight)
        return weight in self.constants or (maker is not None and maker.op_type == "Cast" and maker.input[0] in self.constants)

    def apart(self, tensor: str) -> str:
        """Return a tensor with the same values that has a scale for each channel; itself where it is on no grid."""
        maker = self.makers.get(tensor)
        if tensor in self.replaced or maker is None:
            return self.replaced.get(tensor, tensor)
        if maker.op_type == "DequantizeLinear" and maker.input[0] in self.shapes:
            self.replaced[tensor] = self._by_channel(maker, self.shapes[maker.input[0]])
        elif maker.op_type in MOVES:  # the runtime takes a dequantization through these
            self._moved(maker)
        return self.replaced.get(tensor, tensor)

    def _by_channel(self, maker: Any, shape: Sequence[Any]) -> str:
        axis = next((k for k, size in enumerate(shape) if k and isinstance(size, int) and size > 1), None)
        if axis is None:  # a vector of one is a single scale to the runtime
            return str(maker.output[0])
        name, numpy = f"{maker.output[0]}_float", self.onnx.numpy_helper
        inputs = [maker.input[0]]
        for part, single in zip(("scale", "zero"), maker.input[1:], strict=True):
            repeated = np.full(shape[axis], numpy.to_array(self.constants[single]))
            self.graph.initializer.append(numpy.from_array(repeated, f"{name}_{part}"))
            inputs.append(f"{name}_{part}")
        self.nodes.append(self.onnx.helper.make_node("DequantizeLinear", inputs, [name], name, axis=axis))
        return name

    def _moved(self, maker: Any) -> None:
        source = self.apart(maker.input[0])
        if source == maker.input[0]:
            return
        copy = type(maker)()
        copy.CopyFrom(maker)
        copy.name, copy.input[0] = f"{maker.name}_float", source
        for place, name in enumerate(maker.output):
            copy.output[place] = self.replaced[name] = f"{name}_float"
        self.nodes.append(copy)

    def read(self) -> list[Any]:
        """Return the nodes without those whose results nothing reads since another took their place."""
        needed, kept = {value.name for value in self.graph.output}, []
        for node in reversed(self.nodes):
            if not self.replaced.keys() >= set(node.output) or needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        return kept[::-1]
