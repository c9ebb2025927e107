"""compressed-tensors: the ``quantization_config`` of a checkpoint, a group for each pair of widths, layers as exact targets.

It puts schemes on linear layers (and embeddings); a convolution that is named is passed over without a word, so that is refused here.
Weights are symmetric with a scale an output channel, inputs have a static scale for the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.translators import FLOAT, Layer, Subject, Translator, exact_name, integer_widths

_WIDTHS = (*range(1, 9), 32)
_CLASSES = {kind.__name__ for kind in nn.Linear.__mro__}


@dataclass(frozen=True)
class CompressedTensors(Translator):
    """``quantization_config`` with exact targets."""

    name: ClassVar[str] = "compressed-tensors"
    calls: ClassVar[bool] = True

    def unsaid(self, layer: Layer) -> str | None:
        """Return why compressed-tensors cannot say a layer's bits."""
        if layer.bits == FLOAT:
            return None
        if layer.site.kind != "linear":
            return f"it quantizes linear layers, and this is a {layer.site.kind}"
        if layer.path in _CLASSES or layer.path.startswith("re:"):
            return f"the name '{layer.path}' would match more than one layer"
        return integer_widths(layer.bits, _WIDTHS, _WIDTHS)

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the configuration."""
        groups: dict[Bits, list[str]] = {}
        for layer in layers:
            if layer.bits != FLOAT:
                groups.setdefault(layer.bits, []).append(layer.path)
        configuration = {
            "quant_method": "compressed-tensors",
            "format": "fakequant",
            "quantization_status": "initialized",
            "config_groups": {f"group_{i}": _group(bits, paths) for i, (bits, paths) in enumerate(groups.items())},
            "ignore": [layer.path for layer in layers if layer.bits == FLOAT and layer.site.kind == "linear" and "#" not in layer.path],
        }
        return json.dumps(configuration, indent=1)

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = json.loads(text)
        data = data.get("quantization_config", data)
        found: dict[str, Bits] = {}
        for group in data["config_groups"].values():
            bits = Bits(_width(group.get("weights")), _width(group.get("input_activations")))
            if group.get("output_activations") is not None:
                raise PolicyError("policy: the file of compressed-tensors quantizes outputs, which a policy does not; remove them")
            for target in group["targets"]:
                path = exact_name(target, self.name, lambda name: name.startswith("re:") or name in _CLASSES)
                if found.setdefault(path, bits) != bits:
                    raise PolicyError(f"policy: the file of compressed-tensors gives '{path}' {found[path]!r} and {bits!r}; keep one")
        for name in data.get("ignore") or ():
            found[exact_name(name, self.name, lambda name: name.startswith("re:") or name in _CLASSES)] = FLOAT
        return found


def _group(bits: Bits, paths: list[str]) -> dict[str, Any]:
    weights = {"num_bits": bits.w, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": bits.a, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    return {"targets": paths, "weights": weights if bits.w < 32 else None, "input_activations": inputs if bits.a < 32 else None}


def _width(entry: Any) -> int:
    if entry is None:
        return 32
    if entry.get("type", "int") != "int":
        raise PolicyError(f"policy: the file of compressed-tensors has {entry['type']!r} numbers, and a policy has integers")
    return int(entry["num_bits"])
