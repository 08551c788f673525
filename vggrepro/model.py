"""The six nets of the paper's Table 1 as pure functions of tensors.

A `Network` is a frozen description; `forward` runs it on parameters handed in
as tensors, so that the same code serves the trainer, the replay and other
compilers. Layer names are those of `keras.applications`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.dropout import Dropout
from vggrepro.rounded_products import rounding

# Kernel sides of the convolutions by block; C ends its last three with 1x1 (Table 1).
KERNELS = {
    "A": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "A-LRN": ((3,), (3,), (3, 3), (3, 3), (3, 3)),
    "B": ((3, 3), (3, 3), (3, 3), (3, 3), (3, 3)),
    "C": ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)),
    "D": ((3, 3), (3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    "E": ((3, 3), (3, 3), (3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3)),
}
_BLOCK_WIDTHS = (64, 128, 256, 512, 512)
_DENSE_WIDTH = 4096
MIN_IMAGE_SIZE = 32  # five halvings must leave one pixel

Observer = Callable[[str, tf.Tensor], None]


@dataclass(frozen=True)
class WeightLayer:
    """A convolution or a dense layer; both carry a kernel and a bias.

    Attributes:
      kernel_shape: [k, k, in, out] of a convolution, [in, out] of a dense layer.
      relu: whether a ReLU follows (all but `predictions`).
      dropout: whether dropout follows the ReLU (fc1 and fc2, paper section 3.1).
    """

    name: str
    kernel_shape: tuple[int, ...]
    relu: bool = True
    dropout: bool = False

    @property
    def is_convolution(self) -> bool:
        return len(self.kernel_shape) == 4

    @property
    def fan_in(self) -> int:
        fan = 1
        for extent in self.kernel_shape[:-1]:
            fan *= extent
        return fan

    @property
    def fan_out(self) -> int:
        receptive = self.fan_in // self.kernel_shape[-2]
        return receptive * self.kernel_shape[-1]


@dataclass(frozen=True)
class PoolLayer:
    """2x2 max pooling with stride 2.

    Attributes:
      round_up: an odd last row or column makes one more output, as in Caffe; TensorFlow's
        default leaves it out. The same at 224 pixels; it matters to dense evaluation.
    """

    name: str
    round_up: bool = False


@dataclass(frozen=True)
class ResponseNormalization:
    """Krizhevsky's LRN: n=5, k=2, alpha=1e-4, beta=0.75."""

    name: str


@dataclass(frozen=True)
class FlattenLayer:
    """[N, H, W, C] -> [N, H*W*C]."""

    name: str = "flatten"


Layer = WeightLayer | PoolLayer | ResponseNormalization | FlattenLayer


@dataclass(frozen=True)
class Network:
    """A net of Table 1 at some width, image size and number of classes."""

    arch: str
    image_size: int
    classes: int
    layers: tuple[Layer, ...]

    @property
    def weight_layers(self) -> tuple[WeightLayer, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, WeightLayer))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """'<layer>/kernel' and '<layer>/bias' in forward order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.weight_layers:
            shapes[f"{layer.name}/kernel"] = layer.kernel_shape
            shapes[f"{layer.name}/bias"] = layer.kernel_shape[-1:]
        return shapes

    def parameter_count(self) -> int:
        return sum(
            layer.fan_in * layer.kernel_shape[-1] + layer.kernel_shape[-1]
            for layer in self.weight_layers
        )

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every layer's output for one image, without the batch axis."""
        shapes: dict[str, tuple[int, ...]] = {}
        side, channels = self.image_size, 3
        for layer in self.layers:
            if isinstance(layer, WeightLayer):
                channels = layer.kernel_shape[-1]
                flat = not layer.is_convolution
                shapes[layer.name] = (channels,) if flat else (side, side, channels)
            elif isinstance(layer, FlattenLayer):
                channels *= side * side
                shapes[layer.name] = (channels,)
            else:
                side = side // 2 if isinstance(layer, PoolLayer) else side
                shapes[layer.name] = (side, side, channels)
        return shapes

    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass."""
        total, shapes = 0, self.output_shapes()
        for layer in self.weight_layers:
            positions = shapes[layer.name][0] ** 2 if layer.is_convolution else 1
            total += positions * layer.fan_in * layer.kernel_shape[-1]
        return total


def build_network(arch: str, *, width: float, image_size: int, classes: int) -> Network:
    """Describes one of Table 1's nets.

    Args:
      width: multiplier of every layer's channels (at least one channel is kept).
      image_size: side of the square input, in pixels.

    Raises:
      InputError: unknown arch, an image below 32 pixels, or fewer than 2 classes.
    """
    if arch not in KERNELS:
        raise InputError(f"arch '{arch}' is unknown", "Use one of " + ", ".join(KERNELS))
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(
            f"image_size {image_size} is below {MIN_IMAGE_SIZE}",
            "Five 2x2 poolings need at least 32 pixels a side",
        )
    if classes < 2:
        raise InputError(f"{classes} classes cannot be told apart", "Use at least 2 classes")
    layers: list[Layer] = []
    channels = 3
    for block, kernels in enumerate(KERNELS[arch]):
        for place, kernel in enumerate(kernels):
            filters = max(1, round(_BLOCK_WIDTHS[block] * width))
            name = f"block{block + 1}_conv{place + 1}"
            layers.append(WeightLayer(name, (kernel, kernel, channels, filters)))
            channels = filters
        if arch == "A-LRN" and block == 0:
            layers.append(ResponseNormalization("block1_lrn"))
        layers.append(PoolLayer(f"block{block + 1}_pool"))
    layers.append(FlattenLayer())
    side, hidden = image_size // 32, max(1, round(_DENSE_WIDTH * width))
    layers.append(WeightLayer("fc1", (side * side * channels, hidden), dropout=True))
    layers.append(WeightLayer("fc2", (hidden, hidden), dropout=True))
    layers.append(WeightLayer("predictions", (hidden, classes), relu=False))
    return Network(arch, image_size, classes, tuple(layers))


def layer_names(arch: str) -> list[str]:
    """The weight layers of one of Table 1's nets, in forward order."""
    return [layer.name for layer in _narrow(arch).weight_layers]


def network_of(
    arch: str, parameters: Mapping[str, np.ndarray], image_size: int | None = None
) -> Network:
    """The net that stored parameters belong to: their widths and classes.

    Args:
      image_size: None takes the smallest that fits fc1, 32 times the side of its map.

    Raises:
      InputError: the parameters have other layers than `arch`.
    """
    described = _narrow(arch)
    shapes = {name: tuple(array.shape) for name, array in parameters.items()}
    if shapes.keys() != described.parameter_shapes().keys():
        odd = sorted(shapes.keys() ^ described.parameter_shapes().keys())[0]
        raise InputError(f"these are not the weights of net {arch}: see {odd}")
    layers = tuple(
        dataclasses.replace(layer, kernel_shape=shapes[f"{layer.name}/kernel"])
        if isinstance(layer, WeightLayer)
        else layer
        for layer in described.layers
    )
    last_convolution = [x for x in layers if isinstance(x, WeightLayer) and x.is_convolution][-1]
    side = math.isqrt(shapes["fc1/kernel"][0] // last_convolution.kernel_shape[-1])
    return Network(arch, image_size or 32 * side, shapes["predictions/bias"][0], layers)


def _narrow(arch: str) -> Network:
    return build_network(arch, width=1 / 64, image_size=MIN_IMAGE_SIZE, classes=2)


def forward(
    network: Network,
    parameters: Mapping[str, tf.Tensor],
    images: tf.Tensor,
    *,
    dropout: Dropout | None = None,
    observe: Observer | None = None,
    multiply_dtype: tf.DType | None = None,
) -> tf.Tensor:
    """Runs the net; each layer's ops lie in a name scope of its name.

    Args:
      parameters: '<layer>/kernel' and '<layer>/bias' to tensors; they are cast
        to the type of `images`, which is the compute type.
      images: [N, image_size, image_size, 3], mean subtracted, RGB.
      dropout: None for inference.
      observe: called with (layer, pre-activation) of every weight layer, in
        order of execution.
      multiply_dtype: float32 operands of every convolution and matrix product are rounded
        to it (`vggrepro.rounded_products`).

    Returns:
      float32 logits [N, classes].
    """
    values = images
    for index, layer in enumerate(network.layers):
        with tf.name_scope(layer.name):
            if isinstance(layer, WeightLayer):
                values = _preactivation(layer, parameters, values, multiply_dtype)
                if observe is not None:
                    observe(layer.name, values)
                if layer.relu:
                    values = tf.nn.relu(values)
                if layer.dropout and dropout is not None and dropout.rate > 0:
                    values = dropout.apply(values, index)
            elif isinstance(layer, PoolLayer):
                values = tf.nn.max_pool2d(values, 2, 2, "SAME" if layer.round_up else "VALID")
            elif isinstance(layer, ResponseNormalization):
                # depth_radius=2 spans n=5 maps; TensorFlow does not divide alpha by n. In
                # float32: float16 squares overflow from 256 on, bfloat16 has no kernel on CPUs.
                wide = tf.cast(values, tf.float32)
                wide = tf.nn.local_response_normalization(wide, 2, 2.0, 1e-4, 0.75)
                values = tf.cast(wide, values.dtype)
            else:
                values = tf.reshape(values, [-1, math.prod(values.shape[1:])])
    return tf.cast(values, tf.float32)


def _preactivation(
    layer: WeightLayer,
    parameters: Mapping[str, tf.Tensor],
    values: tf.Tensor,
    multiply_dtype: tf.DType | None,
) -> tf.Tensor:
    kernel = tf.cast(parameters[f"{layer.name}/kernel"], values.dtype)
    bias = tf.cast(parameters[f"{layer.name}/bias"], values.dtype)
    operand, product = rounding(multiply_dtype if values.dtype == tf.float32 else None)
    values, kernel = operand(values), operand(kernel)
    if layer.is_convolution:
        return tf.nn.bias_add(product(tf.nn.conv2d(values, kernel, 1, "SAME")), bias)
    return tf.nn.bias_add(product(tf.matmul(values, kernel)), bias)
