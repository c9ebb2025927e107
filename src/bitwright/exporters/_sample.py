"""Inputs that any program can make again, to run an artefact on, and what a network answered."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 2
"""Samples in a batch."""
DRAWS = 16
"""Samples that are tried for one whose answer is well defined."""
EXTENTS = (32, 28, 224, 96, 64, 16, 8)
"""Pixels along an axis of an image whose size a file does not say."""
NUMBERS = 32
"""Numbers of an answer that a `Sample` keeps."""
LARGEST_SAMPLE = 1 << 24
"""Numbers of an input that a file can make us build."""


def sample_of(shape: Sequence[int], dtype: str, draw: int = 0) -> Any:
    """Return a sample input, one of many draws: a hash of each place, spread over -1 to 1; integers are zero.

    >>> sample_of([1, 3], "float32").round(3).tolist()
    [[-1.0, 0.23600000143051147, -0.527999997138977]]
    >>> sample_of([1, 3], "float32", draw=1).round(3).tolist()
    [[0.7080000042915344, -0.0560000017285347, -0.8199999928474426]]
    """
    if not dtype.startswith("float"):
        return np.zeros(shape, dtype)
    count = int(np.prod(shape))
    places = (np.arange(draw * count, (draw + 1) * count, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    return (places.astype(np.float64) / 2**31 - 1).astype(dtype).reshape(shape)


@dataclass(frozen=True)
class Sample:
    """Inputs by shape and data type, made by `sample_of`, and some numbers of a network's first output on them.

    Attributes:
        inputs: of each input its name (empty for positional ones), shape and data type.
        shape: of the output.
        numbers: float32, at most `NUMBERS` of the output's, evenly spread over it.
    """

    inputs: tuple[tuple[str, tuple[int, ...], str], ...]
    shape: tuple[int, ...]
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, inputs: Sequence[tuple[str, tuple[int, ...], str]], output: Any) -> Sample:
        """Return the sample of inputs and the output, an array, that a network gave."""
        return cls(tuple(inputs), tuple(output.shape), _spread(output))

    def __str__(self) -> str:
        inputs = ";".join(f"{name}={_sizes(shape)}:{dtype}" for name, shape, dtype in self.inputs)
        return f"{inputs}|{_sizes(self.shape)}|{base64.b64encode(np.asarray(self.numbers, '<f4').tobytes()).decode()}"

    @classmethod
    def parse(cls, text: str) -> Sample | None:
        """Return what ``str`` wrote, None of blanks; raises `ValueError` for anything else.

        >>> sample = Sample((("", (2, 3), "float32"),), (2,), (0.5, -1.0))
        >>> str(sample), Sample.parse(str(sample)) == sample
        ('=2x3:float32|2|AAAAPwAAgL8=', True)
        """
        if not text.strip():
            return None
        inputs, shape, numbers = text.strip().split("|")
        parts = [entry.partition("=")[::2] for entry in inputs.split(";")]
        placed = tuple((name, _shape(rest.partition(":")[0]), rest.partition(":")[2]) for name, rest in parts)
        if any(math.prod(sizes) > LARGEST_SAMPLE for _, sizes, _ in placed):
            raise ValueError("its sample is too large")
        values = np.frombuffer(base64.b64decode(numbers, validate=True), "<f4")
        return cls(placed, _shape(shape), tuple(float(value) for value in values))

    def made(self) -> tuple[Any, ...] | Mapping[str, Any]:
        """Return the inputs: positional ones, or all by name."""
        values = [sample_of(shape, dtype) for _, shape, dtype in self.inputs]
        names = [name for name, _, _ in self.inputs]
        return dict(zip(names, values, strict=True)) if any(names) else tuple(values)

    def gap(self, output: Any) -> float:
        """Return how far an output is from the one that was kept, as a share of the largest number kept; infinite for another shape."""
        if tuple(output.shape) != self.shape:
            return math.inf
        wanted, found = np.asarray(self.numbers), np.asarray(_spread(output))
        return float(np.abs(wanted - found).max(initial=0.0) / max(float(np.abs(wanted).max(initial=0.0)), 1e-30))


def _spread(output: Any) -> tuple[float, ...]:
    flat = np.asarray(output, np.float32).reshape(-1)
    count = min(flat.size, NUMBERS)
    return tuple(float(flat[k * flat.size // count]) for k in range(count))


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x")) if text else ()
