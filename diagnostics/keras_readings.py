"""Reading tensors of a graph so that the graph computes the same bits as without.

Grappler reorders chains of products and sums, but leaves a link of the chain
alone that has a second reader: a guard that reads it changes the bits of what
follows. So sums and products are read from ops of the guard's own, and a sum of
a large tensor and a bias is not computed again at all: its extremes follow from
those of each channel. What a smooth activation alone takes is read behind it, since
a second reader would part the two, and fused they round differently; a product with a
bias that is only added to something, behind that sum. XLA fuses otherwise; there
`optimization_barrier` keeps the guard's reading apart where that was seen to matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.core.framework import attr_value_pb2

_CHAIN = {"Mul": tf.raw_ops.Mul, "Add": tf.raw_ops.Add, "AddV2": tf.raw_ops.AddV2}
_SUMS = frozenset(["Add", "AddV2", "AddN", "BiasAdd"])
_PRODUCTS = frozenset(["MatMul", "Conv2D", "DepthwiseConv2dNative", "Conv3D"])

_ROWS_AT_ONCE = 64  # fit the first cache of a core, whatever the channels

_BELOW_ONE, _LEAST = 1.0 - 2.0**-24, 2.0**-126


def _logit(y: tf.Tensor) -> tf.Tensor:
    return tf.math.log(y) - tf.math.log1p(-y)


def _before_elu(y: tf.Tensor) -> tf.Tensor:
    return tf.where(y > 0, y, tf.math.log1p(tf.minimum(y, 0.0)))


# Rising activations that TensorFlow fuses on a CPU with the product, bias and all, in front
# of them; NaN passes through. Their inverse, float32 of float32, is finite for finite input.
_FUSED = {
    "Tanh": lambda y: tf.math.atanh(tf.clip_by_value(y, -_BELOW_ONE, _BELOW_ONE)),
    "Sigmoid": lambda y: _logit(tf.clip_by_value(y, _LEAST, _BELOW_ONE)),
    "Elu": lambda y: _before_elu(tf.maximum(y, -_BELOW_ONE)),
}

# Attribute of a graph: what was read again there, by id of the tensor, which is held with it.
_READ_AGAIN = "_numeric_guard_read_again"


def second_reading(tensor: Any) -> Any:
    """The same number by ops of their own, as far up as products and sums go.

    Each op is made again once in a graph: a residual net is one long chain of sums, and
    x + x + ... would double the work with every sum.
    """
    operation = operation_of(tensor)
    if operation is None or not _is_chain(operation):
        return tensor
    graph = tf.compat.v1.get_default_graph()  # may be a proxy, which has no `vars`
    known = getattr(graph, _READ_AGAIN, None)
    if known is None:
        known = {}
        setattr(graph, _READ_AGAIN, known)
    if id(tensor) not in known:
        known[id(tensor)] = tensor, _made_again(tensor, operation)
    return known[id(tensor)][1]


def _made_again(tensor: Any, operation: tf.Operation) -> Any:
    inputs = [second_reading(value) for value in operation.inputs]
    # Without a mark, common subexpressions would become one op again.
    mark = attr_value_pb2.AttrValue(b=True)
    with tensor.graph._attr_scope({"_numeric_guard": mark}):
        if operation.type == "AddN":
            return tf.raw_ops.AddN(inputs=inputs)
        return _CHAIN[operation.type](x=inputs[0], y=inputs[1])


def extremes(tensor: tf.Tensor) -> tf.Tensor:
    """float32 [2]: maximum and minimum; not finite only if an element is not; 0 if empty.

    In front of a tanh, sigmoid or ELU: as far as its result tells, which saturates. A
    product that is only added to something: of that sum, behind its ReLU if it has one.
    """
    whole = _fused_sum(tensor)
    tensor = tensor if whole is None else whole
    activation = _fused_with(tensor)
    if activation is not None:
        pair = _extremes(activation.outputs[0])
        return tf.where(tf.math.is_finite(pair), _FUSED[activation.type](pair), pair)
    return _extremes(tensor, whole is not None)


def _fused_sum(tensor: Any) -> Any:
    """What comes out of the kernel of product, bias, sum and ReLU; None if there is no such."""
    operation = operation_of(tensor)
    if operation is None or not _holds_product(operation):
        return None
    summed = any(map(_holds_product, _makers(operation)))
    while (reader := only_reader(operation.outputs)) is not None and reader.type in _SUMS:
        operation, summed = reader, True
    if not summed:
        return None
    reader = only_reader(operation.outputs)
    behind = reader if reader is not None and reader.type == "Relu" else operation
    return behind.outputs[0]


def _holds_product(operation: tf.Operation) -> bool:
    """A product or convolution plus a bias, or a sum of such with other things."""
    return operation.type in _SUMS and any(
        made.type in _PRODUCTS or _holds_product(made)
        for made in _makers(operation)
        if only_reader(made.outputs) is operation
    )


def _makers(operation: tf.Operation) -> list[tf.Operation]:
    return [made for value in operation.inputs if (made := operation_of(value)) is not None]


def only_reader(values: Iterable[tf.Tensor]) -> tf.Operation | None:
    """The one op that takes these, as all that another op makes; None if there are more."""
    readers = [reader for value in values for reader in value.consumers()]
    return readers[0] if len(readers) == 1 else None


def _fused_with(tensor: Any) -> tf.Operation | None:
    """The one smooth activation that takes a symbolic tensor and nothing else does."""
    if tf.executing_eagerly() or not hasattr(tensor, "consumers"):
        return None
    taker = only_reader([tensor])
    return taker if taker is not None and taker.type in _FUSED else None


def _extremes(tensor: tf.Tensor, as_it_is: bool = False) -> tf.Tensor:
    as_it_is = as_it_is or _kept_by_its_reader(tensor)
    values, bias = (tensor, None) if as_it_is else _without_bias(tensor)
    if bias is None:
        pair = tf.stack([tf.reduce_max(values), tf.reduce_min(values)])
    else:
        # Rounding is monotone: the largest sum of a channel is that of its largest number.
        high = tf.reduce_max(by_channel(tf.reduce_max, values) + bias)
        pair = tf.stack([high, tf.reduce_min(by_channel(tf.reduce_min, values) + bias)])
    if tensor.dtype == tf.float64:
        limit = tf.cast(tf.float32.max, tf.float64)
        pair = tf.where(tf.math.is_finite(pair), tf.clip_by_value(pair, -limit, limit), pair)
    pair = tf.cast(pair, tf.float32)
    if tensor.shape.is_fully_defined() and tensor.shape.num_elements():
        return pair
    return tf.where(tf.size(values) > 0, pair, tf.zeros([2]))


def _kept_by_its_reader(tensor: Any) -> bool:
    """Whether product and bias stay one kernel, with its bits, when their sum is read too.

    In front of a ReLU that kernel alone is left, without the ReLU; in front of a batch
    normalisation it was there before.
    """
    operation = operation_of(tensor)
    if operation is None or operation.type not in _SUMS:
        return False
    if not any(made.type in _PRODUCTS for made in _makers(operation)):
        return False
    reader = only_reader(operation.outputs)
    if reader is not None:
        return reader.type == "Relu"
    return is_normalised(operation.outputs[0].consumers())


def is_normalised(readers: Iterable[tf.Operation]) -> bool:
    """Whether the readers of a tensor take its mean and variance, as batch normalisation does."""
    kinds = {reader.type for reader in readers}
    return "FusedBatchNormV3" in kinds or {"Mean", "SquaredDifference"} <= kinds


def by_channel(reduce: Callable[..., tf.Tensor], values: tf.Tensor) -> tf.Tensor:
    """[channels], the rest reduced: few rows at a time, since all at once takes thrice as long."""
    rows, channels = math.prod(side or 0 for side in values.shape[1:-1]), values.shape[-1]
    group = next((n for n in range(_ROWS_AT_ONCE, 1, -1) if rows and rows % n == 0), 0)
    if group:
        values = reduce(tf.reshape(values, [-1, group, channels]), 1)
    return reduce(values, list(range(values.shape.rank - 1)))


def _without_bias(tensor: Any) -> tuple[Any, Any]:
    """(large part, bias by channel) of their sum; (second reading, None) of anything else."""
    operation = operation_of(tensor)
    if operation is not None and operation.type in ("Add", "AddV2"):
        values, bias = operation.inputs
        channels = tensor.shape[-1] if tensor.shape.rank else None
        made_by = operation_of(values)
        plain = made_by is not None and not _is_chain(made_by)
        whole = values.shape.rank == tensor.shape.rank and (values.shape.rank or 0) > 1
        flat = bias.shape.is_fully_defined() and bias.shape.num_elements() == channels
        if plain and whole and flat and bias.shape[-1] == channels:
            return values, tf.reshape(bias, [-1])
    return second_reading(tensor), None


def apart(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor behind a barrier that XLA does not fuse across."""
    found = xla.optimization_barrier(tensor)
    return found[0] if isinstance(found, (list, tuple)) else found


def operation_of(tensor: Any) -> tf.Operation | None:
    """What makes a symbolic tensor, past identities; None for an eager one."""
    operation = None if tf.executing_eagerly() else getattr(tensor, "op", None)
    while operation is not None and operation.type == "Identity":
        operation = operation.inputs[0].op
    return operation


def _is_chain(operation: tf.Operation) -> bool:
    return operation.type in _CHAIN or operation.type == "AddN"
