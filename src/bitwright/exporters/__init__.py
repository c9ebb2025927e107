"""Exporters: one file per format, and this folder is the registry. Each writes an artefact and checks what it wrote."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError, nearest
from bitwright.policy import Policy

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
Reference = tuple[str, Mapping[str, Any]]
"""How the float architecture is made: a name for `bitwright.models.build`, and its arguments."""


@dataclass(frozen=True)
class Source:
    """What is exported: a quantized network on the CPU in eval mode, an input for it, its policy and its architecture."""

    model: nn.Module
    example: Example
    policy: Policy | None
    reference: Reference | None


@dataclass(frozen=True)
class Artefact:
    """A file that was read back and gave the network's own outputs, bit for bit unless ``largest_difference`` says more.

    ``parts`` are the bytes of what is in it; ``levels`` the distinct weight values in a scale group of each quantized
    layer, counted from what was read back.
    """

    path: Path
    to: str
    size: int
    parts: Mapping[str, int]
    levels: Mapping[str, int]
    largest_difference: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return JSON-able values; the path as its last part."""
        return {
            "file": self.path.name,
            "to": self.to,
            "bytes": self.size,
            "parts": dict(self.parts),
            "levels": dict(self.levels),
            "largest_difference": self.largest_difference,
        }


@dataclass(frozen=True)
class Check:
    """What reading an artefact back showed; see `Artefact`."""

    levels: Mapping[str, int]
    largest_difference: float = 0.0


class Exporter(ABC):
    """One format. Subclasses are frozen dataclasses of options, one in a file whose name is the format's."""

    @abstractmethod
    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write the file and return the bytes of its parts; raises `ExportError` for what the format cannot say."""

    @abstractmethod
    def check(self, source: Source, path: Path) -> Check:
        """Read the file back and raise `ExportError` unless it reproduces ``source.model`` on ``source.example``."""


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
    exporter, path = kind(**options), Path(path)
    source = Source(_plain_copy(model), _on_cpu(example), policy, reference)
    partial = path.with_name(f".{path.name}.unchecked")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = exporter.write(source, partial)
        found = exporter.check(source, partial)
        partial.replace(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error}); free space or give another path") from error
    finally:
        partial.unlink(missing_ok=True)
    return Artefact(path, to, path.stat().st_size, parts, found.levels, found.largest_difference)


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
