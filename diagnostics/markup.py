"""HTML and SVG built from tags, so that text from data is escaped by construction."""

from __future__ import annotations

from html import escape

from diagnostics.report_words import printable

_EMPTY = frozenset(["meta", "rect", "line", "circle", "path", "polyline", "use", "col"])


class Markup(str):
    """Text that is markup already; any other string is data and gets escaped."""

    __slots__ = ()


def markup(*parts: str) -> Markup:
    """The parts one after the other, with data escaped."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in parts))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element: `tag("td", "a < b", class_="n")` is '<td class="n">a &lt; b</td>'.

    Attributes: '_' in a name becomes '-', one at its end is dropped; None leaves the
    attribute out; numbers are rounded to a tenth.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{markup(*children)}</{name}>")


def _escaped(text: str) -> str:
    return escape(printable(text))


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return _escaped(value)
    return f"{value:.1f}".removesuffix(".0")
