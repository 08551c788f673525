"""Where the trouble began: since which step, in which layer, at what growth.

Works on the recorded telemetry alone. Every quantity is looked at in bits
(log2), because a loss of headroom is a straight line there.

Three shapes are told apart:
- a bad start: already the first recorded step amplifies its input a thousandfold
  or has gradients beyond 1e6, and the run never recovers; the onset is that step;
- a trend: a quantity leaves its usual level and never comes back; the onset is
  the step from which it rises;
- a sudden event: everything is normal until the failing step itself (a poisoned
  example, a label out of range, a division by zero). Nothing was being lost
  before, and the onset is None. The exception: weights that entered the failing
  step already thrown away. The step before wrote them, and it is the onset; if no
  update explains them (they were overwritten), the step that they entered is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diagnostics.diagnosis import Onset
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.stall import detect_divergence
from diagnostics.telemetry_view import (
    LARGEST_FLOAT32,
    input_absmax,
    largest_activation,
    layer_column,
    layer_names,
    overwritten,
    scalar_column,
)
from diagnostics.update_size import update_ratio

AMPLIFIED = 1e3  # largest pre-activation over largest input of a healthy first step: about 1
HUGE_GRADIENT = 1e6
_SMALLEST_RISE = 4.0  # bits
_SMALLEST_WEIGHT_RISE = 3.0
_JUMP = 8.0  # bits in one step
_OUT_OF_THE_BLUE = 32.0  # the same
_SMALL_UPDATE = 0.1
_TINIEST = 2.0**-149


class _Series(NamedTuple):
    layer: str | None
    quantity: str
    values: np.ndarray  # float64 [steps]
    limit: float


class _Rise(NamedTuple):
    series: _Series
    first: int  # row
    step: int
    bits: float  # gained until the last row
    since: int | None = None  # row it is compared with, if not followed from `first` to the end


def find_onset(telemetry: Telemetry, facts: RunFacts) -> Onset | None:
    """The onset of a run that ended badly.

    Returns:
      None if the run is in no trouble (its last step is finite and its loss did
      not run away), if only one step was recorded, or if the last step came out
      of the blue (see above).
    """
    if telemetry.steps.size < 2 or not _in_trouble(telemetry, facts):
        return None
    series = list(_all_series(telemetry, facts))
    bad_start = _bad_start(telemetry, series)
    if bad_start is not None:
        return _as_onset(bad_start)
    found = (_rise(one, telemetry, facts) for one in series)
    rises = [rise for rise in found if rise is not None]
    if not rises:
        return None
    # What overwritten weights do in their step is not the beginning: they are.
    return _as_onset(min(rises, key=lambda rise: (rise.step, rise.since is None, -rise.bits)))


def _in_trouble(telemetry: Telemetry, facts: RunFacts) -> bool:
    if not np.isfinite(telemetry.rows[-1]).all():
        return True
    gradient = scalar_column(telemetry, "grad_norm")
    if gradient is not None and gradient[-1] > HUGE_GRADIENT:
        return True
    return detect_divergence(telemetry, facts) is not None


def _all_series(telemetry: Telemetry, facts: RunFacts) -> Iterator[_Series]:
    for quantity, limit in (
        ("preactivation_absmax", largest_activation(facts)),
        ("gradient_norm", LARGEST_FLOAT32),
        ("weight_norm", LARGEST_FLOAT32),
    ):
        for layer in layer_names(telemetry):
            values = layer_column(telemetry, layer, quantity)
            if values is not None:
                yield _Series(layer, quantity, values, limit)
    for name in ("grad_norm", "loss"):
        values = scalar_column(telemetry, name)
        if values is not None:
            yield _Series(None, name, np.abs(values), LARGEST_FLOAT32)


def _bits(series: _Series) -> np.ndarray:
    values = np.where(np.isfinite(series.values), series.values, series.limit)
    return np.log2(np.clip(values, _TINIEST, series.limit))


def _bad_start(telemetry: Telemetry, series: list[_Series]) -> _Rise | None:
    """The worst quantity of the first row, if it is absurd and stays so."""
    inputs = input_absmax(telemetry)
    scale = max(1.0, inputs[0]) if inputs is not None and np.isfinite(inputs[0]) else 1.0
    limits = {"preactivation_absmax": AMPLIFIED * scale, "gradient_norm": HUGE_GRADIENT}
    absurd = [
        one
        for one in series
        if one.quantity in limits
        and np.isfinite(one.values[0])
        and bool((~(one.values < limits[one.quantity])).all())
    ]
    if not absurd:
        return None
    worst = max(absurd, key=lambda one: one.values[0] / limits[one.quantity])
    bits = _bits(worst)
    return _Rise(worst, 0, int(telemetry.steps[0]), float(bits[-1] - bits[0]))


def _rise(series: _Series, telemetry: Telemetry, facts: RunFacts) -> _Rise | None:
    """The last rise of one quantity, if it goes on until the end."""
    bits = _bits(series)
    last, lowest = bits.size - 1, float(bits.min())
    gained = float(bits[-1]) - lowest
    weights = series.quantity == "weight_norm"
    if gained < (_SMALLEST_WEIGHT_RISE if weights else _SMALLEST_RISE):
        return None
    settled = bits[: int(np.flatnonzero(bits <= lowest + 0.1 * gained)[-1]) + 1]
    usual = float(np.median(settled))
    # Three standard deviations of the settled part, and never less than a doubling.
    tolerance = max(1.0, 3 * 1.4826 * float(np.median(np.abs(settled - usual))))
    calm = np.flatnonzero(bits <= usual + tolerance)
    start = int(calm[-1]) if calm.size else 0
    if start == last:
        return None
    if not weights and (start == last - 1 or _sudden(bits, usual)):
        return None
    if weights and overwritten(telemetry, series.layer or "", start + 1):
        steps = int(telemetry.steps[start + 1])
        return _Rise(series, start + 1, steps, float(bits[last] - bits[start]), since=start)
    if start == last - 1:
        return _Rise(series, start, int(telemetry.steps[start]), float(bits[last] - bits[start]))
    jumped = series.quantity != "weight_norm" and bits[start + 1] - bits[start] >= _JUMP
    if jumped and _came_with_its_batch(telemetry, facts, start + 1):
        return _Rise(series, start + 1, int(telemetry.steps[start + 1]), float(bits[-1]) - usual)
    # The rise had begun before it left the tolerance: follow its slope back.
    slope = (float(bits[-1]) - float(bits[start])) / (last - start)
    first = max(0, start - int(tolerance / slope))
    return _Rise(series, first, int(telemetry.steps[first]), float(bits[-1] - bits[first]))


def _sudden(bits: np.ndarray, usual: float) -> bool:
    """Whether next to nothing was lost before the last row, and all the rest in it."""
    return bits[-1] - bits[-2] > _OUT_OF_THE_BLUE and bits[-2] - usual < _SMALLEST_RISE


def _came_with_its_batch(telemetry: Telemetry, facts: RunFacts, row: int) -> bool:
    """Whether the weights had hardly changed since the row before.

    Then that row's own batch made a quantity jump, not an update before it.
    """
    ratios = []
    for layer in layer_names(telemetry):
        ratio = update_ratio(telemetry, facts, layer)
        if ratio is not None:
            told = layer_column(telemetry, layer, "update_ratio") is not None
            ratios.append(ratio[row] if told else ratio[row - 1])
    return bool(ratios) and max(ratios) < _SMALL_UPDATE


def _as_onset(rise: _Rise) -> Onset:
    series, bits = rise.series, _bits(rise.series)
    if rise.since is not None:
        start, end = rise.since, rise.first
    else:
        start = rise.first
        overflowed = np.flatnonzero(~np.isfinite(series.values[start + 1 :]))
        end = start + 1 + int(overflowed[0]) if overflowed.size else bits.size - 1
    growth = 2.0 ** ((float(bits[end]) - float(bits[start])) / (end - start))
    value = float(series.values[rise.first])
    return Onset(rise.step, series.layer, series.quantity, value, growth)
