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
from bitwright.translators._reading import loaded, only

_FIXED = {"Int8WeightOnlyConfig": Bits(8, 32), "Int8DynamicActivationInt8WeightConfig": Bits(8, 8)}
"""Configurations of one meaning each, which are read but not written."""
_GRANULARITY = {"IntxWeightOnlyConfig": "granularity", "Int8DynamicActivationIntxWeightConfig": "weight_granularity"}
"""Configurations of any width of weights, and what says how many of them share a scale."""
_GROUPS = {"Int8DynamicActivationIntxWeightConfig": "PerGroup"}
"""What torchao takes where a configuration does not say its granularity, if it is no whole channel."""
_WHOLE = {"PerAxis", "PerRow", "PerTensor"}
_HOW = (
    *("weight_dtype", "granularity", "weight_granularity", "mapping_type", "act_mapping_type", "weight_mapping_type", "scale_dtype"),
    *("weight_scale_dtype", "intx_packing_format", "intx_choose_qparams_algorithm", "set_inductor_config", "version"),
)
"""What a configuration may say beside widths without changing them."""
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
        data = loaded(text, self.name)
        if data["_type"] not in {"FqnToConfig", "ModuleFqnToConfig"}:
            raise PolicyError(f"policy: the file holds a {data['_type']!r}, expected a FqnToConfig of torchao")
        new, old = (data["_data"].get(key) or {} for key in ("fqn_to_config", "module_fqn_to_config"))
        only(data["_data"], ("fqn_to_config", "module_fqn_to_config"), data["_type"], self.name)
        if new and old and new != old:
            odd = min(key for key in {*new, *old} if key not in new or key not in old or new[key] != old[key])
            raise PolicyError(f"policy: the file's fqn_to_config and module_fqn_to_config differ at {odd!r}; keep one of them")
        entries = new or old
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
    kind, said = entry["_type"], entry["_data"]
    if kind not in _FIXED and kind not in _GRANULARITY:
        groups = " (it has scales for groups of weights)" if kind == "Int4WeightOnlyConfig" else ""
        raise PolicyError(f"policy: torchao's {kind!r} of '{path}' has no integer widths that a policy knows{groups}")
    _check_whole(path, kind, said)
    only(said, _HOW, f"{kind} of '{path}'", "torchao")
    if kind in _FIXED:
        return _FIXED[kind]
    dtype = said.get("weight_dtype", {"_data": "int8"})["_data"]
    if dtype not in _DTYPES:
        raise PolicyError(f"policy: torchao's weights of '{path}' are {dtype!r}, which a policy cannot say; it has {', '.join(_DTYPES)}")
    return Bits(_DTYPES[dtype], 32 if kind == "IntxWeightOnlyConfig" else 8)


def _check_whole(path: str, kind: str, said: Mapping[str, Any]) -> None:
    """Raise `PolicyError` unless scales are of whole tensors, channels or tokens."""
    given = said.get(_GRANULARITY.get(kind, "granularity"))
    found = [_GROUPS.get(kind, "PerAxis")] if given is None else [one["_type"] for one in (given if isinstance(given, list) else [given])]
    for name in found:
        if name not in _WHOLE:
            unsaid = "" if given is not None else ", which it has by default"
            raise PolicyError(f"policy: torchao's {kind!r} of '{path}' has the granularity {name!r}{unsaid}; a policy cannot say groups")
