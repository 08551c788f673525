"""How much the initial weights of each layer multiply a signal."""

from __future__ import annotations

import math
from typing import NamedTuple

from diagnostics.evidence import Evidence
from diagnostics.protocol import LayerFacts
from diagnostics.tensor_stats import TensorStats

_BOUNDED = {"tanh", "sigmoid", "hard_sigmoid", "softmax", "softsign", "hard_tanh"}
_LINEAR = {None, "", "linear"}
_ACTIVATION_LAYERS = {
    "ReLU": "relu",
    "LeakyReLU": "leaky_relu",
    "PReLU": "relu",
    "ELU": "elu",
    "Softmax": "softmax",
}


class LayerGain(NamedTuple):
    """How much the initial weights of a layer multiply the RMS of their input.

    Attributes:
      std: root mean square of the initial kernel.
      gain: sqrt(fan_in * std^2 / 2) before a ReLU-like activation, sqrt(fan_in)
        * std before a linear one; fan_in * std where all weights have one sign,
        because their contributions then add up instead of cancelling.
      formula: of the gain, with its numbers.
      bits: log2(gain) in an unbounded layer, 0 where the activation is bounded.
      resets: whether a bounded activation or a normalisation follows.
    """

    name: str
    fan_in: int
    std: float
    gain: float
    formula: str
    bits: float
    resets: bool


def layer_gains(evidence: Evidence) -> list[LayerGain]:
    """The gain of every weight layer at step 0, in forward order.

    Empty if the initial weights are not known. Layers of zeros are left out.
    """
    layers = evidence.facts.layers
    found = []
    for index, layer in enumerate(layers):
        stats = evidence.initial_weight_stats.get(layer.weight or "")
        if stats is None or not layer.fan_in or stats.rms == 0 or layer.kind == "Embedding":
            continue
        activation, normalised = _what_follows(layers, index)
        gain, formula = _gain(stats, layer.fan_in, activation)
        resets = normalised or activation in _BOUNDED
        bits = 0.0 if resets else math.log2(gain)
        found.append(LayerGain(layer.name, layer.fan_in, stats.rms, gain, formula, bits, resets))
    return found


def _gain(stats: TensorStats, fan_in: int, activation: str | None) -> tuple[float, str]:
    """(gain, its formula) of a kernel; see `LayerGain`."""
    if stats.minimum >= 0 or stats.maximum <= 0:
        return fan_in * stats.rms, f"fan-in {fan_in:,} x {stats.rms:.3g}, as all have one sign"
    square = f"fan-in {fan_in:,} x {stats.rms:.3g}^2"
    if activation in _LINEAR or activation in _BOUNDED:
        return math.sqrt(fan_in) * stats.rms, f"sqrt({square})"
    return math.sqrt(fan_in / 2) * stats.rms, f"sqrt({square} / 2)"


def _what_follows(layers: tuple[LayerFacts, ...], index: int) -> tuple[str | None, bool]:
    """(activation after a layer's kernel, whether a normalisation comes before the next)."""
    activation, normalised = layers[index].activation, False
    for layer in layers[index + 1 :]:
        if layer.fan_in:
            break
        normalised = normalised or "Normalization" in layer.kind
        if activation in _LINEAR:
            activation = layer.activation or _ACTIVATION_LAYERS.get(layer.kind)
    return activation, normalised


def gain_bits(gains: list[LayerGain]) -> tuple[float, float]:
    """(largest, smallest) sum of log2(gain) from an unscaled signal to a later layer.

    A bounded activation or a normalisation starts the count anew.
    """
    largest = smallest = total = 0.0
    for layer in gains:
        total = 0.0 if layer.resets else total + layer.bits
        largest, smallest = max(largest, total), min(smallest, total)
    return largest, smallest
