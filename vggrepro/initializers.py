"""Initial weights as a pure function of (network, initialiser, seed).

The paper's words are "normal distribution with the zero mean and 10^-2
variance", biases 0 (section 3.1). Read literally that is sigma = 0.1, which
explodes; sigma = 0.01 is what the authors' later code uses.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from vggrepro.config import parse_init
from vggrepro.model import Network, WeightLayer
from vggrepro.rng import STREAM_INIT, seed_pair

# Standard deviation of a unit normal truncated at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


def initial_parameters(network: Network, init: str, seed: int) -> dict[str, np.ndarray]:
    """Draws every kernel; biases are zero.

    Each kernel has its own stream keyed by (seed, layer index), so a layer's
    weights do not depend on the layers before it. Drawn on the CPU whatever the
    accelerator, so that the bits are the same everywhere.

    Args:
      init: `normal:STD`, `glorot-uniform|normal` (Glorot & Bengio 2010, eq. 16)
        or `he-normal|uniform` (He et al. 2015, eq. 10); the normal forms of
        Glorot and He are truncated at two standard deviations, as in Keras.

    Returns:
      '<layer>/kernel' and '<layer>/bias' to float32 arrays.
    """
    parameters: dict[str, np.ndarray] = {}
    with tf.device("/CPU:0"):
        for index, layer in enumerate(network.weight_layers):
            seed2 = seed_pair(seed, STREAM_INIT, index)
            parameters[f"{layer.name}/kernel"] = _draw(layer, init, seed2).numpy()
            parameters[f"{layer.name}/bias"] = np.zeros(layer.kernel_shape[-1:], np.float32)
    return parameters


def standard_deviation(layer: WeightLayer, init: str) -> float:
    """The standard deviation that `init` gives this layer's kernel."""
    kind, std = parse_init(init)
    if kind == "normal":
        return std
    if kind.startswith("glorot"):
        return math.sqrt(2.0 / (layer.fan_in + layer.fan_out))
    return math.sqrt(2.0 / layer.fan_in)


def _draw(layer: WeightLayer, init: str, seed2: np.ndarray) -> tf.Tensor:
    std, shape = standard_deviation(layer, init), layer.kernel_shape
    if init.endswith("uniform"):
        limit = math.sqrt(3.0) * std
        return tf.random.stateless_uniform(shape, seed2, -limit, limit, alg="philox")
    if init.startswith("normal"):
        return tf.random.stateless_normal(shape, seed2, 0.0, std, alg="philox")
    return tf.random.stateless_truncated_normal(
        shape, seed2, 0.0, std / _TRUNCATED_STD, alg="philox"
    )
