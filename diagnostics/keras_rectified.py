"""Convolutions whose ReLU TensorFlow fuses with them: bounded first, read behind it.

A CPU's fused kernel never writes the pre-activation, and its ReLU turns NaN into 0. To read
it parts the two and doubles what the largest layers write. But |sum of w x| <=
|w|_2 sqrt(n) max|x| (Cauchy-Schwarz, n products an output): where that is small, the
pre-activation is finite, and the ReLU's result, read once, tells its maximum. Where it is not,
the convolution is computed again and looked at.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from diagnostics.guard import SAFE_BOUND
from diagnostics.keras_readings import by_channel, extremes, only_reader, operation_of

# What makes no element larger than the largest that goes in.
_NO_LARGER = frozenset(["MaxPool", "Relu", "Identity", "Reshape", "Pad", "Transpose"])
_SMALL = 4  # an input of so much fewer elements than the output may as well be read
_ATTRIBUTES = ("strides", "padding", "explicit_paddings", "data_format", "dilations")


class Rectified:
    """The convolutions of one trace, in the order of their execution."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[tf.Tensor, tf.Tensor]] = {}

    def extremes(self, tensor: Any) -> tf.Tensor | None:
        """float32 [2]: maximum (0 if none is above) and 0; or those of all, if not bounded.

        None of what is no such pre-activation, or where its input is not known.
        """
        found = _convolution_before_relu(tensor)
        if found is None:
            return None
        convolution, bias, relu = found
        values, kernel = convolution.inputs
        largest = self._largest(values, convolution.outputs[0])
        if largest is None:
            return None
        terms = math.prod(kernel.shape[:-1])
        reach = _norm(kernel) * math.sqrt(terms) * largest + _norm(bias)

        def computed_again() -> tf.Tensor:
            attributes = {name: convolution.get_attr(name) for name in _ATTRIBUTES}
            again = tf.raw_ops.Conv2D(input=values, filter=kernel, **attributes)
            return extremes(again + bias)

        def behind() -> tf.Tensor:
            return tf.stack([tf.reduce_max(by_channel(tf.reduce_max, relu)), 0.0])

        # NaN compares as false.
        pair = tf.cond(reach < SAFE_BOUND, behind, computed_again)
        self._known[id(relu)] = relu, pair
        return pair

    def _largest(self, tensor: tf.Tensor, made_of_it: tf.Tensor) -> tf.Tensor | None:
        """The largest absolute value, of what was read on its way or is cheap to read."""
        source = tensor
        while id(source) not in self._known:
            operation = source.op
            if operation.type not in _NO_LARGER:
                break
            source = operation.inputs[0]
        if id(source) in self._known:
            return tf.reduce_max(tf.abs(self._known[id(source)][1]))
        size, larger = (t.shape[1:].num_elements() for t in (tensor, made_of_it))  # an example
        if size is None or larger is None or _SMALL * size > larger:
            return None
        return tf.reduce_max(tf.abs(extremes(tensor)))


def _convolution_before_relu(tensor: Any) -> tuple[tf.Operation, tf.Tensor, tf.Tensor] | None:
    """(convolution, bias, output of the ReLU) of a pre-activation that only a ReLU takes."""
    operation = operation_of(tensor)
    if operation is None or operation.type not in ("Add", "AddV2", "BiasAdd"):
        return None
    product, bias = operation.inputs
    made_by, reader = operation_of(product), only_reader(operation.outputs)
    if made_by is None or made_by.type != "Conv2D" or tensor.dtype != tf.float32:
        return None
    if reader is None or reader.type != "Relu" or only_reader(made_by.outputs) is not operation:
        return None
    if made_by.get_attr("data_format") != b"NHWC":
        return None
    if not all(weight.shape.is_fully_defined() for weight in (made_by.inputs[1], bias)):
        return None
    return made_by, bias, reader.outputs[0]


def _norm(tensor: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(2.0 * tf.nn.l2_loss(tensor))
