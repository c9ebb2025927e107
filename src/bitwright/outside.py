"""Code from outside the package: imported by name as Python run in the working directory would, and told apart by its source."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.partition(".")[0]


def import_from_here(module: str) -> ModuleType:
    """Import a module, from the working directory too."""
    with _here():
        return importlib.import_module(module)


@contextmanager
def _here() -> Iterator[None]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def last_line(error: BaseException) -> str:
    """Return the last line of what Python prints of an exception.

    >>> last_line(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    """
    return traceback.format_exception_only(error)[-1].strip()


def place_of(error: BaseException) -> str:
    """Return the file and line at which an import failed: where a text is no Python, or the innermost line that ran."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def is_outside(kind: type) -> bool:
    """Say whether a class is defined outside the package and the standard library.

    >>> is_outside(Path)
    False
    """
    top = kind.__module__.partition(".")[0]
    return top != PACKAGE and top not in sys.stdlib_module_names


def source_digest(kind: type) -> str | None:
    """Return a digest of the files that define a class and its bases, as far as they are outside the package; None if none is.

    >>> source_digest(Path) is None
    True
    """
    modules = [sys.modules[base.__module__] for base in kind.__mro__ if is_outside(base)]
    files = [getattr(module, "__file__", None) for module in modules]  # a class typed into an interpreter has none
    known = [Path(file).read_bytes() for file in files if file is not None]
    return hashlib.sha256(b"\0".join(known)).hexdigest()[:16] if known else None
