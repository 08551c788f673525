"""The net as a Keras model, and its weights as a `.weights.h5` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from vggrepro.model import (
    FlattenLayer,
    Network,
    PoolLayer,
    ResponseNormalization,
    WeightLayer,
)


def keras_model(network: Network) -> keras.Model:
    """The net for inference, with softmax at the end and `keras.applications` names.

    Its input is RGB with the training set's mean subtracted, unscaled; the
    layers with weights come in the order of `keras.applications.VGG16` and 19.
    """
    side = network.image_size
    values = inputs = keras.Input((side, side, 3))
    for layer in network.layers:
        values = _keras_layer(layer)(values)
    return keras.Model(inputs, values, name="vgg_" + network.arch.lower().replace("-", "_"))


def _keras_layer(layer: object) -> keras.layers.Layer:
    if isinstance(layer, WeightLayer):
        activation = "relu" if layer.relu else "softmax"
        units = layer.kernel_shape[-1]
        if not layer.is_convolution:
            return keras.layers.Dense(units, activation, name=layer.name)
        kernel = layer.kernel_shape[0]
        return keras.layers.Conv2D(
            units, kernel, padding="same", activation=activation, name=layer.name
        )
    if isinstance(layer, PoolLayer):
        return keras.layers.MaxPooling2D(2, 2, name=layer.name)
    if isinstance(layer, ResponseNormalization):
        return keras.layers.Lambda(
            lambda values: tf.nn.local_response_normalization(values, 2, 2.0, 1e-4, 0.75),
            name=layer.name,
        )
    assert isinstance(layer, FlattenLayer)
    return keras.layers.Flatten(name=layer.name)


def save_weights(network: Network, parameters: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes `path` (ending in .weights.h5) under a temporary name, then renames it.

    Args:
      parameters: '<layer>/kernel' and '<layer>/bias'.
    """
    model = keras_model(network)
    for layer in network.weight_layers:
        model.get_layer(layer.name).set_weights(
            [parameters[f"{layer.name}/kernel"], parameters[f"{layer.name}/bias"]]
        )
    temporary = path.with_name(f".{path.name.removesuffix('.weights.h5')}.tmp.weights.h5")
    model.save_weights(temporary)
    temporary.replace(path)
