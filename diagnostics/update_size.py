"""How much an update changes a layer, where a run recorded only norms and the learning rate."""

from __future__ import annotations

import math

import numpy as np

from diagnostics.protocol import LayerFacts, RunFacts, Telemetry
from diagnostics.telemetry_view import layer_column, scalar_column

# Of these an update is about the rate for each weight, whatever the size of its gradient.
_ADAPTIVE = ("adam", "adamw", "nadam", "rmsprop")
_ZERO_RATE = ("adam", "adamw")  # where beta_2 is 1


def update_ratio(telemetry: Telemetry, facts: RunFacts, layer: str) -> np.ndarray | None:
    """Norm of a layer's update over that of its weights, float64 [steps].

    As recorded (the row of a step tells of the update before it); else what rate, gradient
    and optimizer let expect of SGD and of Adam's kind (of the update of that very step),
    which clipping may make smaller. None of other optimizers.
    """
    recorded = layer_column(telemetry, layer, "update_ratio")
    if recorded is not None:
        return recorded
    rate, weights, gradient = (
        scalar_column(telemetry, "lr"),
        layer_column(telemetry, layer, "weight_norm"),
        layer_column(telemetry, layer, "gradient_norm"),
    )
    if rate is None or weights is None or gradient is None:
        return None
    known = next((one for one in facts.layers if one.name == layer), None)
    step = _step_per_rate(gradient, facts, known)
    if step is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights > 0, np.abs(rate) * step / weights, np.nan)


def _step_per_rate(
    gradient: np.ndarray, facts: RunFacts, layer: LayerFacts | None
) -> np.ndarray | None:
    """Norm of an update of rate 1."""
    kind = facts.optimizer.lower()
    if kind == "sgd":
        return gradient / (1.0 - min(max(facts.momentum, 0.0), 0.99))
    if kind not in _ADAPTIVE or layer is None or not layer.fan_in or not layer.fan_out:
        return None
    if kind in _ZERO_RATE and facts.extra.get("beta_2") == "1":
        return np.zeros_like(gradient)  # Keras multiplies by the root of 1 - beta_2^t
    # No fewer than the weights that the layer has; each moves by the rate, or by less
    # where its gradient is below epsilon.
    most = math.sqrt(layer.fan_in * layer.fan_out)
    return np.minimum(most, gradient / max(facts.optimizer_epsilon or 0.0, 1e-30))
