"""Bits and policies: which width each site has, as a value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bitwright.errors import PolicyError, nearest

WIDTHS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
"""Every legal width: 1 to 8 are integer grids, 16 is bfloat16, 32 is left in float32."""

FORMAT = "bitwright-policy-1"


class Bits(NamedTuple):
    """The widths of one site: weights and input activations.

    >>> Bits(2, 32)
    W2A32
    """

    w: int
    a: int

    def __repr__(self) -> str:
        return f"W{self.w}A{self.a}"


def check_bits(bits: Bits, where: str = "policy") -> Bits:
    """Return ``bits`` if both widths are legal, else raise `PolicyError`."""
    for kind, width in (("weight", bits.w), ("activation", bits.a)):
        if isinstance(width, bool) or not isinstance(width, int) or width not in WIDTHS:
            raise PolicyError(f"{where}: {kind} width {width!r} is not one of {', '.join(map(str, WIDTHS))}")
    return bits


@dataclass(frozen=True, init=False, repr=False)
class Policy(Mapping[str, Bits]):
    """Site name to bits, in traced order; immutable and hashable.

    >>> policy = Policy({"conv1": (8, 8), "fc": (2, 4)})
    >>> policy["fc"], hash(policy) == hash(Policy.from_json(policy.to_json()))
    (W2A4, True)
    """

    entries: tuple[tuple[str, Bits], ...]

    def __init__(self, entries: Mapping[str, Bits | tuple[int, int]] | Iterable[tuple[str, Bits | tuple[int, int]]]):
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        checked = tuple((name, check_bits(Bits(*bits), f"site '{name}'")) for name, bits in pairs)
        if len({name for name, _ in checked}) != len(checked):
            raise PolicyError("policy: a site is named twice; give each site once")
        object.__setattr__(self, "entries", checked)
        object.__setattr__(self, "_index", dict(checked))

    def __getitem__(self, name: str) -> Bits:
        index: dict[str, Bits] = self.__dict__["_index"]
        return index[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __hash__(self) -> int:
        return hash(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.entries == other.entries

    def __repr__(self) -> str:
        return "Policy(" + ", ".join(f"{name}={bits!r}" for name, bits in self.entries) + ")"

    def replace(self, changes: Mapping[str, Bits]) -> Policy:
        """Return a copy with the bits of some sites changed.

        >>> Policy({"a": (8, 8)}).replace({"a": Bits(2, 8)})
        Policy(a=W2A8)
        """
        for name in changes:
            if name not in self:
                raise PolicyError(f"policy: no site '{name}'; {nearest(name, self)}")
        return Policy((name, changes.get(name, bits)) for name, bits in self.entries)

    def diff(self, other: Policy) -> dict[str, tuple[Bits | None, Bits | None]]:
        """Return the sites whose bits differ, as ``{site: (here, there)}``.

        >>> Policy({"a": (8, 8), "b": (2, 8)}).diff(Policy({"a": (8, 8), "b": (3, 8)}))
        {'b': (W2A8, W3A8)}
        """
        names = list(self) + [name for name in other if name not in self]
        return {n: (self.get(n), other.get(n)) for n in names if self.get(n) != other.get(n)}

    @property
    def digest(self) -> str:
        """The SHA-256 of `to_json`: equal policies have equal ones.

        >>> Policy({"conv1": (8, 4)}).digest[:16]
        '815c296b495169fd'
        """
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the policy as JSON text; `from_json` reads it back."""
        sites = {name: {"w": bits.w, "a": bits.a} for name, bits in self.entries}
        return json.dumps({"format": FORMAT, "sites": sites}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read what `to_json` wrote; raises `PolicyError` for anything else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PolicyError(f"policy: format is {data['format']!r}, expected '{FORMAT}'")
            pairs = [(str(name), Bits(**bits)) for name, bits in data["sites"].items()]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PolicyError(f"policy: not a policy file ({error}); expected {{'format', 'sites': {{name: {{w, a}}}}}}") from None
        return cls(pairs)
