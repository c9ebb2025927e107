"""Errors a user can act on: what was asked, what was found, what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitwrightError(Exception):
    """The input is wrong and the message says how to mend it (the command line exits with 2)."""


class SiteError(BitwrightError):
    """A layer cannot be quantized, or a name is no site of the model."""


class PolicyError(BitwrightError):
    """A policy is malformed or does not match the model."""


class BudgetError(BitwrightError):
    """A budget does not parse or cannot be met."""


class TargetError(BitwrightError):
    """A deployment target is unknown or malformed, or does not run what is asked of it."""


class RecipeError(BitwrightError):
    """A recipe, or an option given for it, is wrong."""


class DataError(BitwrightError):
    """Data is missing, damaged or of the wrong shape."""


class RunError(BitwrightError):
    """A run directory is damaged, belongs to another recipe, or cannot be written."""


class TrainingError(BitwrightError):
    """Training met a value it cannot go on from, such as a loss that is not a number."""


class ExportError(BitwrightError):
    """An artefact could not be written, read, or does not reproduce its network."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint that ends an unknown-name message: the closest known name, or a few of them.

    >>> nearest("layer1.0.convl", ["conv1", "layer1.0.conv1"])
    "did you mean 'layer1.0.conv1'?"
    >>> nearest("zzz", ["a", "b"])
    'known: a, b'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
