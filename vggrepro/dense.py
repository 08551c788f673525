"""The dense form: the fully connected layers as convolutions over the whole image.

Paper section 3.2: the first one becomes a 7x7, the others 1x1 convolutions; the class
score map that comes out is averaged over its positions before the softmax, and the
posteriors of the image and its mirror image are averaged. Maps are not padded there: a
position of the score map sees one 7x7 window of the last pooling map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import tensorflow as tf

from vggrepro.model import FlattenLayer, Network, PoolLayer, forward


def with_pools_rounding_up(network: Network) -> Network:
    """The net with Caffe's pooling, which keeps odd last rows and columns."""
    layers = (
        dataclasses.replace(layer, round_up=True) if isinstance(layer, PoolLayer) else layer
        for layer in network.layers
    )
    return dataclasses.replace(network, layers=tuple(layers))


def score_map(
    network: Network, parameters: Mapping[str, tf.Tensor], images: tf.Tensor
) -> tf.Tensor:
    """Class scores at every position of the fully connected layers' window.

    Args:
      images: [N, H, W, 3] of the compute type, RGB minus the mean; H and W are at least
        the net's image size.

    Returns:
      float32 [N, h, w, classes]; h = H // 32 - image_size // 32 + 1, w likewise (with
      pools that round up one more where H is no multiple of 32).
    """
    flatten = next(i for i, layer in enumerate(network.layers) if isinstance(layer, FlattenLayer))
    convolutions = dataclasses.replace(network, layers=network.layers[:flatten])
    values = tf.cast(forward(convolutions, parameters, images), images.dtype)
    window = network.image_size // 32
    for layer in network.weight_layers[-3:]:
        with tf.name_scope(layer.name):
            inputs, outputs = layer.kernel_shape
            # Rows, columns, channels: the order in which the net flattens its maps.
            shape = [window, window, inputs // window**2, outputs]
            kernel = tf.reshape(parameters[f"{layer.name}/kernel"], shape)
            values = tf.nn.conv2d(values, tf.cast(kernel, values.dtype), 1, "VALID")
            bias = tf.cast(parameters[f"{layer.name}/bias"], values.dtype)
            values = tf.nn.bias_add(values, bias)
            values = tf.nn.relu(values) if layer.relu else values
        window = 1
    return tf.cast(values, tf.float32)


def dense_log_posteriors(
    network: Network, parameters: Mapping[str, tf.Tensor], images: tf.Tensor
) -> tf.Tensor:
    """Logarithms of the averaged posteriors of images and mirror images; float32 [N, classes]."""
    both = [
        tf.nn.log_softmax(tf.reduce_mean(score_map(network, parameters, view), axis=[1, 2]))
        for view in (images, tf.reverse(images, axis=[2]))
    ]
    return tf.reduce_logsumexp(tf.stack(both), axis=0) - math.log(2)
