"""An input that any program can make again, to run an artefact on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLES = 2
"""Samples in a batch."""
EXTENTS = (32, 28, 224, 96, 64, 16, 8)
"""Pixels along an axis of an image whose size a file does not say."""


def sample_of(shape: Sequence[int], dtype: str) -> Any:
    """Return a sample input: a hash of each place, spread over -1 to 1; integers are zero.

    >>> sample_of([1, 3], "float32").round(3).tolist()
    [[-1.0, 0.23600000143051147, -0.527999997138977]]
    """
    if not dtype.startswith("float"):
        return np.zeros(shape, dtype)
    places = (np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    return (places.astype(np.float64) / 2**31 - 1).astype(dtype).reshape(shape)
