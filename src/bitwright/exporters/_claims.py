"""What a file says of itself, judged: anybody can write a checksum, so a claim counts only where the file's own graph bears it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bitwright.errors import ExportError
from bitwright.exporters._sample import DRAWS, sample_of

LARGEST_SAMPLE = 1 << 26
"""Numbers of an input that a file can make us build."""


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Turn a refusal into one line of a file, and whatever a runtime raises of metadata that do not fit it into an `ExportError`."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"{name}: tampered with or damaged: {error}; export it again") from None
    except Exception as error:  # a runtime's own, of a shape or a type that a file claims
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ExportError(f"{name}: its metadata do not fit its graph ({found}); export it again") from None


def samples_of(content: Mapping[str, Any]) -> list[Any]:
    """Return the inputs of a file's sample.

    Raises:
        ExportError: they are of no size, too large to be built, or of no draw that there is.
    """
    inputs, draw = content["sample"]["inputs"], content["sample"].get("draw", 0)
    if not isinstance(draw, int) or not 0 <= draw < DRAWS:
        raise ExportError(f"its sample is draw {draw!r}, and there are {DRAWS}, from 0")
    for shape, _ in inputs:
        if min(shape, default=1) < 1 or math.prod(shape) > LARGEST_SAMPLE:
            raise ExportError(f"its sample has shape {shape}, and sizes from 1 and {LARGEST_SAMPLE} numbers in all are allowed")
    return [sample_of(shape, dtype, draw) for shape, dtype in inputs]


def bound_of(content: Mapping[str, Any]) -> float:
    """Return how far outputs may differ by a file's own word, as a share of the largest.

    Raises:
        ExportError: it is no share.

    >>> bound_of({"allowed": 0.05})
    0.05
    """
    allowed = content["allowed"]
    if not isinstance(allowed, (int, float)) or not 0 <= allowed <= 1:
        raise ExportError(f"it allows outputs to differ by {allowed!r} of the largest, and a share is from 0 to 1")
    return float(allowed)


def compare(part: str, address: str, wanted: object, found: object) -> None:
    """Raise `ExportError` where a part of a layer has other bits than the policy says."""
    if wanted != found:
        raise ExportError(f"the policy says {wanted} bits for the {part} of '{address}', which has {found} in its graph")


def all_found(layers: Mapping[str, Any], found: set[str]) -> None:
    """Raise `ExportError` where a graph lacks a quantized layer of the policy."""
    missing = [address for address, bits in layers.items() if min(bits) < 32 and address not in found]
    if missing:
        raise ExportError(f"its graph has no quantized layer '{missing[0]}', which the policy names")
