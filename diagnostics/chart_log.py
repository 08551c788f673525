"""A curve over the steps on a logarithmic axis, with NaN and Inf marked above it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from diagnostics import report_words as words
from diagnostics.chart_axis import LEFT, NUMBERED_CELL, Axis
from diagnostics.markup import Markup, markup, tag

PANEL_HEIGHT = 123.0  # with the strip
_STRIP = 13.0
_CURVE_HEIGHT = PANEL_HEIGHT - _STRIP
_DOTTED_CELL = 8.0
_TICKS = 6


class _Summary(NamedTuple):
    """A column's positive finite values."""

    column: int
    least: float
    median: float
    most: float


class LogPanel:
    """One quantity; a column of several steps shows its median and, as a band, its range.

    Args:
      values: float [rows], of every recorded row. Zero and negative ones have no
        place on the axis and are left out.
      guess: draws a line at this value, the loss of guessing; None: no line.
    """

    def __init__(self, title: str, values: np.ndarray, axis: Axis, guess: float | None) -> None:
        self._title, self._values, self._axis = title, values, axis
        self._guess = guess if guess and guess > 0 else None
        positive = values[np.isfinite(values) & (values > 0)]
        extremes = [*positive, *([self._guess] if self._guess else [])] or [1.0]
        self._low = math.floor(math.log10(min(extremes)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(extremes))))
        self._top = 0.0

    def draw(self, top: float) -> Markup:
        """Title, strip, frame, ticks, curve, and the marks of what is not finite."""
        self._top = top + _STRIP
        width = self._axis.right - LEFT
        return markup(
            tag("text", self._title, x=LEFT, y=top - 5, class_="title"),
            tag("rect", x=LEFT, y=top, width=width, height=_STRIP, class_="strip"),
            tag("rect", x=LEFT, y=self._top, width=width, height=_CURVE_HEIGHT, class_="frame"),
            *self._ticks(),
            *self._guess_line(),
            *self._band(),
            *self._curve(),
            *self._nonfinite(top),
        )

    def _y(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._top + _CURVE_HEIGHT * (1 - share)

    def _ticks(self) -> Iterator[Markup]:
        decades = range(self._low, self._high + 1)
        ticks = [10.0**decade for decade in decades[:: math.ceil(len(decades) / _TICKS)]]
        if len(decades) == 2:
            ticks += [factor * 10.0**self._low for factor in (2, 5)]
        for value in ticks:
            y = self._y(value)
            yield tag("line", x1=LEFT, x2=self._axis.right, y1=y, y2=y, class_="grid")
            yield tag("text", words.number(value), x=LEFT - 8, y=y + 4, class_="tick")

    def _guess_line(self) -> Iterator[Markup]:
        if self._guess:
            y, right = self._y(self._guess), self._axis.right
            yield tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="guess")
            yield tag("text", "guessing", x=right + 4, y=y + 4, class_="guess")

    def _pieces(self) -> list[list[_Summary]]:
        """Unbroken stretches of columns that have something to draw."""
        pieces: list[list[_Summary]] = []
        for index, column in enumerate(self._axis.columns):
            values = self._values[column.first : column.last + 1]
            kept = values[np.isfinite(values) & (values > 0)]
            if not kept.size:
                continue
            if not pieces or pieces[-1][-1].column + 1 != index:
                pieces.append([])
            least, median, most = (float(np.quantile(kept, part)) for part in (0, 0.5, 1))
            pieces[-1].append(_Summary(index, least, median, most))
        return pieces

    def _points(self, at: Iterable[tuple[int, float]]) -> str:
        return " ".join(f"{self._axis.centre(column):.1f},{self._y(v):.1f}" for column, v in at)

    def _band(self) -> Iterator[Markup]:
        if all(column.last == column.first for column in self._axis.columns):
            return
        for piece in self._pieces():
            upper = [(summary.column, summary.most) for summary in piece]
            lower = [(summary.column, summary.least) for summary in reversed(piece)]
            yield tag("polygon", points=self._points([*upper, *lower]), class_="band")

    def _curve(self) -> Iterator[Markup]:
        for piece in self._pieces():
            middle = [(summary.column, summary.median) for summary in piece]
            yield tag("polyline", points=self._points(middle), class_="curve")
            if self._axis.cell < _DOTTED_CELL and len(piece) > 1:
                continue
            for column, value in middle:
                title = tag("title", f"{self._axis.name(column)}: {words.number(value)}")
                x, y = self._axis.centre(column), self._y(value)
                yield tag("circle", title, cx=x, cy=y, r=2.5, class_="dot")

    def _nonfinite(self, top: float) -> Iterator[Markup]:
        cell, named = self._axis.cell, False
        for index, column in enumerate(self._axis.columns):
            values = self._values[column.first : column.last + 1]
            bad = values[~np.isfinite(values)]
            if not bad.size:
                continue
            kind = words.number(float(bad[0]))
            x, title = self._axis.left(index), tag("title", f"{self._axis.name(index)}: {kind}")
            yield tag("rect", title, x=x, y=top, width=cell, height=_STRIP, class_="bad")
            if cell >= NUMBERED_CELL:
                yield tag("text", kind, x=x + cell / 2, y=top + 10, class_="bad-inside")
            elif not named:
                yield tag("text", kind, x=x - 3, y=top + 10, class_="bad-before")
            named = True
