"""What a packed file says about its layers: records, layout and policy, and which tensors of a model they account for."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright.errors import ExportError, PolicyError
from bitwright.exporters import Reference
from bitwright.exporters._container import BY_NAME, squeeze, unsqueeze
from bitwright.exporters._sample import Sample
from bitwright.policy import WIDTHS, Bits, Policy
from bitwright.quant.functional import SIGNED_MIN, SIGNED_MIN_NARROW

FORMAT = "bitwright-packed-1"
MODEL_ROOM = 160  # characters kept for the model reference, so that a size is known before there is one
SAMPLE_ROOM = 256  # likewise for the sample with its answer
BatchNormMode = Literal["as-trained", "eval-vectors"]
VECTORS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Record:
    """How one layer is written, in six characters.

    ``w`` and ``a``: places in `WIDTHS`; ``scheme`` of the weights: l(sq), e(ntropy), d(orefa) or -; ``grid``: i(nteger),
    n(arrow integer), h(alf-integer) or -; ``scale``: c(hannel), t(ensor) or -; ``input``: s(igned) or u(nsigned) LSQ,
    p(act), d(orefa) or -.

    >>> str(Record(Bits(2, 8), "l", "i", "c", "u")), Record.parse("17licu").bits
    ('17licu', W2A8)
    """

    bits: Bits
    scheme: str = "-"
    grid: str = "-"
    scale: str = "-"
    input: str = "-"

    def __str__(self) -> str:
        return f"{_digits(self.bits)}{self.scheme}{self.grid}{self.scale}{self.input}"

    @classmethod
    def parse(cls, text: str) -> Record:
        """Read the six characters; raises `ValueError` if they are none."""
        if len(text) != 6:
            raise ValueError(f"no layer is written as '{text}'")
        record = cls(_bits(text[:2]), *text[2:])
        quantized = {record.scheme in "led", record.grid in "inh", record.scale in "ct", record.bits.w <= 8}
        if len(quantized) > 1 or record.input not in "-supd" or (record.input == "-") != (record.bits.a >= 16):
            raise ValueError(f"no layer is written as '{text}'")
        return record

    @property
    def origin(self) -> float:
        """The lowest level in steps."""
        return origin(self.grid, self.bits.w)


def origin(grid: str, width: int) -> float:
    """Return the lowest level of a grid, in steps.

    >>> [origin(grid, 3) for grid in "inh"]
    [-4.0, -3.0, -3.5]
    """
    tables = {"i": SIGNED_MIN, "n": SIGNED_MIN_NARROW}
    return float(tables[grid][width]) if grid in tables else -(2**width - 1) / 2


def _digits(bits: Bits) -> str:
    return f"{WIDTHS.index(bits.w)}{WIDTHS.index(bits.a)}"


def _bits(text: str) -> Bits:
    return Bits(WIDTHS[int(text[0])], WIDTHS[int(text[1])])


@dataclass(frozen=True)
class Slot:
    """One layer's place in the layout; ``same`` is the place of an earlier one that it shares its weight with."""

    name: str
    shape: tuple[int, ...]
    same: int | None = None


@dataclass(frozen=True)
class Kept:
    """One tensor that is written as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Kept:
        """Return the entry of a tensor."""
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """All that the metadata of a packed file say."""

    slots: tuple[Slot, ...]
    records: tuple[Record, ...]
    kept: tuple[Kept, ...]
    policy: Policy
    vectors: tuple[str, ...]
    reference: Reference | None
    sample: Sample | None = None

    def to_metadata(self) -> dict[str, str]:
        """Return the strings that go into the header; their lengths are the same at every policy."""
        place = {slot.name: i for i, slot in enumerate(self.slots)}
        layout = {
            "layers": [[slot.name, slot.shape] if slot.same is None else [slot.name, slot.shape, slot.same] for slot in self.slots],
            "rest": [[k.name, k.shape] if k.dtype == torch.float32 else [k.name, k.shape, _name(k.dtype)] for k in self.kept],
            "sites": [place.get(name, name) for name in self.policy],  # most sites are named as their layer
            "vectors": self.vectors,
        }
        model = "null" if self.reference is None else json.dumps([self.reference[0], dict(self.reference[1])], separators=(",", ":"))
        return {
            "format": FORMAT,
            "model": model.ljust(MODEL_ROOM),
            "layout": squeeze(layout),
            "bits": "".join(_digits(bits) for bits in self.policy.values()),
            "layers": "".join(map(str, self.records)),
            "sample": ("" if self.sample is None else str(self.sample)).ljust(SAMPLE_ROOM),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Content:
        """Read what `to_metadata` wrote; raises `ExportError` with the reason for anything else."""
        if metadata.get("format") != FORMAT:
            raise ExportError(f"its format is {metadata.get('format')!r}, expected '{FORMAT}'")
        try:
            layout, model = unsqueeze(metadata["layout"]), json.loads(metadata["model"])
            slots = tuple(Slot(str(name), _shape(shape), *map(int, same)) for name, shape, *same in layout["layers"])
            records = tuple(Record.parse(metadata["layers"][i : i + 6]) for i in range(0, len(metadata["layers"]), 6))
            kept = tuple(Kept(str(name), _shape(shape), BY_NAME[(dtype or ["float32"])[0]]) for name, shape, *dtype in layout["rest"])
            sites = [slots[site].name if isinstance(site, int) else str(site) for site in layout["sites"]]
            bits = [_bits(metadata["bits"][i : i + 2]) for i in range(0, len(metadata["bits"]), 2)]
            policy = Policy(zip(sites, bits, strict=True))
            vectors = tuple(str(name) for name in layout["vectors"])
            reference = None if model is None else (str(model[0]), dict(model[1]))
            sample = Sample.parse(metadata.get("sample", ""))
            if len(slots) != len(records) or any(slot.same is not None and not 0 <= slot.same < i for i, slot in enumerate(slots)):
                raise ValueError("its layers and their records do not match")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, PolicyError, RecursionError, zlib.error) as error:
            raise ExportError(f"damaged: its metadata do not parse ({type(error).__name__}: {str(error)[:80]})") from None
        return cls(slots, records, kept, policy, vectors, reference, sample)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{str(value)[:40]} is no shape")
    return tuple(value)


def vector_norms(model: nn.Module, mode: BatchNormMode) -> tuple[str, ...]:
    """Return the paths of the BatchNorms that are written as two vectors."""
    return tuple(name for name, module in model.named_modules() if mode == "eval-vectors" and is_vector_norm(module))


def is_vector_norm(module: nn.Module) -> bool:
    """Return whether evaluation of a module is two float32 vectors."""
    if not isinstance(module, BatchNorm) or module.running_mean is None or module.running_var is None:
        return False
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in (module.weight, module.running_mean, module.running_var))


def kept_tensors(model: nn.Module, layers: Sequence[str], vectors: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters and kept buffers that are written as they are, each once, by first name.

    These are all but the weights of ``layers`` with their quantizers, the tensors of the BatchNorms in ``vectors``, and the
    batch counters, which evaluation does not use. A tensor that a quantized weight is tied to is among them.
    """
    owned = tuple(f"{path}.{part}" for path in _aliases(model, layers) for part in ("weight_quantizer.", "input_quantizer."))
    replaced = {f"{path}.weight" for path in _aliases(model, layers)}
    replaced |= {f"{path}.{part}" for path in _aliases(model, vectors) for part in (*VECTORS, *STATISTICS)}
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ExportError(f"the state of the model has '{name}', a {type(tensor).__name__}; a packed file keeps tensors only")
        if name not in replaced and not name.startswith(owned) and not name.endswith("num_batches_tracked") and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def _aliases(model: nn.Module, paths: Sequence[str]) -> Iterator[str]:
    """Yield every path under which the modules at ``paths`` are registered."""
    wanted = {id(model.get_submodule(path)) for path in paths}
    return (name for name, module in model.named_modules(remove_duplicate=False) if id(module) in wanted)
