"""A convolution or matrix product as a TPU multiplies float32, on any device.

At its default precision a TPU rounds both operands to bfloat16 and adds the products in
float32; so do the two products of the backward pass, whose operands are the gradient from
above and what the forward pass had. Order of addition and denormals are not the TPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

Product = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
Gradient = Callable[[tf.Tensor], tf.Tensor]


def rounded_product(
    product: Product, left: tf.Tensor, right: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """product(left, right) with every operand rounded to `dtype` (to nearest, ties to even).

    Args:
      product: bilinear, as a convolution; its gradient is made of products too.
      left, right: float32; so is the result, whose own digits are all kept.
    """

    def rounded(values: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(values, dtype), values.dtype)

    @tf.custom_gradient
    def operand(values: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        return rounded(values), lambda upstream: upstream

    @tf.custom_gradient
    def result(values: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        return tf.identity(values), rounded

    return result(product(operand(left), operand(right)))
