r"""llama.cpp: one ``name=type`` a line, what ``llama-quantize --tensor-type-file`` reads (or ``--tensor-type``, one by one).

llama-quantize takes names as regular expressions that may match anywhere, so each is escaped and anchored (``^blk\.0\.attn_q\.weight$``).
It has types of 2, 3, 4, 5, 6 and 8 bits (in blocks with scales of their own, so that a weight takes about half a bit more), 16 and 32;
it does not ask about activations. Its file of quantized weights is not read back into a policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bitwright.errors import PolicyError, nearest
from bitwright.translators import Layer, Subject, Translator

TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_0", 5: "q5_0", 6: "q6_k", 8: "q8_0", 16: "bf16", 32: "f32"}
"""Type by width of the codes."""
BLOCKS = {"q2_k": 256, "q3_k": 256, "q4_0": 32, "q5_0": 32, "q6_k": 256, "q8_0": 32}
"""Weights of a row that share a scale: llama-quantize takes another type, without a word to the policy, for rows that are no multiple."""
OWN = re.compile(r"blk\.\d+\.[a-z0-9_.]+|output|token_embd")


@dataclass(frozen=True)
class LlamaCpp(Translator):
    """Tensor types; ``architecture``: of the model, such as ``llama``, for names that are not llama.cpp's own (needs ``gguf``)."""

    name: ClassVar[str] = "llama.cpp"
    suffix: ClassVar[str] = ".txt"
    reads: ClassVar[bool] = False

    architecture: str = "llama"

    def unsaid(self, layer: Layer) -> str | None:
        """Return why llama-quantize cannot say a layer's bits."""
        if layer.site.kind != "linear":
            return f"llama.cpp has no types for a {layer.site.kind}"
        if layer.bits.a != 32:
            return "llama-quantize cannot be told widths of activations; leave them in float (32)"
        if layer.bits.w not in TYPES:
            return f"it has no type of {layer.bits.w} bits, only {', '.join(map(str, TYPES))}"
        block, row = BLOCKS.get(TYPES[layer.bits.w], 1), layer.site.weight_shape[-1]
        return None if row % block == 0 else f"{TYPES[layer.bits.w]} needs rows of a multiple of {block} weights, and these have {row}"

    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return a line a tensor."""
        named = [layer for layer in layers if "#" not in layer.path]
        names = {layer.path: f"{self._name(layer)}.weight" for layer in named}
        return "".join(f"^{re.escape(names[layer.path])}$={TYPES[layer.bits.w]}\n" for layer in named)

    def _name(self, layer: Layer) -> str:
        if OWN.fullmatch(layer.path):
            return layer.path
        try:
            import gguf  # noqa: PLC0415  (an extra)
        except ImportError:
            raise PolicyError(f"policy: '{layer.path}' is no name of llama.cpp; pip install 'bitwright[llm]', which knows them") from None
        known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise PolicyError(f"policy: llama.cpp has no architecture '{self.architecture}'; {nearest(self.architecture, known)}")
        blocks = 1 + max((int(part) for part in layer.path.split(".") if part.isdecimal()), default=0)
        name = gguf.get_tensor_name_map(known[self.architecture], blocks).get_name(layer.path)
        if name is None:
            raise PolicyError(
                f"policy: llama.cpp's '{self.architecture}' has no tensor for '{layer.path}'; give --option architecture=NAME"
            )
        return str(name)
