"""Values from files and command lines, checked against the types that they are to have."""

from __future__ import annotations

from typing import Any


def typed(hint: Any, value: object) -> Any:
    """Return a value as a type wants it; raises `ValueError` that says what was expected.

    >>> typed(int, "3")
    3
    """
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (slow to import)

    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False)[0]["msg"].replace("Input should be", "expected")) from None
