"""What a report shows of the telemetry: headroom by layer and step, and the steps that matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.telemetry_view import (
    largest_activation,
    layer_names,
    preactivation_absmax,
    scalar_column,
)

_LAST_STEPS = 5
_LAST_ALONE = 24
_AROUND_ALONE = 6


@dataclass(frozen=True)
class Headroom:
    """How often a layer's largest pre-activation can double before it overflows.

    Attributes:
      layers: in forward order; only those that were recorded.
      bits: float64 [layers, steps]; -inf where a value is not finite, inf where
        all are zero.
      of_one: bits of a value of 1: 128 in float32 and bfloat16, 16 in float16.
    """

    layers: tuple[str, ...]
    bits: np.ndarray
    of_one: float

    def absmax(self, bits: float) -> float:
        """The largest value that leaves these bits."""
        return 2.0 ** (self.of_one - bits)


@dataclass(frozen=True)
class StoryRow:
    """One step; numbers are None where they were not recorded.

    Attributes:
      headroom: bits, of the layer nearest to overflow or, in a stalled run, of the
        one whose signal is faintest; that is `layer`.
      absmax: that layer's largest pre-activation; NaN if it overflowed.
      remark: 'onset', 'not finite', both or ''.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    headroom: float | None
    absmax: float | None
    layer: str | None
    remark: str


def headroom(telemetry: Telemetry, facts: RunFacts) -> Headroom:
    """Headroom of every recorded layer and step, in the run's number format."""
    limit = math.log2(largest_activation(facts))
    recorded = {
        layer: values
        for layer in layer_names(telemetry)
        if (values := preactivation_absmax(telemetry, layer)) is not None
    }
    bits = np.full((len(recorded), len(telemetry.steps)), -math.inf)
    for row, values in enumerate(recorded.values()):
        finite = np.isfinite(values)
        with np.errstate(divide="ignore"):
            bits[row, finite] = limit - np.log2(values[finite])
    return Headroom(tuple(recorded), bits, limit)


def story(diagnosis: Diagnosis, telemetry: Telemetry, room: Headroom) -> list[StoryRow]:
    """The steps that tell what happened: the first, those around the onset, the last ones."""
    steps = telemetry.steps
    until = int(np.searchsorted(steps, diagnosis.step, side="right"))
    if until == 0:
        return []
    chosen = {0, *range(max(0, until - _LAST_STEPS), until)}
    if diagnosis.onset is not None:
        at = int(np.searchsorted(steps, diagnosis.onset.step))
        chosen |= {row for row in (at - 1, at, at + 1) if 0 <= row < until}
    return [_story_row(diagnosis, telemetry, room, row) for row in sorted(chosen)]


def _story_row(diagnosis: Diagnosis, telemetry: Telemetry, room: Headroom, row: int) -> StoryRow:
    step = int(telemetry.steps[row])
    loss, grad_norm = _value(telemetry, "loss", row), _value(telemetry, "grad_norm", row)
    bits, layer = _extreme(room, row, faintest=diagnosis.verdict == "stalled")
    seen = [value for value in (loss, grad_norm) if value is not None]
    overflowed = bits == -math.inf or not all(math.isfinite(value) for value in seen)
    first = diagnosis.first_nonfinite is not None and step == diagnosis.step
    onset = diagnosis.onset is not None and step == diagnosis.onset.step
    remarks = ["onset"] * onset + ["not finite"] * (overflowed or first)
    absmax = None if bits is None else math.nan if bits == -math.inf else room.absmax(bits)
    return StoryRow(step, loss, grad_norm, bits, absmax, layer, ", ".join(remarks))


def _extreme(room: Headroom, row: int, faintest: bool) -> tuple[float | None, str | None]:
    """The least headroom of a step, or the greatest, and its layer; None if not recorded."""
    if not room.layers:
        return None, None
    column = room.bits[:, row]
    at = int(np.argmax(column) if faintest else np.argmin(column))
    return float(column[at]), room.layers[at]


def _value(telemetry: Telemetry, name: str, row: int) -> float | None:
    column = scalar_column(telemetry, name)
    return None if column is None else float(column[row])


class Column(NamedTuple):
    """Neighbouring rows of the telemetry, first to last included, drawn as one column."""

    first: int
    last: int


def columns(telemetry: Telemetry, diagnosis: Diagnosis, most: int) -> list[Column]:
    """All rows in at most `most` columns.

    In a long run the first row, those around the onset and the failing step and the
    last ones keep a column each; the stretches between are grouped.

    Args:
      most: at least 80.
    """
    count = len(telemetry.steps)
    if count <= most:
        return [Column(row, row) for row in range(count)]
    alone = _rows_alone(telemetry, diagnosis)
    stretches = _stretches(alone, count)
    grouped = sum(last - first + 1 for first, last in stretches)
    size = math.ceil(grouped / (most - len(alone) - len(stretches)))
    chosen = [Column(row, row) for row in alone]
    for first, last in stretches:
        chosen += [
            Column(start, min(start + size - 1, last)) for start in range(first, last + 1, size)
        ]
    return sorted(chosen)


def _rows_alone(telemetry: Telemetry, diagnosis: Diagnosis) -> list[int]:
    count = len(telemetry.steps)
    alone = {0, *range(count - _LAST_ALONE, count)}
    marked = [diagnosis.step] + ([diagnosis.onset.step] if diagnosis.onset else [])
    for step in marked:
        at = int(np.searchsorted(telemetry.steps, step))
        alone |= set(range(at - _AROUND_ALONE, at + _AROUND_ALONE + 1))
    return sorted(row for row in alone if 0 <= row < count)


def _stretches(alone: list[int], count: int) -> list[tuple[int, int]]:
    """The runs of rows between those that stand alone."""
    borders = [*alone, count]
    return [
        (before + 1, after - 1)
        for before, after in itertools.pairwise(borders)
        if after - before > 1
    ]
