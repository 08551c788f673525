"""Finiteness and norms of gradients, weights and slots in one cheap pass each, for XLA.

XLA's reductions on a CPU run on one thread, so sums of squares go through a product with
ones; and a conditional costs it more than the passes that it would save, so there is none.
In float64 the squares of float32 numbers neither overflow nor vanish: their sum is finite if
and only if every element is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from diagnostics.guard import all_finite
from diagnostics.keras_norms import CarriedNorms
from diagnostics.keras_update import Group, Update, exact_sight, proven_finite, reached_norms


def bounded_update(
    optimizer: Any, apply: Callable[[], Any], groups: Sequence[Group], carried: CarriedNorms
) -> Update:
    """An update of which only the gradients are read: the host reads weights and slots at times.

    A step that does not pass is to be run again with a look at everything.
    """
    norms = tf.cast(tf.sqrt(_square_sums([group.gradients for group in groups])), tf.float32)
    before = carried.left(norms)
    proven = proven_finite(optimizer, before)
    carried.leave(before, *reached_norms(optimizer, before), hold=tf.constant(True))
    apply()
    return Update(tf.constant(True), proven, proven, proven, norms, before.weights_read)


def xla_sight(
    groups: Sequence[Group],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `keras_update.exact_sight`: flags and norms of gradients and weights."""
    gradients = [group.gradients for group in groups]
    weights = [[tf.identity(v) for v in group.weights] for group in groups]
    if not (_narrow(gradients) and _narrow(weights)):
        return exact_sight(groups)
    sums = [_square_sums(kind) for kind in (gradients, weights)]
    norms = [tf.cast(tf.sqrt(kind), tf.float32) for kind in sums]
    return (*(tf.math.is_finite(kind) for kind in sums), *norms)


def xla_all_finite(groups: Sequence[Sequence[tf.Tensor]]) -> tf.Tensor:
    """As `guard.all_finite`."""
    return tf.math.is_finite(_square_sums(groups)) if _narrow(groups) else all_finite(groups)


def _narrow(groups: Sequence[Sequence[tf.Tensor]]) -> bool:
    """Whether squares fit a float64."""
    return all(tensor.dtype != tf.float64 for group in groups for tensor in group)


def _square_sums(groups: Sequence[Sequence[tf.Tensor]]) -> tf.Tensor:
    """Sum by group of the squares of all elements, float64 [groups]."""
    return tf.stack([tf.add_n([_square_sum(tensor) for tensor in group]) for group in groups])


def _square_sum(tensor: tf.Tensor) -> tf.Tensor:
    squares = tf.square(tf.cast(tensor, tf.float64))
    width = tensor.shape[-1] if (tensor.shape.rank or 0) > 1 else None
    if not width:
        return tf.reduce_sum(squares)
    ones = tf.ones([width], tf.float64)
    return tf.reduce_sum(tf.linalg.matvec(tf.reshape(squares, [-1, width]), ones))
