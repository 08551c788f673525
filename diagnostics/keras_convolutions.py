"""Convolutions whose output is bounded instead of read, in whole or at most steps.

|sum of w x| <= |w|_2 sqrt(n) max|x| (Cauchy-Schwarz, n products an output): where that is small,
every output is finite. Where it is not, it is looked at.

A CPU fuses a convolution with its ReLU, never writes the pre-activation, and its ReLU turns NaN
into 0. To read it parts the two and doubles what the largest layers write: bounded, the ReLU's
result is read, once. What a batch normalisation takes is read at some steps only (`keras_norms`):
its own output, read at each, tells more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

from diagnostics.guard import SAFE_BOUND
from diagnostics.keras_norms import CarriedNorms
from diagnostics.keras_readings import (
    by_channel,
    extremes,
    is_normalised,
    only_reader,
    operation_of,
)

# What makes no element larger than the largest that goes in.
_NO_LARGER = frozenset(["MaxPool", "Relu", "Identity", "Reshape", "Pad", "Transpose"])
_SMALL = 4  # an input of so much fewer elements than the output may as well be read
_ATTRIBUTES = ("strides", "padding", "explicit_paddings", "data_format", "dilations")


class _Convolution(NamedTuple):
    """What makes a pre-activation, and all that takes it."""

    operation: tf.Operation
    bias: tf.Tensor | None
    readers: list[tf.Operation]


class Convolutions:
    """Those of one trace, asked for in the order of their execution.

    Args:
      carried: says at which steps to read; None: at every one.
    """

    def __init__(self, carried: CarriedNorms | None) -> None:
        self._carried = carried
        self._before = None if carried is None else carried.outputs()
        self._kept: list[tf.Tensor] = []
        self._known: dict[int, tuple[tf.Tensor, tf.Tensor]] = {}

    def extremes(self, tensor: Any) -> tf.Tensor:
        """float32 [2] of any tensor: maximum and minimum, as `keras_readings.extremes`.

        In front of a fused ReLU: of what comes out of it, if the convolution is bounded.
        """
        made = _convolution(tensor)
        pair = None if made is None else self._of_bounded(tensor, made)
        if pair is None:
            pair = extremes(tensor)
        if not tf.executing_eagerly():
            self._known[id(tensor)] = tensor, pair
        return pair

    def _of_bounded(self, tensor: tf.Tensor, made: _Convolution) -> tf.Tensor | None:
        """None where its input is not known, or nothing is gained."""
        only = made.readers[0] if len(made.readers) == 1 else None
        relu = only.outputs[0] if only is not None and only.type == "Relu" else None
        if relu is None and (self._carried is None or not is_normalised(made.readers)):
            return None
        bounded = self._bounded(made)
        if bounded is None:
            return None
        if relu is None:
            return self._now_and_then(tensor, bounded)

        def behind() -> tf.Tensor:
            return tf.stack([tf.reduce_max(by_channel(tf.reduce_max, relu)), 0.0])

        pair = tf.cond(bounded, behind, lambda: extremes(_computed_again(made)))
        self._known[id(relu)] = relu, pair
        return pair

    def _now_and_then(self, tensor: tf.Tensor, bounded: tf.Tensor) -> tf.Tensor:
        assert self._carried is not None and self._before is not None
        before = self._before[len(self._kept)]
        settled = tf.logical_and(bounded, self._carried.settled())
        self._kept.append(tf.cond(settled, lambda: before, lambda: extremes(tensor)))
        return self._kept[-1]

    def keep(self) -> None:
        """What was read, for the next step; after the last one."""
        if self._kept and self._carried is not None:
            self._carried.keep_outputs(tf.stack(self._kept))

    def _bounded(self, made: _Convolution) -> tf.Tensor | None:
        """bool scalar: whether no output can be large; None if nothing is known of the input."""
        values, kernel = made.operation.inputs
        largest = self._largest(values, made.operation.outputs[0])
        if largest is None:
            return None
        terms = math.prod(kernel.shape[:-1])
        reach = _norm(kernel) * math.sqrt(terms) * largest
        if made.bias is not None:
            reach += _norm(made.bias)
        return reach < SAFE_BOUND  # false for NaN

    def _largest(self, tensor: tf.Tensor, made_of_it: tf.Tensor) -> tf.Tensor | None:
        """The largest absolute value, of what was read on its way or is cheap to read."""
        source = tensor
        while id(source) not in self._known and source.op.type in _NO_LARGER:
            source = source.op.inputs[0]
        if id(source) in self._known:
            return tf.reduce_max(tf.abs(self._known[id(source)][1]))
        size, larger = (t.shape[1:].num_elements() for t in (tensor, made_of_it))  # an example
        if size is None or larger is None or _SMALL * size > larger:
            return None
        return tf.reduce_max(tf.abs(extremes(tensor)))


def _convolution(tensor: Any) -> _Convolution | None:
    """What makes a tensor by a float32 convolution of channels last, with or without a bias."""
    operation = operation_of(tensor)
    if operation is None or tensor.dtype != tf.float32:
        return None
    made_by, bias = operation, None
    if operation.type in ("Add", "AddV2", "BiasAdd"):
        product, bias = operation.inputs
        made_by = operation_of(product)
    if made_by is None or made_by.type != "Conv2D":
        return None
    if bias is not None and only_reader(made_by.outputs) is not operation:
        return None
    if made_by.get_attr("data_format") != b"NHWC":
        return None
    weights = [made_by.inputs[1], *([] if bias is None else [bias])]
    if not all(weight.shape.is_fully_defined() for weight in weights):
        return None
    return _Convolution(made_by, bias, operation.outputs[0].consumers())


def _computed_again(made: _Convolution) -> tf.Tensor:
    values, kernel = made.operation.inputs
    attributes = {name: made.operation.get_attr(name) for name in _ATTRIBUTES}
    again = tf.raw_ops.Conv2D(input=values, filter=kernel, **attributes)
    return again if made.bias is None else again + made.bias


def _norm(tensor: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(2.0 * tf.nn.l2_loss(tensor))
