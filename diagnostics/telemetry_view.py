"""Series of one quantity over the recorded steps, whichever columns were recorded."""

from __future__ import annotations

import numpy as np

from diagnostics.protocol import RunFacts, Telemetry

LARGEST_FLOAT32 = 3.4028235e38
LARGEST_FLOAT16 = 65504.0
OVERWRITTEN = 8.0  # times the weights of the step before, with no update of that size


def layer_names(telemetry: Telemetry) -> tuple[str, ...]:
    """Layers with per-layer columns, in the order of their first column."""
    names = (column.rpartition("/")[0] for column in telemetry.columns if "/" in column)
    return tuple(dict.fromkeys(names))


def preactivation_absmax(telemetry: Telemetry, layer: str) -> np.ndarray | None:
    """Largest absolute pre-activation of a layer, float64 [steps]; NaN stays NaN."""
    return _absmax(telemetry, f"{layer}/preactivation_max", f"{layer}/preactivation_min")


def input_absmax(telemetry: Telemetry) -> np.ndarray | None:
    """Largest absolute input number, float64 [steps]."""
    return _absmax(telemetry, "input_max", "input_min")


def layer_column(telemetry: Telemetry, layer: str, quantity: str) -> np.ndarray | None:
    """`<layer>/<quantity>` as float64 [steps]; also understands 'preactivation_absmax'."""
    if quantity == "preactivation_absmax":
        return preactivation_absmax(telemetry, layer)
    column = telemetry.column(f"{layer}/{quantity}")
    return None if column is None else column.astype(np.float64)


def preactivations_of_row(telemetry: Telemetry, row: int) -> dict[str, float]:
    """Largest absolute pre-activation by layer, in forward order, of one recorded row."""
    found = {}
    for layer in layer_names(telemetry):
        values = preactivation_absmax(telemetry, layer)
        if values is not None:
            found[layer] = float(values[row])
    return found


def scalar_column(telemetry: Telemetry, name: str) -> np.ndarray | None:
    """A column of the whole step as float64 [steps]."""
    column = telemetry.column(name)
    return None if column is None else column.astype(np.float64)


def overwritten(telemetry: Telemetry, layer: str, row: int) -> bool:
    """Whether the weights that entered a row's step are not what the update before it made.

    An update that is not finite is refused, so weights that are NaN were written by
    something else. An infinite norm may belong to finite weights.
    """
    norms = layer_column(telemetry, layer, "weight_norm")
    ratios = layer_column(telemetry, layer, "update_ratio")
    if norms is None or row == 0:
        return False
    if not np.isfinite(norms[row]):
        return bool(np.isnan(norms[row]))
    grown = norms[row] > OVERWRITTEN * norms[row - 1] > 0
    return ratios is not None and bool(grown and ratios[row] < 0.5)


def is_half(precision: str) -> bool:
    """Whether activations are float16, as in 'float16' and 'mixed_float16'."""
    return precision.rpartition("_")[2] == "float16"


def largest_activation(facts: RunFacts) -> float:
    """The largest finite number that an activation of this run can hold."""
    return LARGEST_FLOAT16 if is_half(facts.precision) else LARGEST_FLOAT32


def _absmax(telemetry: Telemetry, upper: str, lower: str) -> np.ndarray | None:
    maximum, minimum = telemetry.column(upper), telemetry.column(lower)
    if maximum is None or minimum is None:
        return None
    return np.maximum(np.abs(maximum.astype(np.float64)), np.abs(minimum.astype(np.float64)))
