"""What an initialiser does to signal and gradient, before any step.

The analytic model follows second moments through a chain of convolutions and
dense layers (He et al. 2015, section 2.2, and Glorot & Bengio 2010), with what
those leave out where it matters over many layers:

- forward: E[z^2] = fan_in * inside * std^2 * E[x^2], where `inside` is the share of
  kernel taps that fall on the map and not on the zero padding;
- ReLU: E[x^2] = E[z^2] / 2, as z is symmetric over the draw of the weights;
- 2x2 max pooling raises E[x^2], the more the less neighbours agree: to E[max(0, M)^2],
  M the maximum of four normals with correlation c (`pooling_gain`);
- the correlation c = E[x x'] / E[x^2] of neighbours: a convolution with random weights
  keeps it (times `shared` where padding parts neighbours), a ReLU raises it (the
  arc-cosine kernel of Cho & Saul 2009, n = 1), a pooling lowers it (to c^1.5, fitted:
  measured on photographs, c stays between 0.95 and 0.98 through VGG-A at 224 pixels);
- backward: E[dx^2] = fan_out * inside * std^2 * E[dz^2], halved by every ReLU and
  quartered by every pooling; a kernel's gradient sums positions as if they were
  independent, which is rough (a factor of a few).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.report_words import number

# Of mean-subtracted photographs in grey levels; measured on 224-pixel crops.
PHOTOGRAPH_RMS = 63.0
PHOTOGRAPH_CORRELATION = 0.97
# Logits RMS. Above: softmax saturates, the first gradients throw the weights away (He's
# initialiser on +-128 pixels gives 164 and dies at step 2). Below: the loss stays at
# ln(classes) (sigma = 0.01 gives VGG-A 7.5e-4, which the paper trained, and VGG-B 2.5e-5,
# which it could not).
EXPLODES_ABOVE = 30.0
VANISHES_BELOW = 1e-4
# The largest of some million roughly normal numbers, in standard deviations.
_PEAK = 5.0
_POOLING_EXPONENT = 1.5


@dataclass(frozen=True)
class ChainLayer:
    """One weight layer of a chain.

    Attributes:
      fan_in, fan_out: inputs of a unit; units that an input reaches.
      std: standard deviation of the initial kernel.
      relu: whether a ReLU follows.
      positions: outputs of one kernel for one example (height * width; 1 if dense).
      inside: share of kernel taps on the map, not on its padding; 1 if dense.
      shared: what padding leaves of the correlation of neighbours; 1 if dense.
      pool: whether a 2x2 max pooling follows the ReLU.
      rescale: what a response normalisation after the ReLU makes of E[x^2].
    """

    name: str
    fan_in: int
    fan_out: int
    std: float
    relu: bool = True
    positions: int = 1
    inside: float = 1.0
    shared: float = 1.0
    pool: bool = False
    rescale: Callable[[float], float] | None = None


@dataclass(frozen=True)
class LayerScale:
    """Root mean squares at step 0: of the pre-activations and of the kernel's gradient."""

    name: str
    forward_rms: float
    gradient_rms: float


@dataclass(frozen=True)
class Forecast:
    """What to expect of an initialiser.

    Attributes:
      init: its name. verdict: 'explodes', 'vanishes' or 'fine'.
      layers: in forward order; the last one makes the logits.
      reason: one clause with the number that decides.
    """

    init: str
    verdict: str
    layers: tuple[LayerScale, ...]
    reason: str

    @property
    def logits_rms(self) -> float:
        """RMS of the last layer's output."""
        return self.layers[-1].forward_rms

    def line(self) -> str:
        """One line for the start of a training."""
        return f"forecast for init {self.init}: {self.verdict} ({self.reason})"


def propagate(
    chain: Sequence[ChainLayer],
    *,
    input_rms: float,
    correlation: float = PHOTOGRAPH_CORRELATION,
    classes: int,
    batch_size: int,
) -> tuple[LayerScale, ...]:
    """The analytic forecast of every layer.

    Args:
      input_rms: root mean square of the input as fed to the first layer.
      correlation: of neighbouring input pixels, E[x x'] / E[x^2].
      classes, batch_size: the loss is the batch's mean softmax cross-entropy.
    """
    inputs, signals = [], []
    moment = input_rms**2
    for layer in chain:
        inputs.append(moment)
        signal = layer.fan_in * layer.inside * layer.std**2 * moment
        signals.append(signal)
        moment = signal / 2 if layer.relu else signal
        if layer.rescale is not None:
            moment = layer.rescale(moment)
        correlation *= layer.shared
        if layer.pool:
            moment *= pooling_gain(correlation)
        if layer.relu:
            correlation = after_relu(correlation)
        if layer.pool:
            correlation **= _POOLING_EXPONENT
    gradients = _gradients(chain, inputs, signals[-1], classes, batch_size)
    return tuple(
        LayerScale(layer.name, math.sqrt(signal), math.sqrt(gradient))
        for layer, signal, gradient in zip(chain, signals, gradients, strict=True)
    )


def _gradients(
    chain: Sequence[ChainLayer],
    inputs: Sequence[float],
    logits: float,
    classes: int,
    batch_size: int,
) -> list[float]:
    """Mean square of every kernel's gradient, from the second moments of its inputs."""
    moment = _softmax_gradient(logits, classes, batch_size)
    found: list[float] = []
    for index in range(len(chain) - 1, -1, -1):
        layer = chain[index]
        if layer.relu:
            moment /= 2
        if layer.pool:
            moment /= 4
        found.append(layer.positions * inputs[index] * moment)
        moment *= layer.fan_out * layer.inside * layer.std**2
        before = chain[index - 1] if index else None
        if before is not None and before.rescale is not None:
            moment *= before.rescale(inputs[index]) / max(inputs[index], 1e-300)
    return found[::-1]


def _softmax_gradient(logits: float, classes: int, batch_size: int) -> float:
    """Mean square of the batch's mean of softmax minus one-hot, from the mean square logit.

    An untrained net answers nearly the same to every input, so the softmax parts of the
    examples add up, while the labels are independent. The softmax is uniform for small
    logits (sum of squares 1/classes) and one-hot for large ones.
    """
    concentration = min(1.0, math.exp(min(logits, 50.0)) / classes)
    labels = (1.0 - 1.0 / classes) / batch_size
    return (concentration - 1.0 / classes + labels) / classes


def pooling_gain(correlation: float) -> float:
    """E[max(0, M)^2] over its value for one: how much 2x2 max pooling raises E[x^2].

    M is the maximum of four standard normals with equal pairwise correlation
    z_i = sqrt(c) g + sqrt(1-c) e_i. 1 for c = 1, 3.1 for c = 0.
    """
    common = math.sqrt(min(max(correlation, 0.0), 1.0))
    own = math.sqrt(1.0 - common**2)
    if own == 0:
        return 1.0
    grid = np.linspace(-8.0, 8.0, 321)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (grid[1] - grid[0])
    largest = 4 * below**3 * density  # density of the maximum of four independent ones
    largest /= largest.sum()
    value = common * grid[:, None] + own * grid[None, :]
    mean_square = np.maximum(value, 0.0) ** 2 @ largest
    return float(2 * (mean_square * density).sum() / density.sum())


def after_relu(correlation: float) -> float:
    """Correlation E[x x'] / E[x^2] after a ReLU of normals with that correlation."""
    c = min(max(correlation, -1.0), 1.0)
    return (math.sqrt(1.0 - c * c) + c * (math.pi - math.acos(c))) / math.pi


def taps_shared(side: int, kernel: int) -> float:
    """What padding leaves of the correlation of neighbouring outputs.

    Two neighbours agree as far as they see the same pixels through the same taps. That
    is the mean number of taps of one axis that are on the map for both, over the mean
    number for one; 1 for a 1x1 kernel, 0.5 on a 2x2 map with a 3x3 kernel.
    """
    if side < 2:
        return 0.0 if kernel > 1 else 1.0
    pairs = [_taps(p, p + 1, side, kernel) for p in range(side - 1)]
    singles = [_taps(p, p, side, kernel) for p in range(side)]
    return (sum(pairs) / len(pairs)) / (sum(singles) / len(singles))


def _taps(first: int, last: int, side: int, kernel: int) -> int:
    """Taps of one axis that are on the map for every position from first to last."""
    reach = (kernel - 1) // 2
    return min(reach, side - 1 - last) + min(reach, first) + 1


def taps_inside(side: int, kernel: int) -> float:
    """Share of the taps of a `kernel` x `kernel` 'same' convolution that are on the map."""
    taps = sum(_taps(position, position, side, kernel) for position in range(side))
    return (taps / (side * kernel)) ** 2


def judge_scales(
    init: str, layers: Sequence[LayerScale], *, largest: float = 3.4028235e38
) -> Forecast:
    """Adds the verdict.

    Args:
      largest: the largest finite number of the activations' type.
    """
    logits = layers[-1].forward_rms
    highest = max(layers, key=lambda layer: layer.forward_rms)
    if not logits <= EXPLODES_ABOVE:
        verdict = "explodes"
        reason = f"logits RMS {number(logits)}, above {EXPLODES_ABOVE:g}"
    elif highest.forward_rms * _PEAK > largest:
        verdict = "explodes"
        reason = f"{highest.name} RMS {number(highest.forward_rms)} overflows {number(largest)}"
    elif logits < VANISHES_BELOW:
        verdict = "vanishes"
        reason = f"logits RMS {number(logits)}, below {number(VANISHES_BELOW)}"
    else:
        verdict, reason = "fine", f"logits RMS {number(logits)}"
    return Forecast(init, verdict, tuple(layers), reason)


def measured_scales(
    names: Sequence[str], measure: Callable[[], tuple[Mapping[str, float], Mapping[str, float]]]
) -> tuple[LayerScale, ...]:
    """The same numbers from a real batch.

    Args:
      names: layers in forward order.
      measure: runs the batch; returns the RMS of every pre-activation and of every
        kernel gradient by layer.
    """
    forward, gradients = measure()
    return tuple(LayerScale(name, forward[name], gradients[name]) for name in names)
