"""Finiteness and norms of gradients, weights and slots in few cheap passes, for XLA.

XLA's reductions on a CPU run on one thread, so sums of squares go through a product with
ones; and a conditional costs it more than the passes that it would save, so there is none.
Squares of numbers scaled by 2^-80 cannot overflow: their sum is finite if and only if
every element is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diagnostics.keras_update import Group, state_members

_SCALE = 2.0**-80


def xla_sight(
    groups: Sequence[Group],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `keras_update.exact_sight`: flags and norms of gradients and weights."""
    gradients, gradient_norms = _sight([group.gradients for group in groups])
    weights, weight_norms = _sight([[tf.identity(v) for v in group.weights] for group in groups])
    return gradients, weights, gradient_norms, weight_norms


def xla_new_state_finite(groups: Sequence[Group], touched: Sequence[Any]) -> tf.Tensor:
    """As `keras_update.new_state_finite`."""
    members = [[tf.identity(v) for v in group] for group in state_members(groups, touched)]
    return tf.math.is_finite(_square_sums(members, _SCALE))


def _sight(groups: Sequence[Sequence[tf.Tensor]]) -> tuple[tf.Tensor, tf.Tensor]:
    """(whether all elements are finite, L2 norms) by group; bool and float32 [groups]."""
    plain, scaled = _square_sums(groups, 1.0), _square_sums(groups, _SCALE)
    norms = tf.where(tf.math.is_finite(plain), tf.sqrt(plain), tf.sqrt(scaled) / _SCALE)
    return tf.math.is_finite(scaled), tf.cast(norms, tf.float32)


def _square_sums(groups: Sequence[Sequence[tf.Tensor]], scale: float) -> tf.Tensor:
    """Sum by group of the squares of all elements times `scale`."""
    kind = tf.float64 if any(t.dtype == tf.float64 for g in groups for t in g) else tf.float32
    return tf.stack([tf.add_n([_square_sum(t, scale, kind) for t in group]) for group in groups])


def _square_sum(tensor: tf.Tensor, scale: float, kind: tf.DType) -> tf.Tensor:
    squares = tf.square(tf.cast(tensor, kind) * scale)
    width = tensor.shape[-1] if (tensor.shape.rank or 0) > 1 else None
    if not width:
        return tf.reduce_sum(squares)
    ones = tf.ones([width], kind)
    return tf.reduce_sum(tf.linalg.matvec(tf.reshape(squares, [-1, width]), ones))
