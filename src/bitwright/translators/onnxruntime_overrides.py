"""ONNX Runtime: tensor overrides for ``quantize_static``, with the nodes that it must leave alone.

The JSON holds ``TensorQuantOverrides`` with the names of quantization types (``QuantType.from_string`` reads them),
``op_types_to_quantize``, those of the graph that have weights or are products, ``nodes_to_exclude`` of these, and, for ``extra_options`` as
well, ``OpTypesToExcludeOutputQuantization``: else results are rounded, too, and float layers read those. ONNX Runtime quantizes a node's
weight and input together, in 4 or 8 bits, and rounds a tensor for all that read it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bitwright.errors import PolicyError, nearest
from bitwright.policy import Bits
from bitwright.translators import FLOAT, Layer, Subject, Translator, integer_widths
from bitwright.translators._graph import OPERATORS, Place, named_nodes, operators, places, rounded_sources, widths_of_inputs
from bitwright.translators._reading import loaded, one_width, only

_WEIGHTS = {4: "QInt4", 8: "QInt8"}
_INPUTS = {4: "QUInt4", 8: "QUInt8"}
_KEYS = ("TensorQuantOverrides", "OpTypesToExcludeOutputQuantization", "op_types_to_quantize", "nodes_to_exclude")
_ENTRY = ("quant_type", "axis", "symmetric", "rmin", "rmax", "scale", "zero_point")
_BITS = {"QInt4": 4, "QUInt4": 4, "QInt8": 8, "QUInt8": 8}


@dataclass(frozen=True)
class OnnxRuntimeOverrides(Translator):
    """Tensor overrides; ``graph``: the float network's ONNX file, whose tensors they name."""

    name: ClassVar[str] = "onnxruntime-overrides"

    graph: str = ""

    def unsaid(self, layer: Layer) -> str | None:
        """Return why ONNX Runtime cannot say a layer's bits."""
        if layer.bits == FLOAT:
            return None
        return integer_widths(layer.bits, tuple(_WEIGHTS), tuple(_INPUTS))

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the overrides and the nodes that stay float."""
        named = [layer for layer in layers if "#" not in layer.path]
        found = places(self.graph, named, self.name)
        chosen = [layer for layer in named if layer.bits != FLOAT]
        overrides: dict[str, list[dict[str, Any]]] = {}
        for layer in chosen:
            overrides[found[layer.path].weight] = [{"quant_type": _WEIGHTS[layer.bits.w], "symmetric": True}]
        widths = widths_of_inputs(chosen, found, self.name)
        self._refuse_rounded([layer for layer in named if layer.bits == FLOAT], found, widths)
        for tensor, width in widths.items():
            overrides[tensor] = [{"quant_type": _INPUTS[width]}]
        quantized = {node for layer in chosen for node in found[layer.path].nodes}
        # layers of 32 bits, skipped ones and float products: the tool quantizes every operator that is not left out by name
        nodes = operators(self.graph, self.name)
        if "" in nodes and nodes.keys() - quantized:
            raise PolicyError(f"{Path(self.graph).name}: an operator has no name, so {self.name} cannot leave it out; name the nodes")
        excluded = [node for node in nodes if node not in quantized]
        types = sorted(set(nodes.values()))
        options = {"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": types}
        return json.dumps({**options, "op_types_to_quantize": types, "nodes_to_exclude": excluded}, indent=1)

    def _refuse_rounded(self, floats: Sequence[Layer], found: Mapping[str, Place], widths: Mapping[str, int]) -> None:
        """Raise `PolicyError` for a float layer whose input is rounded for another layer."""
        for layer in floats:
            for source in rounded_sources(self.graph, found[layer.path].inputs, widths, self.name).values():
                asked = f"site '{layer.site.name}' reads the tensor '{source}' in float and another layer at {widths[source]} bits"
                raise PolicyError(f"policy: {self.name} cannot say that {asked}; tie them")

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = loaded(text, self.name)
        overrides, excluded = data["TensorQuantOverrides"], set(data["nodes_to_exclude"])
        only(data, _KEYS, "the file", self.name)
        nodes = operators(self.graph, self.name)
        types = data.get("op_types_to_quantize", list(nodes.values()))  # files of earlier versions leave them to the caller
        _check_known(excluded, types, self.graph, self.name)
        excluded |= {node for node, kind in nodes.items() if kind not in types}
        layers = [Layer(path, site, FLOAT) for site in subject.sites for path in site.layers if "#" not in path]
        found, bits, used = places(self.graph, layers, self.name), dict[str, Bits](), set[str]()
        for path, place in found.items():
            if set(place.nodes) <= excluded:
                continue
            if set(place.nodes) & excluded:
                raise PolicyError(f"policy: the file of {self.name} leaves out some nodes of '{path}', and a policy all or none")
            weight, *inputs = (_width(tensor, overrides[tensor], self.name) for tensor in (place.weight, *place.inputs))
            bits[path] = Bits(weight, one_width(path, inputs, self.name))
            used.update((place.weight, *place.inputs))
        unknown = [tensor for tensor in overrides if tensor not in used]
        if unknown:
            raise PolicyError(f"policy: the file of {self.name} overrides {unknown[0]!r}, which no layer of a site reads")
        return bits


def _check_known(excluded: Collection[str], types: Collection[str], graph: str, of: str) -> None:
    """Raise `PolicyError` for an excluded node that is not there, or a quantized type of operator that sites do not have."""
    nodes = named_nodes(graph, of)
    for node in sorted(set(excluded) - nodes):
        raise PolicyError(f"policy: the file of {of} excludes {node!r}, which is no node of the graph; {nearest(node, nodes)}")
    for kind in sorted(set(types) - OPERATORS):
        known = ", ".join(sorted(OPERATORS))
        raise PolicyError(f"policy: the file of {of} quantizes {kind!r}, for which a policy has no sites; it has {known}")


def _width(tensor: str, entries: Sequence[Mapping[str, Any]], of: str) -> int:
    """Return the width of a tensor; entries beyond the first are of its channels, and must have the type of the first."""
    first = entries[0]["quant_type"]
    for entry in entries:
        kind = entry.get("quant_type", first)
        if kind != first:
            raise PolicyError(f"policy: the file of {of} gives channels of {tensor!r} {first} and {kind}; a policy has one width for all")
        only(entry, _ENTRY, f"the override of {tensor!r}", of)
    if first not in _BITS:
        raise PolicyError(f"policy: the file of {of} gives {tensor!r} {first!r}, which a policy cannot say; it has {', '.join(_BITS)}")
    return _BITS[first]
