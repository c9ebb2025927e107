"""What readers of files share: nothing that changes what a file means may go by unseen."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bitwright.errors import PolicyError


def loaded(text: str, of: str) -> Any:
    """Return JSON's value; raises `PolicyError` where an object has a key twice, of which the parser would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        once([key for key, _ in pairs], of)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def once(names: Iterable[str], of: str) -> None:
    """Raise `PolicyError` if a name comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PolicyError(f"policy: the file of {of} has {name!r} twice; keep one")
        seen.add(name)


def only(entry: Mapping[str, Any], known: Collection[str], where: str, of: str) -> None:
    """Raise `PolicyError` for a key beyond the known ones that says anything (None, False and empty values say nothing)."""
    odd = sorted(key for key, value in entry.items() if key not in known and value not in (None, False, "", [], {}))
    if odd:
        raise PolicyError(f"policy: the file of {of} has {', '.join(map(repr, odd))} in {where}, which a policy cannot say; remove it")


def integers(width: Any, where: str, of: str) -> int:
    """Return the width of integers; raises `PolicyError` for one that means something else in a policy, or is none."""
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 8:
        known = "a policy has integers of 1 to 8 (its 16 is bfloat16, its 32 float32)"
        raise PolicyError(f"policy: the file of {of} gives {where} {width!r} bits, and {known}; change it")
    return width


def one_width(path: str, widths: Collection[int], of: str) -> int:
    """Return the width of all tensors that a layer reads; raises `PolicyError` where calls of it read different ones."""
    if len(set(widths)) > 1:
        raise PolicyError(
            f"policy: the file of {of} gives the inputs of '{path}' {', '.join(map(str, widths))} bits; a policy has one width"
        )
    return next(iter(widths))
