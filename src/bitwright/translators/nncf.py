"""NNCF: which call to make and what it must ignore, by exact node names.

NNCF 3 has no widths by layer: ``nncf.quantize`` quantizes weights and inputs in 8 bits, ``nncf.compress_weights`` weights alone in 8 or 4,
each of everything but an ignored scope. So a policy of one pair of widths beside float layers can be said, and no other. The file is
``{"call": …, "arguments": {…, "ignored_scope": {"names": […], "validate": true}}}``; a layer's node is its path with slashes, its function,
and the number of the call (``layer1/0/conv1/conv2d/0``). NNCF names by the modules that are called, so a layer in a `nn.ModuleList` or
`nn.ModuleDict` has no node name of its own: such a layer cannot be left out (NNCF refuses the file; here, too, where a network is given).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.sites import Site
from bitwright.translators import FLOAT, Layer, Subject, Translator
from bitwright.translators._reading import loaded, only

_CALLS: Mapping[Bits, tuple[str, dict[str, Any]]] = {
    Bits(8, 8): ("quantize", {}),
    Bits(8, 32): ("compress_weights", {"mode": "int8_sym"}),
    Bits(4, 32): ("compress_weights", {"mode": "int4_sym", "ratio": 1.0, "group_size": -1, "all_layers": True}),
}
"""What NNCF is asked for each pair of widths."""


@dataclass(frozen=True)
class Nncf(Translator):
    """An ignored scope, and the call that it belongs to."""

    name: ClassVar[str] = "nncf"
    calls: ClassVar[bool] = True

    def unsaid(self, layer: Layer) -> str | None:
        """Return why NNCF cannot say a layer's bits."""
        if layer.bits == FLOAT:
            return None
        if layer.bits not in _CALLS:
            return f"NNCF has {', '.join(map(repr, _CALLS))} and float only"
        if layer.site.kind != "linear" and (layer.bits.w == 4 or not layer.convolution):
            return f"NNCF has no {layer.bits!r} for a {layer.site.kind}"
        return None

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the call and its arguments."""
        used: dict[Bits, list[str]] = {}
        for layer in layers:
            used.setdefault(layer.bits, []).append(layer.site.name)
        kept = sorted((bits for bits in used if bits != FLOAT), key=lambda bits: -len(used[bits]))
        if len(kept) > 1:
            others = ", ".join(f"'{name}' at {bits!r}" for bits in kept[1:] for name in dict.fromkeys(used[bits]))
            raise PolicyError(f"policy: nncf cannot say {kept[0]!r} and another pair at once: {others}; NNCF knows one pair beside float")
        if not kept:
            raise PolicyError("policy: nncf has nothing to do where every site is float; give some site W8A8, W8A32 or W4A32")
        call, arguments = _CALLS[kept[0]]
        if subject.skipped:
            raise PolicyError(f"policy: nncf cannot be told to leave the skipped layer '{subject.skipped[0]}' alone; make it a site")
        calls = [layer for layer in layers if layer.bits == FLOAT and "#" in layer.path]
        also = [layer.path for layer in calls if call == "quantize" or layer.site.weights]  # compress_weights has no weights of a product
        if also:
            asked = f"nncf.{call} also quantizes '{also[0]}', a functional call without a name, which cannot be left out"
            raise PolicyError(f"policy: {asked}; take another format")
        _check_named([layer for layer in layers if layer.bits == FLOAT and "#" not in layer.path], subject)
        names = [node for layer in layers if layer.bits == FLOAT and "#" not in layer.path for node in _nodes(layer.path, layer.site)]
        return json.dumps({"call": call, "arguments": {**arguments, "ignored_scope": {"names": names, "validate": True}}}, indent=1)

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path."""
        data = loaded(text, self.name)
        arguments = dict(data["arguments"])
        scope = arguments.pop("ignored_scope")
        only(data, ("call", "arguments"), "the file", self.name)
        if set(scope) - {"names", "validate"}:
            raise PolicyError("policy: the file of nncf ignores by patterns or types; a policy names layers one by one")
        pairs = [bits for bits, known in _CALLS.items() if known == (data["call"], arguments)]
        if not pairs:
            raise PolicyError(f"policy: the file of nncf asks for {data['call']}({arguments}), which gives no width that a policy knows")
        ignored, found = set(scope["names"]), dict[str, Bits]()
        for site in subject.sites:
            for path in (layer for layer in site.layers if "#" not in layer):
                nodes = set(_nodes(path, site))
                found[path] = FLOAT if nodes <= ignored else pairs[0]
                ignored -= nodes
        if ignored:
            raise PolicyError(f"policy: the file of nncf ignores '{min(ignored)}', which is no layer of a site")
        return found


def _check_named(ignored: Sequence[Layer], subject: Subject) -> None:
    for layer in ignored if subject.network is not None else ():
        above = layer.path.split(".")[:-1]
        for depth in range(1, len(above) + 1):
            container = ".".join(above[:depth])
            if isinstance(subject.network.get_submodule(container), (nn.ModuleList, nn.ModuleDict)):  # type: ignore[union-attr]
                raise PolicyError(f"policy: nncf has no name for '{layer.path}', which is in the list '{container}'; quantize it as well")


def _nodes(path: str, site: Site) -> list[str]:
    calls = site.calls // len(site.layers)
    return [f"{path.replace('.', '/')}/{site.kind}/{k}" for k in range(max(1, calls))]
