"""The pure core of a step: parameters, batch and seed in; loss, gradients, evidence out.

Tensors only, no variables, so that other runtimes and compilers can take it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diagnostics import guard
from diagnostics.guard import Forward
from vggrepro.dropout import Dropout
from vggrepro.model import Network, forward


class CoreResult(NamedTuple):
    """What the pure core computes for its rows of the global batch.

    Attributes:
      gradients: of the data loss (no L2), in the order of the parameters.
      top1, top5: float32, examples classified right.
      healthy: bool [replicas], whether all of its own was finite on each; () where there is
        but one.
    """

    forward: Forward
    gradients: list[tf.Tensor]
    top1: tf.Tensor
    top5: tf.Tensor
    healthy: tf.Tensor | tuple[()] = ()


def loss_and_gradients(
    network: Network,
    parameters: Mapping[str, tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    dropout: Dropout | None,
    compute_dtype: tf.DType = tf.float32,
    global_rows: int,
    multiply_dtype: tf.DType | None = None,
    loss_scale: tf.Tensor | None = None,
    phase: Callable[[str], None] = lambda name: None,
    extremes: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> CoreResult:
    """Loss, gradients and what the tripwire needs: a pure function of tensors.

    Args:
      parameters: '<layer>/kernel' and '<layer>/bias', float32.
      images: float32 [rows, side, side, 3]; labels: int32 [rows].
      dropout: the masks of this step, or None.
      compute_dtype: type of activations; the loss is float32.
      multiply_dtype: as `model.forward`; rounds in the backward pass too.
      global_rows: the loss is the sum over the rows divided by this, so that
        the sum over replicas is the mean over the global batch.
      loss_scale: float32; the backward pass computes the gradients of loss_scale * loss, which
        are divided by it in float32. The product itself, which may overflow, is never formed.
        None: 1.
      phase: told 'forward', 'loss' and 'backward' as each begins.
      extremes: what reads inputs and pre-activations, `guard.extremes` if None; XLA needs
        `guard.checked_extremes`.
    """
    extremes = extremes or guard.extremes
    phase("forward")
    pair = extremes(images)
    seen: list[tf.Tensor] = []
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(list(parameters.values()))
        logits = forward(
            network,
            parameters,
            tf.cast(images, compute_dtype),
            dropout=dropout,
            observe=lambda layer, values: seen.append(extremes(values)),
            multiply_dtype=multiply_dtype,
        )
        phase("loss")
        loss, labels_valid = cross_entropy(logits, labels, network.classes, global_rows)
    phase("backward")
    gradients = tape.gradient(loss, list(parameters.values()), loss_scale)
    if loss_scale is not None:
        gradients = [gradient / loss_scale for gradient in gradients]
    top1, top5 = _correct(logits, labels)
    return CoreResult(Forward(pair, labels_valid, tf.stack(seen), loss), gradients, top1, top5)


def cross_entropy(
    logits: tf.Tensor, labels: tf.Tensor, classes: int, global_rows: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """(mean softmax cross-entropy, whether every label is in range).

    A label out of range makes the loss NaN on every device; TensorFlow itself
    raises on the CPU and is silent under XLA.
    """
    valid = tf.logical_and(labels >= 0, labels < classes)
    per_example = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(valid, labels, 0), logits)
    per_example = tf.where(valid, per_example, np.nan)
    return tf.reduce_sum(per_example) / global_rows, tf.reduce_all(valid)


def true_class_rank(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """int32 [N]: how many classes come before the true one; 0 is a right top-1.

    Equal logits rank by class number, so that a dead net scores at chance. With a
    NaN logit of the true class the rank is beyond every class.
    """
    own = tf.gather(logits, tf.clip_by_value(labels, 0, logits.shape[1] - 1), batch_dims=1)
    lower = tf.range(logits.shape[1])[tf.newaxis] < labels[:, tf.newaxis]
    beaten = tf.logical_or(
        ~(logits <= own[:, tf.newaxis]), tf.logical_and(lower, logits >= own[:, tf.newaxis])
    )
    rank = tf.reduce_sum(tf.cast(beaten, tf.int32), axis=1)
    return tf.where(tf.math.is_nan(own), tf.int32.max, rank)


def _correct(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    rank = true_class_rank(logits, labels)
    return tuple(tf.reduce_sum(tf.cast(rank < k, tf.float32)) for k in (1, 5))
