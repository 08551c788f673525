"""Multi-crop evaluation: a regular grid of 5x5 crops and their mirror images.

Paper section 3.2: 50 crops a scale, 150 over three scales, their posteriors averaged. The
grid reaches from edge to edge of the rescaled image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf

from vggrepro.model import Network, forward

GRID = 5
CROPS = 2 * GRID**2


def grid_offsets(extent: tf.Tensor, size: int) -> tf.Tensor:
    """First pixels of GRID windows of `size` in `extent` pixels, edge to edge; int32 [GRID].

    Evenly spaced, rounded to whole pixels; all 0 where the extent is the size.
    """
    steps = tf.cast(extent - size, tf.float32) * tf.range(GRID, dtype=tf.float32) / (GRID - 1)
    return tf.cast(tf.round(steps), tf.int32)


def multicrop_log_posteriors(
    network: Network, parameters: Mapping[str, tf.Tensor], images: tf.Tensor
) -> tf.Tensor:
    """Logarithms of the posteriors averaged over the crops.

    Args:
      images: [N, H, W, 3] of the compute type, RGB minus the mean; H and W are at least
        the net's image size.

    Returns:
      float32 [N, classes].
    """
    size = network.image_size
    shape = tf.shape(images)
    rows, columns = grid_offsets(shape[1], size), grid_offsets(shape[2], size)
    found = []
    for row in range(GRID):  # a row of the grid at a time: ten crops of every image
        crops = [
            tf.slice(images, [0, rows[row], columns[column], 0], [-1, size, size, 3])
            for column in range(GRID)
        ]
        crops += [tf.reverse(crop, axis=[2]) for crop in crops]
        posteriors = tf.nn.log_softmax(forward(network, parameters, tf.concat(crops, axis=0)))
        found.append(tf.reshape(posteriors, [2 * GRID, shape[0], network.classes]))
    return tf.reduce_logsumexp(tf.concat(found, axis=0), axis=0) - math.log(CROPS)
