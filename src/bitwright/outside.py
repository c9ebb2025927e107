"""Code from outside the package: imported by name as Python run in the working directory would, and told apart by its source."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from bitwright.errors import BitwrightError, RecipeError

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


@contextmanager
def theirs(kind: type) -> Iterator[None]:
    """Turn whatever a search method from outside the package raises into an error that says where; our own methods may not fail."""
    try:
        yield
    except BitwrightError:
        raise
    except Exception as error:
        if not is_outside(kind):
            raise
        file = getattr(sys.modules[kind.__module__], "__file__", None)
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({file}, line {own[-1].lineno}); mend that file" if own else ""
        raise RecipeError(f"the search failed: {last_line(error)}{place}") from error


def source_digest(kind: type) -> str | None:
    """Return a digest of the files that define a class and its bases, as far as they are outside the package; None if none is.

    >>> source_digest(Path) is None
    True
    """
    modules = [sys.modules[base.__module__] for base in kind.__mro__ if is_outside(base)]
    files = [getattr(module, "__file__", None) for module in modules]  # a class typed into an interpreter has none
    known = [Path(file).read_bytes() for file in files if file is not None]
    return hashlib.sha256(b"\0".join(known)).hexdigest()[:16] if known else None


def callback_digest(call: Callable[..., Any]) -> str:
    """Return a digest that tells callbacks apart, and is the same in another process: of their names, code, defaults and arguments bound.

    Numbers, texts, functions and frozen dataclasses that it closes over count too, unless it sets them itself; other objects count by their
    type alone, for they may change while a search runs.

    >>> callback_digest(lambda policy: 1.0) == callback_digest(lambda policy: 2.0)
    False
    """
    return hashlib.sha256(repr(_told(call, ())).encode()).hexdigest()[:16]


def _told(value: object, within: tuple[object, ...]) -> object:
    """Return what is known of a value for good, as nested tuples of plain values; ``within`` is what it was reached through."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, frozenset):  # a constant of some code
        return tuple(sorted(map(repr, value)))
    if any(value is outer for outer in within):
        return "itself"
    parts = value if isinstance(value, tuple) else _parts(value)
    return tuple(_told(part, (*within, value)) for part in parts)


def _parts(value: object) -> tuple[object, ...]:
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_consts
    if isinstance(value, FunctionType):
        return value.__code__, value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items())), _closed_over(value)
    kind = value if isinstance(value, type) else type(value)
    called = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
    frozen = dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    options = tuple((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)) if frozen else ()  # type: ignore[arg-type]
    return kind.__module__, kind.__qualname__, called if isinstance(called, FunctionType) else None, options


def _closed_over(function: FunctionType) -> tuple[object, ...]:
    """Return the variables that a function closes over, without those that it sets."""
    code = function.__code__
    changed = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return tuple((name, cell.cell_contents) for name, cell in cells if name not in changed)
