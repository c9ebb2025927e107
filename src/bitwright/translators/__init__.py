"""Translators: a policy in the words of another tool. One file per format; this folder is the registry.

Only exact layer names are written, no patterns. What a format cannot say (a width, a kind of layer, a functional call) is an error that
names the sites, before anything is written; and what is written is read back here and compared. Reading takes names of layers that are
sites, in files that say nothing else; layers that a file leaves out are float32, as they are for the tool.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from bitwright.errors import PolicyError, nearest
from bitwright.policy import Bits, Policy
from bitwright.sites import Site

FLOAT = Bits(32, 32)
LARGEST = 1 << 26
"""Characters of a file that are read at most."""


@dataclass(frozen=True)
class Layer:
    """One layer of a site: its module path, and the bits that a policy gives it."""

    path: str
    site: Site
    bits: Bits

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution, transposed or not."""
        return self.site.kind.startswith("conv")


@dataclass(frozen=True)
class Subject:
    """What a policy is about: the sites, for formats that hold scales the quantized network, and the layers that are no sites."""

    sites: tuple[Site, ...]
    network: nn.Module | None = None
    skipped: tuple[str, ...] = ()


class Translator(ABC):
    """One format. Subclasses are frozen dataclasses of options, one in a file named after the format (``-`` and ``.`` as ``_``)."""

    name: ClassVar[str]
    suffix: ClassVar[str] = ".json"
    reads: ClassVar[bool] = True
    calls: ClassVar[bool] = False
    """Whether the tool acts where a module is called, so that it does not reach weights that are used without a call."""

    @abstractmethod
    def unsaid(self, layer: Layer) -> str | None:
        """Return why the format cannot say a layer's bits; None where it can."""

    @abstractmethod
    def write(self, layers: Sequence[Layer], subject: Subject) -> str:
        """Return the file's text for layers that can all be said."""

    def read(self, text: str, subject: Subject) -> Mapping[str, Bits]:
        """Return the bits by layer path; what is left out is float32. May raise anything that a malformed file leads to."""
        raise PolicyError(f"policy: files of {self.name} can only be written; keep the policy.json beside them")


def available() -> tuple[str, ...]:
    """Return the names of the formats.

    >>> "torchao" in available()
    True
    """
    return tuple(sorted(kind.name for kind in _kinds()))


def get(name: str) -> type[Translator]:
    """Return the translator of a format; raises `PolicyError` for an unknown name."""
    for kind in _kinds():
        if kind.name == name:
            return kind
    raise PolicyError(f"policy: no format '{name}'; {nearest(name, available())}")


def _kinds() -> list[type[Translator]]:
    kinds = []
    for item in pkgutil.iter_modules(__path__):
        if not item.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{item.name}")
            kinds += [
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, Translator) and value.__module__ == module.__name__
            ]
    return kinds


def translate(policy: Policy, to: str, subject: Subject, **options: Any) -> str:
    """Return a policy as the text of another tool's file.

    Args:
        policy: bits of every site.
        to: the format, one of `available`.
        subject: the sites; and the quantized network where the format holds scales.
        options: of the format.

    Raises:
        PolicyError: an unknown format or option, or the format cannot say the bits of some sites, which are named.
    """
    translator = _made(to, options)
    layers = _layers(policy, subject)
    unsaid: dict[str, str] = {}
    for layer in layers:
        reason = _unsaid(translator, layer, subject)
        if reason is not None:
            unsaid.setdefault(layer.site.name, f"'{layer.site.name}' at {layer.bits!r} ({reason})")
    if unsaid:
        raise PolicyError(f"policy: {to} cannot say {len(unsaid)} of {len(subject.sites)} sites: {'; '.join(unsaid.values())}")
    text = translator.write(layers, subject)
    if translator.reads:
        back = understand(text, to, subject, **options)
        if back != policy:
            raise PolicyError(f"policy: {to} would say something else, {back.diff(policy)}; please report this")
    return text


def understand(text: str, of: str, subject: Subject, **options: Any) -> Policy:
    """Return the policy that another tool's file says, for all sites of a network.

    Raises:
        PolicyError: the file is not of that format, names layers that are no sites, gives the layers of one site different bits, or says
            what a policy cannot.
    """
    translator = _made(of, options)
    if len(text) > LARGEST:
        raise PolicyError(f"policy: the file has {len(text)} characters, more than a policy can have; give the file of {of}")
    try:
        found = translator.read(text, subject)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise PolicyError(f"policy: not a file of {of} ({type(error).__name__}: {str(error)[:100]})") from None
    return _policy(found, of, subject)


def _made(name: str, options: Mapping[str, Any]) -> Translator:
    kind = get(name)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise PolicyError(f"policy: {name} has no option '{key}'; {nearest(key, known) if known else 'it has none'}")
        if not isinstance(options[key], str):
            raise PolicyError(f"policy: option '{key}' of {name} is {options[key]!r}, which is no text; give --option {key}=TEXT")
    return kind(**options)


def _layers(policy: Policy, subject: Subject) -> list[Layer]:
    names = [site.name for site in subject.sites]
    for name in policy:
        if name not in names:
            raise PolicyError(f"policy: the network has no site '{name}'; {nearest(name, names)}")
    for name in names:
        if name not in policy:
            raise PolicyError(f"policy: no entry for site '{name}'; give every site its bits")
    return [Layer(path, site, policy[site.name]) for site in subject.sites for path in site.layers]


def _unsaid(translator: Translator, layer: Layer, subject: Subject) -> str | None:
    if "#" in layer.path:
        return None if layer.bits == FLOAT else "it is a functional call, which has no layer name"
    if translator.calls and layer.bits != FLOAT and _in_attention(layer.path, subject):
        return f"nn.MultiheadAttention uses its weight and never calls it, so {translator.name} does not reach it; give it W32A32"
    return translator.unsaid(layer)


def _in_attention(path: str, subject: Subject) -> bool:
    """Whether a layer is the output projection of an `nn.MultiheadAttention`, which alone has a product ``#qk``."""
    owner, _, name = path.rpartition(".")
    known = {*subject.skipped, *(address for site in subject.sites for address in site.layers)}
    return name == "out_proj" and f"{owner}#qk" in known


def _policy(found: Mapping[str, Bits], of: str, subject: Subject) -> Policy:
    site_of = {path: site.name for site in subject.sites for path in site.layers}
    for path in found:
        if path not in site_of:
            raise PolicyError(f"policy: the file of {of} names '{path}', which is no layer of a site; {nearest(path, site_of)}")
    entries = []
    for site in subject.sites:
        bits = {found.get(path, FLOAT) for path in site.layers}
        if len(bits) > 1:
            raise PolicyError(f"policy: the file of {of} gives the layers of site '{site.name}' different bits ({_listed(found, site)})")
        entries.append((site.name, bits.pop()))
    return Policy(entries)


def _listed(found: Mapping[str, Bits], site: Site) -> str:
    return ", ".join(f"{path} {found.get(path, FLOAT)!r}" for path in site.layers)


# ---- what several formats need


def integer_widths(bits: Bits, weights: Sequence[int], inputs: Sequence[int]) -> str | None:
    """Return what is wrong with a pair of widths, for a tool that knows these."""
    for what, width, known in (("weight", bits.w, weights), ("input", bits.a, inputs)):
        if width not in known:
            return f"it has no {what}s of {width} bits, only {', '.join(map(str, known))}"
    return None


def exact_name(name: Any, of: str, wild: Callable[[str], bool]) -> str:
    """Return a layer name of a file; raises `PolicyError` for a pattern."""
    if not isinstance(name, str) or wild(name):
        raise PolicyError(f"policy: the file of {of} has the pattern {name!r}; a policy names layers one by one")
    return name


def read_text(path: str | Path) -> str:
    """Return a file's text; raises `PolicyError` if it cannot be read."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PolicyError(f"{path}: cannot be read ({reason}); give a policy file") from None
