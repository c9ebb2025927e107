"""Pieces of HTML that every page is made of; every text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

META = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'


def document(title: str, body: str) -> str:
    """Return a whole page that stands alone, around a body that is HTML already."""
    style = (resources.files("bitwright") / "report" / "style.css").read_text("utf-8")
    head = f"{META}<title>{escape(title)} · bitwright</title>"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{style}</style></head><body><main>{body}</main></body></html>\n'


def tile(value: str, label: str, note: str) -> str:
    """Return one of the figures at the top; the note is HTML already."""
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b>{note}</div>'


def cells(values: Sequence[str]) -> str:
    """Return the cells of a table's row.

    >>> cells(["a", "<b>"])
    '<td>a</td><td>&lt;b&gt;</td>'
    """
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table of rows that are HTML already."""
    head = f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in headings)}</tr></thead>" if headings else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of names and what they are."""
    return table((), [f'<tr><td>{escape(name)}</td><td class="text">{escape(value)}</td></tr>' for name, value in rows])
