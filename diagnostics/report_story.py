"""What a report shows of the telemetry: headroom by layer and step, and the steps that matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from diagnostics.diagnosis import Diagnosis
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.tensor_stats import largest_finite

LAST_STEPS = 5
_MAXIMUM, _MINIMUM = "/preactivation_max", "/preactivation_min"


@dataclass(frozen=True)
class Headroom:
    """Bits between the largest pre-activation and overflow.

    Attributes:
      layers: in forward order; only those that were recorded.
      bits: float64 [layers, steps]; -inf where a value is not finite, inf where
        all are zero.
      unit: bits of a value of 1, the middle of the scale (128 in float32).
    """

    layers: tuple[str, ...]
    bits: np.ndarray
    unit: float


@dataclass(frozen=True)
class StoryRow:
    """One step. headroom in bits is the least of all layers, in `layer`.

    Attributes:
      mark: 'onset', 'failed' or ''.
      gap: steps left out before this one.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    headroom: float | None
    layer: str | None
    mark: str
    gap: int


def headroom(telemetry: Telemetry, facts: RunFacts) -> Headroom:
    """Headroom of every recorded layer and step, in the run's number format."""
    limit = math.log2(largest_finite(_dtype(facts.precision)))
    layers = _layers(telemetry, facts)
    bits = np.full((len(layers), len(telemetry.steps)), np.nan)
    for row, layer in enumerate(layers):
        extremes = [telemetry.column(layer + kind) for kind in (_MAXIMUM, _MINIMUM)]
        largest = np.max([np.abs(column) for column in extremes if column is not None], axis=0)
        with np.errstate(divide="ignore"):
            bits[row] = limit - np.log2(largest.astype(np.float64))
        bits[row, ~np.isfinite(largest)] = -math.inf
    return Headroom(layers, bits, limit)


def _dtype(precision: str) -> np.dtype:
    known = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
    return known.get(precision.removeprefix("mixed_"), np.dtype(np.float32))


def _layers(telemetry: Telemetry, facts: RunFacts) -> tuple[str, ...]:
    recorded = {
        name.removesuffix(kind): None
        for name in telemetry.columns
        for kind in (_MAXIMUM, _MINIMUM)
        if name.endswith(kind)
    }
    known = [layer.name for layer in facts.layers if layer.name in recorded]
    return (*known, *(name for name in recorded if name not in known))


def story(diagnosis: Diagnosis, telemetry: Telemetry, facts: RunFacts) -> list[StoryRow]:
    """The steps that tell what happened: the first, those around the onset, the last ones."""
    steps = telemetry.steps
    until = int(np.searchsorted(steps, diagnosis.step, side="right"))
    if until == 0:
        return []
    chosen = {0, *range(max(0, until - LAST_STEPS), until)}
    onset = diagnosis.onset.step if diagnosis.onset else None
    if onset is not None:
        at = int(np.searchsorted(steps, onset))
        chosen |= {row for row in (at - 1, at, at + 1) if 0 <= row < until}
    room = headroom(telemetry, facts)
    rows: list[StoryRow] = []
    before = -1
    for row in sorted(chosen):
        rows.append(_story_row(diagnosis, telemetry, room, row, row - before - 1))
        before = row
    return rows


def _story_row(
    diagnosis: Diagnosis, telemetry: Telemetry, room: Headroom, row: int, gap: int
) -> StoryRow:
    step = int(telemetry.steps[row])
    failed = step == diagnosis.step and diagnosis.verdict not in ("stalled", "diverged")
    is_onset = diagnosis.onset is not None and step == diagnosis.onset.step
    least = int(np.argmin(room.bits[:, row])) if room.layers else None
    return StoryRow(
        step=step,
        loss=_value(telemetry, "loss", row),
        grad_norm=_value(telemetry, "grad_norm", row),
        headroom=None if least is None else float(room.bits[least, row]),
        layer=None if least is None else room.layers[least],
        mark="failed" if failed else "onset" if is_onset else "",
        gap=gap,
    )


def _value(telemetry: Telemetry, name: str, row: int) -> float | None:
    column = telemetry.column(name)
    return None if column is None else float(column[row])
