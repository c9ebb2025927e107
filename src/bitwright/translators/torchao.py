"""torchao: ``FqnToConfig`` as JSON, what ``torchao.core.config.config_from_dict`` reads and ``quantize_`` takes.

Linear layers only. Weights of 1 to 8 bits, one scale an output channel; inputs left as they are, or in 8 bits with scales that torchao
chooses per token at run time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.translators import FLOAT, Layer, Subject, Translator, exact_name, integer_widths

_FIXED = {"Int8WeightOnlyConfig": Bits(8, 32), "Int4WeightOnlyConfig": Bits(4, 32), "Int8DynamicActivationInt8WeightConfig": Bits(8, 8)}
"""Configurations of one meaning each, which are read but not written."""
_DTYPES = {f"int{w}": w for w in range(1, 9)}


@dataclass(frozen=True)
class Torchao(Translator):
    """``FqnToConfig``."""

    name: ClassVar[str] = "torchao"
    calls: ClassVar[bool] = True

    def unsaid(self, layer: Layer) -> str | None:
        """Return why torchao cannot say a layer's bits."""
        if layer.bits == FLOAT:
            return None
        if layer.site.kind != "linear":
            return f"torchao quantizes linear layers, and this is a {layer.site.kind}"
        return integer_widths(layer.bits, range(1, 9), (8, 32))

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return ``FqnToConfig`` as torchao's own JSON."""
        entries = {layer.path: _config(layer.bits) for layer in layers if "#" not in layer.path}
        return json.dumps({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": entries}}, indent=1)

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = json.loads(text)
        if data["_type"] not in {"FqnToConfig", "ModuleFqnToConfig"}:
            raise PolicyError(f"policy: the file holds a {data['_type']!r}, expected a FqnToConfig of torchao")
        entries = data["_data"].get("fqn_to_config") or data["_data"].get("module_fqn_to_config") or {}
        return {exact_name(path, self.name, _wild): _bits(path, entry) for path, entry in entries.items()}


def _wild(name: str) -> bool:
    return name == "_default" or name.startswith("re:")


def _config(bits: Bits) -> dict[str, Any] | None:
    if bits == FLOAT:
        return None
    dtype = {"_type": "torch.dtype", "_data": f"int{bits.w}"}
    axis = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    if bits.a == 32:
        return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {"weight_dtype": dtype, "granularity": axis}}
    data = {"weight_dtype": dtype, "weight_granularity": axis}
    return {"_type": "Int8DynamicActivationIntxWeightConfig", "_version": 2, "_data": data}


def _bits(path: str, entry: Any) -> Bits:
    if entry is None:
        return FLOAT
    kind = entry["_type"]
    if kind in _FIXED:
        return _FIXED[kind]
    if kind not in {"IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"}:
        raise PolicyError(f"policy: torchao's {kind!r} of '{path}' has no integer widths that a policy knows")
    return Bits(_DTYPES[entry["_data"].get("weight_dtype", {"_data": "int8"})["_data"]], 32 if kind == "IntxWeightOnlyConfig" else 8)
