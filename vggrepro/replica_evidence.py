"""What each replica found in its rows of the batch, brought together in one verdict's evidence.

Every replica ends up with the same numbers, whether they ran side by side or one after the
other, so that its guard comes to the same verdict as all others'.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from diagnostics import guard
from diagnostics.guard import Forward
from vggrepro.step_core import CoreResult


def evidence_row(own: CoreResult) -> tf.Tensor:
    """float32 [n]: one replica's share, of a length that only the net decides."""
    seen = own.forward
    flags = tf.cast([seen.labels_valid, all_its_own_finite(own)], tf.float32)
    scalars = tf.stack([seen.loss, own.top1, own.top5])
    extremes = tf.reshape(seen.preactivation_extremes, [-1])
    return tf.concat([flags, scalars, seen.input_extremes, extremes], axis=0)


def brought_together(rows: tf.Tensor, gradients: Sequence[tf.Tensor]) -> CoreResult:
    """The global batch's evidence.

    Args:
      rows: float32 [replicas, n], the `evidence_row` of each.
      gradients: already summed.
    """
    flags = rows[:, :2] > 0
    loss, top1, top5 = (added_in_order(tf.unstack(rows[:, column])) for column in (2, 3, 4))
    pairs = over_replicas(tf.reshape(rows[:, 5:], [rows.shape[0], -1, 2]))
    # Adding rows of zeros turns -0 into 0, stacking them does not.
    pairs = tf.where(tf.equal(pairs, 0.0), 0.0, pairs)
    seen = Forward(pairs[0], tf.reduce_all(flags[:, 0]), pairs[1:], loss)
    return CoreResult(seen, list(gradients), top1, top5, flags[:, 1])


def added_in_order(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum from left to right: the same bits in every engine and on every repetition.

    AddN, which Grappler also makes of a chain of additions, begins with whichever of its inputs
    nothing else reads any more: of three or more, the order is then a matter of timing.
    """
    if len(parts) < 3:
        return tf.add_n(parts)
    return tf.foldl(tf.add, tf.stack(parts))


def over_replicas(extremes: tf.Tensor) -> tf.Tensor:
    """[replicas, ..., 2] of (maximum, minimum) to [..., 2]; keeps NaN."""
    pair = (tf.reduce_max(extremes[..., 0], axis=0), tf.reduce_min(extremes[..., 1], axis=0))
    finite = tf.reduce_all(tf.math.is_finite(extremes), axis=[0, -1])
    return guard.with_nan(tf.stack(pair, axis=-1), finite)


def all_its_own_finite(own: CoreResult) -> tf.Tensor:
    """bool: whether all that a replica computed is finite, and its labels are in range."""
    seen = own.forward
    parts = [seen.input_extremes, seen.preactivation_extremes, seen.loss]
    finite = [tf.reduce_all(tf.math.is_finite(part)) for part in parts]
    finite += [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in own.gradients]
    return tf.logical_and(tf.reduce_all(tf.stack(finite)), seen.labels_valid)
