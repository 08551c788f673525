"""The norm of a dense kernel's gradient, of its factors: |x' d|^2 = sum of (x x') (d d').

(Goodfellow 2015, arXiv:1510.01799, of per-example gradients.) With few rows the two small
products take next to nothing, where reading the gradient of VGG's fc1 takes 411 MB of memory
traffic. No element is larger than |x| |d| (Cauchy-Schwarz): the gradient is finite if that is.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diagnostics.guard import SAFE_BOUND
from diagnostics.keras_readings import operation_of

_FEW_ROWS = 32
_LARGE = 2**20  # elements of a gradient


def gradient_square(gradient: Any) -> tf.Tensor:
    """Sum of squares, float32; not finite if an element is not, or may not be."""
    factors = _factors(gradient)
    if factors is None:
        return square(gradient)
    few = tf.shape(factors[0])[0] <= _FEW_ROWS
    return tf.cond(few, lambda: _of_product(*factors), lambda: square(gradient))


def square(tensor: Any) -> tf.Tensor:
    """Sum of squares, float32."""
    tensor = tf.convert_to_tensor(tensor)
    # Squares of half precision overflow at once.
    return 2.0 * tf.nn.l2_loss(
        tensor if tensor.dtype == tf.float32 else tf.cast(tensor, tf.float32)
    )


def _factors(gradient: Any) -> tuple[tf.Tensor, tf.Tensor] | None:
    """x [rows, m] and d [rows, n] of a large float32 gradient x' d."""
    operation = operation_of(gradient)
    if operation is None or operation.type != "MatMul" or gradient.dtype != tf.float32:
        return None
    elements = gradient.shape.num_elements()
    if elements is None or elements < _LARGE:
        return None
    if not operation.get_attr("transpose_a") or operation.get_attr("transpose_b"):
        return None
    return operation.inputs[0], operation.inputs[1]


def _of_product(x: tf.Tensor, d: tf.Tensor) -> tf.Tensor:
    # In float64, where the terms of examples that pull apart may cancel.
    x, d = tf.cast(x, tf.float64), tf.cast(d, tf.float64)
    products = tf.matmul(x, x, transpose_b=True), tf.matmul(d, d, transpose_b=True)
    bound = tf.sqrt(tf.linalg.trace(products[0]) * tf.linalg.trace(products[1]))
    total = tf.maximum(tf.reduce_sum(products[0] * products[1]), 0.0)
    return tf.cast(tf.where(bound < SAFE_BOUND, total, bound * bound), tf.float32)
