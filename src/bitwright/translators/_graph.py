"""Names of tensors in an ONNX graph: formats that speak of tensors need the graph that they are for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import PolicyError, nearest
from bitwright.translators import Layer

OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Place:
    """Where a layer is in a graph: its nodes, its weight, and what the nodes read."""

    nodes: tuple[str, ...]
    weight: str
    inputs: tuple[str, ...]


def operators(graph: str, of: str) -> Mapping[str, str]:
    """Return the type of each convolution and matrix product of a graph, by the name of its node; raises as `places` does."""
    return {node.name: str(node.op_type) for node in _loaded(graph, of).graph.node if node.op_type in OPERATORS}


def named_nodes(graph: str, of: str) -> frozenset[str]:
    """Return the names of all nodes of a graph; raises as `places` does."""
    return frozenset(node.name for node in _loaded(graph, of).graph.node)


def tensors(graph: str, of: str) -> frozenset[str]:
    """Return the names of all tensors of a graph; raises as `places` does."""
    loaded = _loaded(graph, of).graph
    named = [*(value.name for value in (*loaded.input, *loaded.initializer)), *(name for node in loaded.node for name in node.output)]
    return frozenset(named)


def places(graph: str, layers: Sequence[Layer], of: str) -> Mapping[str, Place]:
    """Return where each layer is, by its path: the node that reads the initializer ``PATH.weight``.

    Raises:
        PolicyError: no graph is given, it cannot be read, or a layer is not in it under its own name.
    """
    loaded = _loaded(graph, of)
    weights = [tensor.name for tensor in loaded.graph.initializer]
    found = {}
    for layer in layers:
        name = f"{layer.path}.weight"
        if name not in weights:
            raise PolicyError(f"{Path(graph).name}: no initializer '{name}' for a layer of {of}; {nearest(name, weights)}")
        nodes = [node for node in loaded.graph.node if node.op_type in OPERATORS and name in list(node.input)[1:2]]
        if not nodes:
            raise PolicyError(
                f"{Path(graph).name}: no convolution or matrix product reads '{name}'; export the network without transposing it"
            )
        found[layer.path] = Place(tuple(node.name for node in nodes), name, tuple(dict.fromkeys(node.input[0] for node in nodes)))
    return found


def rounded_sources(graph: str, wanted: Iterable[str], rounded: Collection[str], of: str) -> Mapping[str, str]:
    """Return which rounded tensor each wanted one is, or is made of by calls with one operand; those of none are left out."""
    loaded = _loaded(graph, of).graph
    makers = {name: node for node in loaded.node for name in node.output}
    fixed = {tensor.name for tensor in loaded.initializer} | {name for name, node in makers.items() if node.op_type == "Constant"}
    found = {}
    for tensor in wanted:
        source = tensor
        while source not in rounded and source in makers and makers[source].op_type not in OPERATORS:
            operands = [name for name in makers[source].input if name and name not in fixed]
            if len(operands) != 1:
                break
            source = operands[0]
        if source in rounded:
            found[tensor] = source
    return found


def _loaded(graph: str, of: str) -> Any:
    if not graph:
        raise PolicyError(f"policy: {of} speaks of tensors of an ONNX graph; give it as --option graph=FILE.onnx")
    try:
        import onnx  # noqa: PLC0415  (an extra)
    except ImportError:
        raise PolicyError(f"policy: {of} needs the onnx package; pip install 'bitwright[onnx]'") from None
    try:
        return onnx.load(graph, load_external_data=False)
    except Exception as error:  # whatever protobuf raises on what is no model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PolicyError(f"{Path(graph).name}: no ONNX graph ({reason[:100]}); give the float network's export") from None


def widths_of_inputs(layers: Sequence[Layer], found: Mapping[str, Place], of: str) -> Mapping[str, int]:
    """Return the width of each tensor that layers read; raises `PolicyError` where two sites ask for different ones."""
    widths: dict[str, tuple[int, str]] = {}
    for layer in layers:
        for tensor in found[layer.path].inputs:
            width, site = widths.setdefault(tensor, (layer.bits.a, layer.site.name))
            if width != layer.bits.a:
                asked = f"sites '{site}' and '{layer.site.name}' read the tensor '{tensor}' at {width} and {layer.bits.a} bits"
                raise PolicyError(f"policy: {of} cannot say that {asked}; tie them")
    return {tensor: width for tensor, (width, _) in widths.items()}
