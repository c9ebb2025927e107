"""Exporters: one file per format, and this folder is the registry. Each writes an artefact and checks what it wrote."""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError, nearest
from bitwright.policy import Bits, Policy
from bitwright.runs import write_text_atomic
from bitwright.typed import typed

BANK = "bank.json"
"""What an adaptive run exports, with its weights beside it: no format of one network, but `verify` and `bitwright.load` know it."""
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
Reference = tuple[str, Mapping[str, Any]]
"""How the float architecture is made: a name for `bitwright.models.build`, and its arguments."""


@dataclass(frozen=True)
class Source:
    """What is exported: a quantized network on the CPU in eval mode, an input for it, its policy and its architecture.

    ``memo`` is where `Exporter.write` may leave for `Exporter.check` what takes long to make twice.
    """

    model: nn.Module
    example: Example
    policy: Policy | None
    reference: Reference | None
    memo: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Artefact:
    """A file that was read back and gave the network's own outputs, bit for bit unless ``largest_difference`` says more.

    ``parts`` are the bytes of what is in it; ``levels`` the distinct weight values in a scale group of each quantized
    layer, counted from what was read back; ``parity`` what the comparison found, which is also in ``<file>.parity.json``.
    """

    path: Path
    to: str
    size: int
    parts: Mapping[str, int]
    levels: Mapping[str, int]
    largest_difference: float = 0.0
    parity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def float_fallbacks(self) -> dict[str, str]:
        """Layers of 8 bits or fewer that the runtime does not run in integers, or is not seen to, with what it runs for them."""
        return dict(self.parity.get("float_fallbacks", {}))

    def to_dict(self) -> dict[str, object]:
        """Return JSON-able values; the path as its last part."""
        return {
            "file": self.path.name,
            "to": self.to,
            "bytes": self.size,
            "parts": dict(self.parts),
            "levels": dict(self.levels),
            "largest_difference": self.largest_difference,
            "float_fallbacks": self.float_fallbacks,
        }


@dataclass(frozen=True)
class Check:
    """What reading an artefact back showed; see `Artefact`."""

    levels: Mapping[str, int]
    largest_difference: float = 0.0
    parity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorCheck:
    """A tensor of an artefact: how it is stored, and its distinct values (in a scale group) beside what its width allows."""

    name: str
    kind: str
    bits: int
    stored: str
    levels: int | None
    allowed: int | None


@dataclass(frozen=True)
class Verification:
    """What an artefact showed from the outside.

    Attributes:
        path: the file.
        to: its format.
        policy: the policy in it.
        tensors: what was counted.
        samples: inputs that it was run on; 0 where nothing here can run it.
        answer: how far its output on them is from the one that was kept, as a share of the largest; None where none was kept.
        allowed: how far it may be.
    """

    path: Path
    to: str
    policy: Policy
    tensors: tuple[TensorCheck, ...]
    samples: int
    answer: float | None = None
    allowed: float = 0.0

    @property
    def levels(self) -> dict[str, int]:
        """The distinct weights of each layer."""
        return {row.name: row.levels for row in self.tensors if row.kind == "weight" and row.levels is not None}

    def checked(self) -> Verification:
        """Return the same; raises `ExportError` if a tensor has more levels than its width, or the answer is another."""
        for row in self.tensors:
            if row.levels is not None and row.allowed is not None and row.levels > row.allowed:
                found = f"the {row.kind} '{row.name}' has {row.levels} distinct values and {row.bits} bits allow {row.allowed}"
                raise ExportError(f"{self.path.name}: does not keep its policy: {found}; export it again")
        if self.answer is not None and not self.answer <= self.allowed:
            found = f"differs by {100 * self.answer:.3g} % of the largest output from the network's own answer in it"
            raise ExportError(f"{self.path.name}: its output on the sample {found} ({100 * self.allowed:.3g} % allowed); export it again")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        tensors = [vars(row) for row in self.tensors]
        policy = {site: list(bits) for site, bits in self.policy.items()}
        facts = {"file": str(self.path), "to": self.to, "policy": policy, "tensors": tensors}
        return {**facts, "samples": self.samples, "answer_difference": self.answer}


class Exporter(ABC):
    """One format. Subclasses are frozen dataclasses of options, one in a file whose name is the format's.

    ``suffixes`` are the endings of its files; the first is what `export` gives a file that is not named. ``companions`` are endings
    of further files that belong to one: `write` makes them by adding the ending to the name of the first.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    companions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write the file and return the bytes of its parts; raises `ExportError` for what the format cannot say."""

    @abstractmethod
    def check(self, source: Source, path: Path) -> Check:
        """Read the file back and raise `ExportError` unless it reproduces ``source.model`` on ``source.example``."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether a file is of this format; by default by its ending."""
        return path.suffix in cls.suffixes

    @classmethod
    def verify(cls, path: Path, model: nn.Module | None = None) -> Verification:
        """Read a file, compare it with the policy in it, and run it; raises `ExportError` with the reason for a damaged one.

        Args:
            path: the artefact.
            model: the float network, for formats that hold weights only and name no architecture that can be built.
        """
        raise ExportError(f"verify: files of {cls.__module__.rpartition('.')[2]} cannot be verified yet")


def available() -> tuple[str, ...]:
    """Return the names of the formats.

    >>> "packed" in available()
    True
    """
    return tuple(sorted(item.name for item in pkgutil.iter_modules(__path__) if not item.name.startswith("_")))


def get(name: str) -> type[Exporter]:
    """Return the exporter of a format; raises `ExportError` for an unknown name."""
    if name not in available():
        raise ExportError(f"export: no format '{name}'; {nearest(name, available())}")
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Exporter) and value.__module__ == module.__name__:
            return value
    raise ExportError(f"export: {module.__name__} defines no Exporter")


def verify(path: str | Path, *, to: str | None = None, model: nn.Module | None = None) -> Verification:
    """Verify an artefact of any format: read it, count the levels of its tensors, compare with the policy, run it on samples.

    Raises:
        ExportError: it is damaged, tampered with, or does not keep its policy; the message says which.
    """
    path = Path(path)
    if to is None and (is_bank(path) or is_bank(path.with_suffix(".json"))):
        from bitwright.adaptive.verifying import verify_bank  # noqa: PLC0415  (only where it is used)

        return verify_bank(path, model)
    if path.is_dir():
        raise ExportError(f"{path}: a folder; {_artefacts(path)}")
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give an artefact that `bitwright export` wrote")
    known = available() if to is None else (to,)
    try:
        for name in known:
            if to is not None or get(name).recognises(path):
                return get(name).verify(path, model)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise ExportError(f"{path}: of no format that bitwright writes ({', '.join(known)}), or cut off; name its format with --to")


def _artefacts(folder: Path) -> str:
    """Return the hint which files in a folder, or in the export folder of a run, may be meant."""
    endings = {ending for name in available() for ending in get(name).suffixes}
    files = sorted(file for place in (folder, folder / "export") for file in place.glob("*") if file.suffix in endings)
    run = (folder / "manifest.json").is_file()  # whose own model.safetensors is no artefact
    named = [str(file) for file in files if not (run and file.parent == folder)]
    return f"give the file: {' or '.join(named[:4])}" if named else "give the file that `bitwright export` wrote"


def is_bank(path: Path) -> bool:
    """Return whether a path is a bank's own file, or the folder that has it."""
    return path.name == BANK or (path / BANK).is_file()


def export(
    model: nn.Module,
    to: str,
    path: str | Path,
    *,
    example: Example,
    policy: Policy | None = None,
    reference: Reference | None = None,
    **options: object,
) -> Artefact:
    """Write a quantized network to a file, read it back, and compare; nothing stays unless it reproduces the network.

    Args:
        model: what `quantize` returned, fine-tuned or not; it is left untouched.
        to: the format, one of `available`.
        path: the file; its folder is made.
        example: an input (a tensor, a tuple of positional ones, or a dict of keyword ones), on which outputs are compared
            in eval mode, float32, on the CPU.
        policy: bits by site; by default the bits of each quantized layer by its path.
        reference: (name, arguments) of the float architecture, kept in the file.
        options: fields of the exporter.

    Raises:
        ExportError: an unknown format or option, something the format cannot say, or a difference.
    """
    kind = get(to)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise ExportError(f"export: no option '{key}' for {to}; {nearest(key, known)}")
    hints = get_type_hints(kind, include_extras=True)
    exporter, path = kind(**{key: _typed(hints[key], key, value) for key, value in options.items()}), Path(path)
    if kind.companions and path.suffix not in kind.suffixes:  # their names are made from it
        raise ExportError(f"{path}: a file of {to} ends in {' or '.join(kind.suffixes)}; name it {path.with_suffix(kind.suffixes[0]).name}")
    source = Source(_plain_copy(model), _on_cpu(example), policy, reference)
    partial = path.with_name(f".{path.name}.unchecked")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = exporter.write(source, partial)
        found = exporter.check(source, partial)
        for ending in kind.companions:
            partial.with_name(partial.name + ending).replace(path.with_suffix(ending))
        partial.replace(path)
        _write_parity(path, to, found)
    except ExportError as error:
        raise ExportError(_of_asked(str(error), partial, path)) from error
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error}); free space or give another path") from error
    finally:
        for name in (partial.name, *(partial.name + ending for ending in kind.companions)):
            partial.with_name(name).unlink(missing_ok=True)
    size = path.stat().st_size + sum(path.with_suffix(ending).stat().st_size for ending in kind.companions)
    return Artefact(path, to, size, parts, found.levels, found.largest_difference, found.parity)


def _of_asked(message: str, partial: Path, path: Path) -> str:
    """Return what a check says of a file that is not in its place yet, about the file that was asked for.

    >>> _of_asked(".a.onnx.unchecked: truncated; export it again", Path(".a.onnx.unchecked"), Path("a.onnx"))
    'a.onnx: truncated; nothing was written'
    """
    found = message.replace(partial.name, path.name)
    again = "; export it again"
    return found if found == message or not found.endswith(again) else f"{found.removesuffix(again)}; nothing was written"


def _typed(hint: Any, key: str, value: object) -> Any:
    try:
        return typed(hint, value)
    except ValueError as error:
        raise ExportError(f"export: option {key}={value!r}: {error}") from None


def policy_gap(policy: Mapping[str, Bits], layers: Mapping[str, Bits]) -> str | None:
    """Return where layers do not run at what a policy says of their sites, or a quantized site is no layer; None where all agrees.

    Args:
        policy: bits by site; a site is named as its first layer.
        layers: bits by layer, functional calls by their addresses.

    >>> policy_gap({"fc": Bits(2, 8)}, {"fc": Bits(2, 8)}), policy_gap({"fc": Bits(2, 8)}, {"fc": Bits(4, 8)})
    (None, "the policy says W2A8 for 'fc', which runs at W4A8")
    """
    for site, bits in policy.items():
        if site in layers and layers[site] != bits:
            return f"the policy says {bits!r} for '{site}', which runs at {layers[site]!r}"
        calls = [layer for layer in layers if "#" in layer and layer.partition("#")[0] == site.rpartition(".")[0]]  # of its parameter
        if site not in layers and min(bits) <= 8 and not any(layers[call] == bits for call in calls):
            return f"the policy says {bits!r} for '{site}', which is no quantized layer; {nearest(site, list(layers))}"
    given = set(policy.values())
    return next(
        (f"'{layer}' runs at {bits!r}, which the policy says of no site" for layer, bits in layers.items() if bits not in given), None
    )


def check_policy(policy: Mapping[str, Bits], layers: Mapping[str, Bits]) -> None:
    """Raise `ExportError` where `policy_gap` finds one before a file is written."""
    found = policy_gap(policy, layers)
    if found is not None:
        raise ExportError(f"export: {found}; pass the policy it was quantized with")


def spelled_fallbacks(fallbacks: Mapping[str, str]) -> str:
    """Return layers that do not run in integers, for people.

    >>> spelled_fallbacks({"conv3": "float32: FusedConv", "fc": "unknown"})
    "'conv3' (float32: FusedConv), 'fc' (unknown)"
    """
    return ", ".join(f"'{name}' ({kind})" for name, kind in fallbacks.items())


def _write_parity(path: Path, to: str, found: Check) -> None:
    """Write what the comparison found beside the file; nothing where all is equal by construction."""
    if not found.parity:
        return
    facts = {"file": path.name, "to": to, "largest_difference": found.largest_difference, "levels": dict(found.levels), **found.parity}
    write_text_atomic(path.with_name(f"{path.name}.parity.json"), json.dumps(facts, indent=1) + "\n")


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU in eval mode, with contiguous parameters: another memory order may round otherwise."""
    plain = copy.deepcopy(model).cpu().eval()
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
        parameter.grad = None
    return plain


def _on_cpu(example: Example) -> Example:
    if isinstance(example, Tensor):
        return example.detach().cpu()
    if isinstance(example, Mapping):
        return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in example.items()}
    return tuple(value.detach().cpu() if isinstance(value, Tensor) else value for value in example)


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Run a network on an example without gradients and return the tensors it gives."""
    with torch.no_grad():
        named: Mapping[str, Any] = example if isinstance(example, Mapping) else {}
        placed = () if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
        out = model(*placed, **named)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def compare_outputs(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, 0 where all is equal bit for bit; raises `ExportError` for other shapes or nan."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"export: the file gives outputs of shapes {shapes[1]}, the network {shapes[0]}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in wanted):
        raise ExportError("export: the network's own outputs on the example are nan or infinite; restore an earlier checkpoint")
    return max((float((a.double() - b.double()).abs().max()) for a, b in zip(wanted, found, strict=True) if a.numel()), default=0.0)
