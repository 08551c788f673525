"""The picture of a run as inline SVG: headroom by layer and step, loss and gradient norm.

All panels share one horizontal axis, so that a column can be followed downwards.
Colours are CSS classes (`report_style`), so that one picture serves light and dark.
"""

from __future__ import annotations

from dataclasses import dataclass

from diagnostics.chart_axis import Axis, guides, step_labels
from diagnostics.chart_heat import HeatMap
from diagnostics.chart_log import PANEL_HEIGHT, LogPanel
from diagnostics.diagnosis import Diagnosis
from diagnostics.markup import Markup, tag
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_story import Column, Headroom, columns
from diagnostics.telemetry_view import scalar_column

_MOST_COLUMNS, _FEWEST_COLUMNS = 160, 80
_MOST_CELLS = 4000
_FLAGS, _SPACE, _STEP_LABELS = 34.0, 32.0, 36.0
_RIGHT, _NARROWEST = 64.0, 390.0


@dataclass(frozen=True)
class Picture:
    """svg, and the columns that it shows the recorded rows in."""

    svg: Markup
    columns: tuple[Column, ...]

    def note(self) -> str:
        """What a reader must know of columns that hold several steps; '' if none does."""
        widest = max(column.last - column.first + 1 for column in self.columns)
        if widest == 1:
            return ""
        return (
            f"Long stretches are grouped, up to {widest:,} steps a column: the least headroom, "
            "and median and range of the curves. Around the onset and at the end each step has "
            "a column of its own."
        )


def draw(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts, room: Headroom) -> Picture:
    """The whole picture of the recorded steps, of which there is at least one."""
    fitting = _MOST_CELLS // max(1, len(room.layers))
    most = min(_MOST_COLUMNS, max(_FEWEST_COLUMNS, fitting))
    axis = Axis(tuple(columns(telemetry, diagnosis, most)), telemetry.steps)
    parts: list[Markup] = []
    top = _FLAGS
    if room.layers:
        heat = HeatMap(room, axis, diagnosis)
        parts.append(heat.draw(top))
        top += heat.height + _SPACE
    for name, title, guess in (
        ("loss", "loss", facts.chance_loss),
        ("grad_norm", "gradient norm", None),
    ):
        values = scalar_column(telemetry, name)
        if values is not None:
            parts.append(LogPanel(title, values, axis, guess).draw(top))
            top += PANEL_HEIGHT + _SPACE
    bottom = top - _SPACE
    width, height = max(axis.right, _NARROWEST) + _RIGHT, bottom + _STEP_LABELS
    svg = tag(
        "svg",
        tag("title", "Headroom by layer and step, loss and gradient norm"),
        guides(axis, diagnosis, bottom),
        *parts,
        step_labels(axis, diagnosis, bottom),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        class_="run",
    )
    return Picture(svg, axis.columns)
