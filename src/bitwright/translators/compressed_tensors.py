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
from bitwright.translators._reading import integers, loaded, only

_WIDTHS = (*range(1, 9), 32)
_KEYS = ("quant_method", "format", "quantization_status", "config_groups", "ignore", "global_compression_ratio", "version")
_GROUP = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGUMENTS = ("num_bits", "type", "symmetric", "strategy", "dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_STRATEGIES = (None, "tensor", "channel", "token")
"""Scales of a whole tensor, its channels or tokens; a policy does not say which, and has no groups or blocks."""
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
        data = loaded(text, self.name)
        data = data.get("quantization_config", data)
        groups = data["config_groups"]
        if data.get("quant_method", self.name) != self.name:
            raise PolicyError(f"policy: the file is one of {data['quant_method']!r}, not of {self.name}; give one of {self.name}")
        only(data, _KEYS, "the file", self.name)
        found: dict[str, Bits] = {}
        for name, group in groups.items():
            bits = self._bits(name, group)
            for target in group["targets"]:
                path = exact_name(target, self.name, _wild)
                if found.setdefault(path, bits) != bits:
                    raise PolicyError(f"policy: the file of {self.name} gives '{path}' {found[path]!r} and {bits!r}; keep one")
        for name in data.get("ignore") or ():
            path = exact_name(name, self.name, _wild)
            if found.setdefault(path, FLOAT) != FLOAT:
                raise PolicyError(f"policy: the file of {self.name} gives '{path}' {found[path]!r} and ignores it; leave one of them out")
        return found

    def _bits(self, name: str, group: Mapping[str, Any]) -> Bits:
        if group.get("output_activations") is not None:
            raise PolicyError(f"policy: the file of {self.name} quantizes outputs, which a policy does not; remove them")
        only(group, _GROUP, f"the group '{name}'", self.name)
        return Bits(*(_width(group.get(part), f"the {part} of '{name}'", self.name) for part in ("weights", "input_activations")))


def _wild(name: str) -> bool:
    return name.startswith("re:") or name in _CLASSES


def _group(bits: Bits, paths: list[str]) -> dict[str, Any]:
    weights = {"num_bits": bits.w, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": bits.a, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    return {"targets": paths, "weights": weights if bits.w < 32 else None, "input_activations": inputs if bits.a < 32 else None}


def _width(entry: Any, where: str, of: str) -> int:
    if entry is None:
        return 32
    if entry.get("type", "int") != "int":
        raise PolicyError(f"policy: the file of {of} has {entry['type']!r} numbers, and a policy has integers")
    if entry.get("strategy") not in _STRATEGIES:
        raise PolicyError(
            f"policy: the file of {of} has scales by {entry['strategy']!r} in {where}, which a policy cannot say; remove them"
        )
    only(entry, _ARGUMENTS, where, of)
    return integers(entry["num_bits"], where, of)
