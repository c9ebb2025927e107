"""AIMET: an encodings file of version 1.0.0, as its encoding specification describes it.

It holds scales and offsets besides widths, so it is written from a quantized network; weights are named by parameter (``conv1.weight``),
inputs by their tensor in the ONNX graph. AIMET's integers have 2 bits and more, and an integer zero point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.translators import FLOAT, Layer, Subject, Translator, integer_widths
from bitwright.translators._graph import places, tensors, widths_of_inputs
from bitwright.translators._reading import integers, loaded, once, one_width, only

_WIDTHS = (*range(2, 9), 32)
_VERSION = "1.0.0"
_KEYS = ("version", "param_encodings", "activation_encodings", "excluded_layers", "quantizer_args")
_ENTRY = ("name", "dtype", "enc_type", "bw", "is_sym", "scale", "offset")
_TYPES = ("PER_TENSOR", "PER_CHANNEL")
_BIAS = 32
"""Bits of a bias that is as good as float."""


@dataclass(frozen=True)
class Aimet(Translator):
    """Encodings; ``graph``: the float network's ONNX file, whose tensors the inputs are (not needed where no input is quantized)."""

    name: ClassVar[str] = "aimet"
    suffix: ClassVar[str] = ".encodings"

    graph: str = ""

    def unsaid(self, layer: Layer) -> str | None:
        """Return why AIMET's encodings cannot say a layer's bits."""
        return integer_widths(layer.bits, _WIDTHS, _WIDTHS)

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the encodings."""
        if subject.network is None:
            raise PolicyError("policy: encodings of aimet hold scales; give a run that has its fine-tuned network")
        shells = dict(named_quant_layers(subject.network))
        missing = [layer.path for layer in layers if layer.bits != FLOAT and layer.path not in shells]
        if missing:
            raise PolicyError(f"policy: the network has no quantized layer '{missing[0]}'; give the network of this policy")
        params = [_weight(layer, shells[layer.path]) for layer in layers if layer.bits.w < 32]
        return json.dumps(
            {
                "version": _VERSION,
                "param_encodings": params,
                "activation_encodings": self._inputs([layer for layer in layers if layer.bits.a < 32], shells),
                "excluded_layers": [layer.path for layer in layers if layer.bits == FLOAT and "#" not in layer.path],
            },
            indent=1,
        )

    def _inputs(self, layers: Sequence[Layer], shells: Mapping[str, QuantLayer]) -> list[dict[str, Any]]:
        if not layers:
            return []
        found = places(self.graph, layers, self.name)
        widths = widths_of_inputs(layers, found, self.name)
        reader = {tensor: layer for layer in reversed(layers) for tensor in found[layer.path].inputs}
        return [_input(tensor, width, reader[tensor].path, shells[reader[tensor].path]) for tensor, width in widths.items()]

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = loaded(text, self.name)
        if data["version"] != _VERSION:
            raise PolicyError(f"policy: encodings of version {data['version']!r}; export version '{_VERSION}'")
        only(data, _KEYS, "the file", self.name)
        weights = _weights(data["param_encodings"], self.name)
        for excluded in data.get("excluded_layers", []):
            if excluded in weights:
                raise PolicyError(
                    f"policy: the encodings give '{excluded}' a weight and exclude it from quantization; leave one of them out"
                )
        once([entry["name"] for entry in data["activation_encodings"]], self.name)
        inputs = {entry["name"]: _width(entry, self.name) for entry in data["activation_encodings"]}
        read = self._read(inputs, subject) if inputs else {}
        return {path: Bits(weights.get(path, 32), read.get(path, 32)) for path in dict.fromkeys([*weights, *read])}

    def _read(self, inputs: Mapping[str, int], subject: Subject) -> dict[str, int]:
        """Return the width of each layer's input; every encoding must be of a tensor that a layer reads."""
        layers = [Layer(path, site, FLOAT) for site in subject.sites for path in site.layers if "#" not in path]
        found = places(self.graph, layers, self.name)
        unknown = sorted(inputs.keys() - tensors(self.graph, self.name))
        if unknown:
            raise PolicyError(
                f"policy: the encodings name the activation '{unknown[0]}', which is no tensor of the graph; give its own graph"
            )
        unread = sorted(inputs.keys() - {tensor for place in found.values() for tensor in place.inputs})
        if unread:
            named = ", ".join(map(repr, unread[:5])) + (", …" if len(unread) > 5 else "")
            raise PolicyError(
                f"policy: the encodings quantize {named}, which no layer of a site reads; a policy has widths of sites' inputs: remove them"
            )
        return {
            path: one_width(path, [inputs.get(tensor, 32) for tensor in place.inputs], self.name)
            for path, place in found.items()
            if place.inputs
        }


def _weights(entries: Sequence[Mapping[str, Any]], of: str) -> dict[str, int]:
    """Return the width of each layer's weight; a bias may only have the 32 bits that change nothing."""
    once([entry["name"] for entry in entries], of)
    for entry in entries:
        if entry["name"].endswith(".bias") and entry["bw"] != _BIAS:
            raise PolicyError(
                f"policy: the encodings give {entry['name']!r} {entry['bw']!r} bits, and a policy leaves biases as they are; remove it"
            )
    return {_path(entry["name"]): _width(entry, of) for entry in entries if not entry["name"].endswith(".bias")}


def _weight(layer: Layer, shell: QuantLayer) -> dict[str, Any]:
    assert shell.weight_quantizer is not None
    encoded = shell.weight_quantizer.encode(shell.weight)
    if encoded.origin != int(encoded.origin):
        raise PolicyError(f"policy: aimet cannot say site '{layer.site.name}' (its grid has no integer zero point); quantize with 'lsq'")
    scales = encoded.scale.flatten().tolist()
    kind = "PER_CHANNEL" if len(scales) > 1 else "PER_TENSOR"
    return _encoding(f"{layer.path}.weight", encoded.bits, scales, int(encoded.origin), kind, symmetric=True)


def _input(tensor: str, width: int, path: str, shell: QuantLayer) -> dict[str, Any]:
    quantizer = shell.input_quantizer
    if quantizer is None:
        raise PolicyError(f"policy: the network does not quantize the input of '{path}'; give the network of this policy")
    with torch.no_grad():
        step = float(quantizer.step())
    return _encoding(tensor, width, [step], quantizer.codes[0], "PER_TENSOR", symmetric=quantizer.codes[0] < 0)


def _encoding(name: str, width: int, scales: list[float], offset: int, kind: str, *, symmetric: bool) -> dict[str, Any]:
    offsets = [offset] * len(scales)
    return {"name": name, "dtype": "INT", "enc_type": kind, "bw": width, "is_sym": symmetric, "scale": scales, "offset": offsets}


def _path(name: str) -> str:
    if not name.endswith(".weight"):
        raise PolicyError(f"policy: the encodings name the parameter {name!r}, which is no layer's weight")
    return name.removesuffix(".weight")


def _width(entry: Mapping[str, Any], of: str) -> int:
    name = entry["name"]
    if entry["dtype"] != "INT":
        raise PolicyError(f"policy: the encodings have {entry['dtype']!r} numbers for {name!r}, and a policy has integers")
    if entry.get("enc_type", _TYPES[0]) not in _TYPES:
        raise PolicyError(f"policy: the encodings have {entry['enc_type']!r} scales for {name!r}; a policy cannot say them, only {_TYPES}")
    only(entry, _ENTRY, f"the encoding of {name!r}", of)
    return integers(entry["bw"], name, of)
