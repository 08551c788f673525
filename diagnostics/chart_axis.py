"""The horizontal axis that all panels of the picture share, with its labels and guide lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diagnostics import report_words as words
from diagnostics.diagnosis import Diagnosis
from diagnostics.markup import Markup, markup, tag
from diagnostics.report_story import Column

LEFT = 132.0  # room for the names of layers; all lengths are in CSS pixels
NUMBERED_CELL = 30.0  # wide enough for a number
_WIDTH = 820.0
_WIDEST_CELL = 130.0
_LABEL_DISTANCE = 58.0
_LABELS = 14
_FLAG_WIDTH = 170.0


@dataclass(frozen=True)
class Axis:
    """Equally wide columns of one or more recorded steps.

    Attributes:
      steps: int64 [rows], the step of every recorded row.
    """

    columns: tuple[Column, ...]
    steps: np.ndarray

    @property
    def cell(self) -> float:
        """Width of a column."""
        return min(_WIDEST_CELL, _WIDTH / len(self.columns))

    @property
    def right(self) -> float:
        """Where the last column ends."""
        return self.left(len(self.columns))

    def left(self, column: int) -> float:
        """Where a column begins."""
        return LEFT + column * self.cell

    def centre(self, column: int) -> float:
        """The middle of a column."""
        return self.left(column) + self.cell / 2

    def column_of(self, step: int) -> int | None:
        """The column that holds a step, None if it was not recorded."""
        for index, column in enumerate(self.columns):
            if self.steps[column.first] <= step <= self.steps[column.last]:
                return index
        return None

    def name(self, column: int) -> str:
        """'step 12' or 'steps 100 to 119'."""
        first, last = (int(self.steps[row]) for row in self.columns[column])
        return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def guides(axis: Axis, diagnosis: Diagnosis, bottom: float) -> Markup:
    """Lines down through all panels at the onset and the failure, labelled at the top."""
    parts: list[Markup] = []
    for column, class_, label in _marks(axis, diagnosis):
        x = axis.centre(column)
        y = 11 if class_ == "onset" else 25
        leftwards = x > LEFT + _FLAG_WIDTH
        parts.append(tag("line", x1=x, x2=x, y1=y + 3, y2=bottom, class_=f"guide {class_}"))
        parts.append(
            tag(
                "text",
                label,
                x=x + 4 if leftwards else x - 4,
                y=y,
                class_=f"flag {class_}",
                text_anchor="end" if leftwards else "start",
            )
        )
    return markup(*parts)


def step_labels(axis: Axis, diagnosis: Diagnosis, bottom: float) -> Markup:
    """Step numbers below; those of the failure, the onset and the ends come first."""
    count = len(axis.columns)
    wanted = [column for column, _, _ in reversed(_marks(axis, diagnosis))]
    even = np.linspace(0, count - 1, min(count, _LABELS)).round().astype(int)
    placed: list[int] = []
    for column in (*wanted, count - 1, 0, *even.tolist()):
        distances = [abs(axis.centre(column) - axis.centre(other)) for other in placed]
        if min(distances, default=_LABEL_DISTANCE) >= _LABEL_DISTANCE:
            placed.append(column)
    texts = [
        tag(
            "text",
            f"{int(axis.steps[axis.columns[column].first]):,}",
            x=axis.centre(column),
            y=bottom + 15,
            class_="step",
        )
        for column in sorted(placed)
    ]
    return markup(*texts, tag("text", "step", x=LEFT - 8, y=bottom + 15, class_="tick"))


def _marks(axis: Axis, diagnosis: Diagnosis) -> list[tuple[int, str, str]]:
    """(column, CSS class, label) of the onset and the failing step."""
    found = []
    if diagnosis.onset is not None:
        found.append((diagnosis.onset.step, "onset", f"onset: step {diagnosis.onset.step:,}"))
    if diagnosis.first_nonfinite is not None:
        kind = words.kind_title(diagnosis.first_nonfinite.kind)
        found.append((diagnosis.step, "failure", f"first {kind}: step {diagnosis.step:,}"))
    placed = [(axis.column_of(step), class_, label) for step, class_, label in found]
    return [(column, class_, label) for column, class_, label in placed if column is not None]
