"""The search methods: the folder is the registry, one file per method, named like it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from bitwright.driver import SearchMethod
from bitwright.errors import RecipeError, nearest
from bitwright.outside import import_from_here, last_line, place_of

GROUP = "bitwright.methods"
"""The entry-point group by which an installed package adds methods."""


def available() -> dict[str, type[SearchMethod[Any]]]:
    """Return every method by name: those of this folder, and those that installed packages add.

    >>> sorted({"fisher", "random", "uniform"} & set(available()))
    ['fisher', 'random', 'uniform']
    """
    own = {name: _in_module(f"{__name__}.{name}") for name in _names()}
    added = {entry.name: _entered(entry) for entry in entry_points(group=GROUP)}
    return dict(sorted((added | own).items()))


def get_method(name: str) -> type[SearchMethod[Any]]:
    """Return the method of a name, or the class that ``"package.module:Class"`` says (the working directory is looked into as well).

    Raises:
        RecipeError: there is no such method, it is none, or its file cannot be imported.

    >>> get_method("uniform").ranking
    'loss'
    """
    module, colon, attribute = name.partition(":")
    if colon:
        what = f"method '{name}'"
        return _checked(_imported(what, lambda: getattr(import_from_here(module), attribute)), what)
    if name in _names():
        return _in_module(f"{__name__}.{name}")
    for entry in entry_points(group=GROUP, name=name):
        return _entered(entry)
    raise RecipeError(f"unknown method '{name}'; {nearest(name, _names())}, or package.module:Class for one of your own")


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def _in_module(name: str) -> type[SearchMethod[Any]]:
    module = importlib.import_module(name)
    for kind in vars(module).values():
        if inspect.isclass(kind) and issubclass(kind, SearchMethod) and kind.__module__ == name and not inspect.isabstract(kind):
            return kind
    raise RecipeError(f"{name}: holds no SearchMethod; a file in this folder is one method")


def _entered(entry: EntryPoint) -> type[SearchMethod[Any]]:
    """Return the method of an installed package."""
    what = f"entry point '{entry.name}'"
    return _checked(_imported(what, entry.load), what)


def _imported(what: str, load: Callable[[], object]) -> object:
    """Return what is loaded from somebody else's file; whatever goes wrong in it is theirs to mend."""
    try:
        return load()
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"{what} cannot be imported ({error}); give package.module:Class") from None
    except Exception as error:
        raise RecipeError(f"{what} cannot be imported: {last_line(error)} ({place_of(error)}); mend that file") from None


def _checked(kind: object, what: str) -> type[SearchMethod[Any]]:
    if not (inspect.isclass(kind) and issubclass(kind, SearchMethod)) or inspect.isabstract(kind):
        raise RecipeError(f"{what} is no search method; give a class that derives from bitwright.driver.SearchMethod")
    if not dataclasses.is_dataclass(kind):
        file = sys.modules[kind.__module__].__file__
        raise RecipeError(f"{what} is no dataclass of options; write @dataclass(frozen=True) above class {kind.__name__} in {file}")
    if getattr(kind, "ranking", None) not in ("loss", "last"):
        ways = 'write ranking: ClassVar = "loss" in it, or "last" if its weights adapt while it searches'
        raise RecipeError(f"{what} does not say how its proposals are ranked; {ways}")
    return kind


def describe(method: type[SearchMethod[Any]]) -> dict[str, Any]:
    """Return a method's summary and options as JSON-able data."""
    doc = inspect.getdoc(method) or ""
    every = "\n".join(inspect.cleandoc(kind.__doc__ or "") for kind in method.__mro__)  # a base class tells of its own options
    options = [
        {"name": field.name, "default": _default(field), "type": str(field.type), "about": _attribute(every, field.name)}
        for field in dataclasses.fields(method)  # type: ignore[arg-type]  # every method is one
    ]
    module = sys.modules[method.__module__].__doc__ or doc
    return {"summary": module.splitlines()[0], "ranking": method.ranking, "options": options}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _attribute(doc: str, name: str) -> str:
    """Return what a docstring's Attributes section says of a name, on one line."""
    match = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    return "" if match is None else " ".join(match[1].split()).replace("``", "")
