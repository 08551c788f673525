"""A convolution or matrix product as a TPU multiplies float32, on any device.

At its default precision a TPU rounds both operands to bfloat16 and adds the products in
float32; so do the two products of the backward pass, whose operands are the gradient from
above and what the forward pass had. Order of addition and denormals are not the TPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

Map = Callable[[tf.Tensor], tf.Tensor]


def rounding(dtype: tf.DType | None) -> tuple[Map, Map]:
    """(operand, product): what to wrap each operand of a product in, and its result.

    product(tf.matmul(operand(a), operand(b))) multiplies numbers rounded to `dtype` (to
    nearest, ties to even), in the backward pass too; for any bilinear op, of float32.

    Args:
      dtype: None rounds nothing and adds no op.
    """
    if dtype is None:
        return lambda values: values, lambda values: values

    def rounded(values: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(values, dtype), values.dtype)

    @tf.custom_gradient
    def operand(values: tf.Tensor) -> tuple[tf.Tensor, Map]:
        return rounded(values), lambda upstream: upstream

    @tf.custom_gradient
    def product(values: tf.Tensor) -> tuple[tf.Tensor, Map]:
        return tf.identity(values), rounded

    return operand, product
