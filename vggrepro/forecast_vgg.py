"""The forecast for a VGG net: its layers as a chain, and the measurement on a batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from diagnostics.forecast import (
    PHOTOGRAPH_CORRELATION,
    PHOTOGRAPH_RMS,
    ChainLayer,
    Forecast,
    judge_scales,
    measured_scales,
    propagate,
    taps_inside,
    taps_shared,
)
from vggrepro.config import TrainConfig
from vggrepro.initializers import initial_parameters, standard_deviation
from vggrepro.model import Network, PoolLayer, ResponseNormalization, WeightLayer, forward
from vggrepro.step_core import cross_entropy


def chain_of(network: Network, init: str) -> tuple[ChainLayer, ...]:
    """The weight layers with what follows each."""
    sides = {name: shape[0] for name, shape in network.output_shapes().items() if len(shape) == 3}
    chain = []
    for index, layer in enumerate(network.layers):
        if not isinstance(layer, WeightLayer):
            continue
        behind = []
        for other in network.layers[index + 1 :]:
            if isinstance(other, WeightLayer):
                break
            behind.append(other)
        side, kernel = sides.get(layer.name, 1), layer.kernel_shape[0]
        dense = not layer.is_convolution
        normalised = any(isinstance(other, ResponseNormalization) for other in behind)
        chain.append(
            ChainLayer(
                name=layer.name,
                fan_in=layer.fan_in,
                fan_out=layer.fan_out,
                std=standard_deviation(layer, init),
                relu=layer.relu,
                positions=side**2,
                inside=1.0 if dense else taps_inside(side, kernel),
                shared=1.0 if dense else taps_shared(side, kernel),
                pool=any(isinstance(other, PoolLayer) for other in behind),
                rescale=_normalised_moment if normalised else None,
            )
        )
    return tuple(chain)


def _normalised_moment(moment: float) -> float:
    """E[x^2] after LRN, as if every map had the mean square: x / (2 + 1e-4 * 5 x^2)^0.75."""
    return moment / (2.0 + 5e-4 * moment) ** 1.5


def analytic_forecast(
    network: Network,
    init: str,
    *,
    input_rms: float = PHOTOGRAPH_RMS,
    correlation: float = PHOTOGRAPH_CORRELATION,
    batch_size: int = 1,
    precision: str = "float32",
) -> Forecast:
    """The forecast without running anything; see `diagnostics.forecast`."""
    scales = propagate(
        chain_of(network, init),
        input_rms=input_rms,
        correlation=correlation,
        classes=network.classes,
        batch_size=batch_size,
    )
    return judge_scales(init, scales, largest=float(tf.as_dtype(precision).max))


def check_before_training(
    config: TrainConfig,
    network: Network,
    input_rms: float,
    correlation: float = PHOTOGRAPH_CORRELATION,
) -> Forecast:
    """The analytic forecast of a run that is about to start; microseconds.

    Args:
      input_rms, correlation: as `image_scales` gives them for a first batch.
    """
    return analytic_forecast(
        network,
        config.init,
        input_rms=input_rms,
        correlation=correlation,
        batch_size=config.batch_size,
        precision=config.precision,
    )


def measured_forecast(
    network: Network,
    init: str,
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    inherited: Mapping[str, np.ndarray] | None = None,
) -> Forecast:
    """The forecast from one forward and backward pass on a batch, without dropout.

    Args:
      images: float32 [N, side, side, 3], mean subtracted. labels: int32 [N].
      inherited: parameters that are not drawn.
    """
    initial = {**initial_parameters(network, init, seed), **(inherited or {})}
    parameters = {name: tf.constant(value) for name, value in initial.items()}

    def measure() -> tuple[Mapping[str, float], Mapping[str, float]]:
        seen: dict[str, float] = {}
        with tf.GradientTape() as tape:
            tape.watch(list(parameters.values()))
            logits = forward(
                network,
                parameters,
                tf.constant(images),
                observe=lambda layer, values: seen.update({layer: _rms(values)}),
            )
            loss, _ = cross_entropy(logits, tf.constant(labels), network.classes, len(labels))
        kernels = {n: p for n, p in parameters.items() if n.endswith("/kernel")}
        gradients = tape.gradient(loss, kernels)
        return seen, {name.rpartition("/")[0]: _rms(value) for name, value in gradients.items()}

    names = [layer.name for layer in network.weight_layers]
    return judge_scales(init, measured_scales(names, measure))


def _rms(values: tf.Tensor) -> float:
    """Root mean square, scaled by the maximum so that squares do not overflow."""
    largest = tf.reduce_max(tf.abs(values))
    scale = tf.where(largest > 0, largest, 1.0)
    return float(scale * tf.sqrt(tf.reduce_mean(tf.square(values / scale))))


def image_scales(images: np.ndarray) -> tuple[float, float]:
    """(RMS, correlation of neighbouring pixels) of a batch [N, side, side, 3]."""
    values = images.astype(np.float64)
    power = float(np.mean(values**2))
    beside = float(np.mean(values[:, :, 1:] * values[:, :, :-1]))
    below = float(np.mean(values[:, 1:] * values[:, :-1]))
    return float(np.sqrt(power)), (beside + below) / (2 * power) if power else 1.0
