"""The heat map of headroom: layers downwards, steps to the right."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diagnostics import report_words as words
from diagnostics.chart_axis import LEFT, NUMBERED_CELL, Axis
from diagnostics.diagnosis import Diagnosis
from diagnostics.markup import Markup, markup, tag
from diagnostics.report_story import Headroom

WARM_SHADES = 8  # CSS classes w0 (full headroom) to w7 (next to none)
COLD_SHADES = 4  # c1 to c4: values fainter than 1
OVERFLOWED, ALL_ZERO = "x", "z"
_COLD_BITS = 10.0  # of a shade
_ROWS_HEIGHT = 400.0
_TALLEST_ROW, _LOWEST_ROW, _NUMBERED_ROW, _NAMED_ROW = 24.0, 6.0, 14.0, 11.0
_BORDERED_CELL = 12.0
_NAME_LENGTH = 18


def shade(bits: float, of_one: float) -> str:
    """The CSS class of a headroom; `of_one`: the headroom of a value of 1."""
    if math.isinf(bits):
        return OVERFLOWED if bits < 0 else ALL_ZERO
    cold = int((bits - of_one) // _COLD_BITS)
    if cold >= 1:
        return f"c{min(COLD_SHADES, cold)}"
    lost = 1 - max(0.0, bits) / of_one
    return f"w{min(WARM_SHADES - 1, max(0, int(lost * WARM_SHADES)))}"


class HeatMap:
    """Layers x columns; a column of several steps shows the least headroom of them."""

    def __init__(self, room: Headroom, axis: Axis, diagnosis: Diagnosis) -> None:
        self._room, self._axis, self._diagnosis = room, axis, diagnosis
        self._row = min(_TALLEST_ROW, max(_LOWEST_ROW, _ROWS_HEIGHT / len(room.layers)))

    @property
    def height(self) -> float:
        return self._row * len(self._room.layers)

    def draw(self, top: float) -> Markup:
        """The cells, the layers' names and the outlines of the onset and the failure."""
        bordered = self._axis.cell >= _BORDERED_CELL
        cells = tag("g", *self._cells(top), class_="heat bordered" if bordered else "heat")
        names = tag("g", *self._names(top), class_="names")
        return markup(cells, names, *self._outlines(top))

    def _cells(self, top: float) -> Iterator[Markup]:
        numbered = self._axis.cell >= NUMBERED_CELL and self._row >= _NUMBERED_ROW
        for row, layer in enumerate(self._room.layers):
            y = top + row * self._row
            for index, column in enumerate(self._axis.columns):
                bits = float(self._room.bits[row, column.first : column.last + 1].min())
                title = tag("title", self._explain(layer, index, bits))
                parts = [title, self._rectangle(index, y)]
                if numbered:
                    number = words.bits(bits).removesuffix(" bits")
                    middle = y + self._row / 2 + 4
                    parts.append(tag("text", number, x=self._axis.centre(index), y=middle))
                yield tag("g", *parts, class_=shade(bits, self._room.of_one))

    def _rectangle(self, column: int, y: float, class_: str | None = None) -> Markup:
        x, width = self._axis.left(column), self._axis.cell
        return tag("rect", x=x, y=y, width=width, height=self._row, class_=class_)

    def _explain(self, layer: str, column: int, bits: float) -> str:
        if bits == -math.inf:
            size = "not finite"
        else:
            size = f"{words.bits(bits)}, largest {words.number(self._room.absmax(bits))}"
        return f"{layer}, {self._axis.name(column)}: {size}"

    def _names(self, top: float) -> Iterator[Markup]:
        every = math.ceil(_NAMED_ROW / self._row)
        for row, layer in list(enumerate(self._room.layers))[::every]:
            y = top + (row + 0.5) * self._row + 4
            short = layer if len(layer) <= _NAME_LENGTH else f"{layer[: _NAME_LENGTH - 1]}…"
            yield tag("text", tag("title", layer), short, x=LEFT - 8, y=y)

    def _outlines(self, top: float) -> Iterator[Markup]:
        first, onset = self._diagnosis.first_nonfinite, self._diagnosis.onset
        marked = [(onset.step, onset.layer, "onset")] if onset else []
        marked += [(self._diagnosis.step, first.layer, "failure")] if first else []
        for step, layer, class_ in marked:
            column = self._axis.column_of(step)
            if column is not None and layer in self._room.layers:
                y = top + self._room.layers.index(layer) * self._row
                yield self._rectangle(column, y, f"outline {class_}")


def legend() -> Markup:
    """What the shades mean."""
    scale = [OVERFLOWED, *(f"w{warm}" for warm in reversed(range(WARM_SHADES)))]
    scale += [*(f"c{cold}" for cold in range(1, COLD_SHADES + 1)), ALL_ZERO]
    boxes = [
        tag("g", tag("rect", x=22.0 * at, y=0, width=22, height=14), class_=class_)
        for at, class_ in enumerate(scale)
    ]
    return tag(
        "div",
        tag("span", "not finite"),
        tag("svg", *boxes, width=22.0 * len(scale), height=14, aria_hidden="true"),
        tag("span", "all zero"),
        tag("span", "red: about to overflow; neutral: values of 1 to 1000; blue: fading away"),
        class_="legend",
    )
