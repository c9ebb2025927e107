"""NVIDIA ModelOpt: a ``quant_cfg`` list for ``modelopt.torch.quantization.quantize``, one entry a quantizer.

Everything is switched off first, then each layer's weight and input quantizer is named. Names are globs there: what would be a wildcard in
a name is escaped.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.errors import PolicyError, nearest
from bitwright.policy import Bits
from bitwright.translators import FLOAT, Layer, Subject, Translator, exact_name, integer_widths
from bitwright.translators._reading import integers, loaded, only

_WIDTHS = (*range(1, 9), 32)
_PARTS = ("weight_quantizer", "input_quantizer")
_KEYS = ("quant_cfg", "algorithm")
_ENTRY = ("quantizer_name", "cfg", "enable")
_ATTRIBUTES = ("num_bits", "axis", "unsigned", "narrow_range", "fake_quant", "calibrator", "type")
ALGORITHMS = ("max", "mse", "smoothquant", "awq_lite", "awq_clip", "awq_full", "svdquant", "gptq", "local_hessian", "lsq")
"""How ModelOpt 0.47 calibrates integers, by its own names."""


@dataclass(frozen=True)
class ModelOpt(Translator):
    """``quant_cfg``; ``algorithm``: how ModelOpt calibrates, one of `ALGORITHMS`."""

    name: ClassVar[str] = "modelopt"
    calls: ClassVar[bool] = True

    algorithm: str = "max"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise PolicyError(f"policy: modelopt has no algorithm '{self.algorithm}'; {nearest(self.algorithm, ALGORITHMS)}")

    def unsaid(self, layer: Layer) -> str | None:
        """Return why ModelOpt cannot say a layer's bits."""
        if layer.bits == FLOAT:
            return None
        if layer.site.kind != "linear" and not layer.convolution:
            return f"ModelOpt has no quantizers for a {layer.site.kind}"
        return integer_widths(layer.bits, _WIDTHS, _WIDTHS)

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the configuration."""
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for layer in layers:
            axis = 1 if "transpose" in layer.site.kind else 0
            for part, width, kept in zip(_PARTS, layer.bits, (axis, None), strict=True):
                if width < 32:
                    name = f"{glob.escape(layer.path)}.{part}"
                    entries.append({"quantizer_name": name, "cfg": {"num_bits": width, "axis": kept}, "enable": True})
        return json.dumps({"quant_cfg": entries, "algorithm": self.algorithm}, indent=1)

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = loaded(text, self.name)
        entries = data["quant_cfg"]
        if not isinstance(entries, list) or entries[:1] != [{"quantizer_name": "*", "enable": False}]:
            raise PolicyError("policy: the file of modelopt does not begin by switching all quantizers off; what it leaves out is unknown")
        only(data, _KEYS, "the file", self.name)
        widths: dict[str, dict[str, int]] = {}
        for entry in entries[1:]:
            path, _, part = _unescaped(entry["quantizer_name"], self.name).rpartition(".")
            if part not in _PARTS:
                raise PolicyError(f"policy: the file of modelopt sets {path}.{part}, which a policy has no width for")
            only(entry, _ENTRY, f"the entry of {path}.{part}", self.name)
            widths.setdefault(path, {})[part] = _width(entry, f"{path}.{part}", self.name)
        return {path: Bits(own.get(_PARTS[0], 32), own.get(_PARTS[1], 32)) for path, own in widths.items()}


def _width(entry: Mapping[str, Any], where: str, of: str) -> int:
    if not entry.get("enable", True):
        return 32
    only(entry["cfg"], _ATTRIBUTES, where, of)
    return integers(entry["cfg"]["num_bits"], where, of)


def _unescaped(pattern: str, of: str) -> str:
    """Return the name that an escaped glob means; raises `PolicyError` for a pattern of several names."""
    name = re.sub(r"\[([*?\[])\]", r"\1", pattern)
    return exact_name(name, of, lambda name: glob.escape(name) != pattern)
