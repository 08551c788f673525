"""Validation error of a net's parameters over a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from vggrepro.model import Network, forward
from vggrepro.step_core import true_class_rank


class Evaluator:
    """Centre-crop errors; each example counts exactly once.

    Args:
      parameters: '<layer>/kernel' and '<layer>/bias' to variables or tensors;
        read anew at every call.
      sums: what another runtime takes instead: (images, labels, weights) -> the four
        numbers of `batch_sums`.
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, tf.Tensor],
        compute_dtype: tf.DType = tf.float32,
        sums: Callable[..., Any] | None = None,
    ) -> None:
        here = functools.partial(batch_sums, network, parameters, compute_dtype)
        self._sums = sums or tf.function(here, autograph=False)

    def evaluate(
        self,
        batches: Iterable[Mapping[str, tf.Tensor]],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Errors in percent over `EvaluationStream` batches; None if told to stop.

        Returns:
          val_loss, val_top1_error, val_top5_error (percent), val_images.
        """
        total = np.zeros(4)
        for batch in batches:
            if should_stop():
                return None
            total += np.asarray(self._sums(batch["images"], batch["labels"], batch["weights"]))
        images, loss, top1, top5 = total.tolist()
        return {
            "val_loss": loss / images,
            "val_top1_error": 100.0 * (images - top1) / images,
            "val_top5_error": 100.0 * (images - top5) / images,
            "val_images": images,
        }


def batch_sums(
    network: Network,
    parameters: Mapping[str, tf.Tensor],
    compute_dtype: tf.DType,
    images: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
) -> tf.Tensor:
    """float64 [4]: examples, loss, right at 1, right at 5; rows of weight 0 count nothing."""
    logits = forward(network, parameters, tf.cast(images, compute_dtype))
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    rank = true_class_rank(logits, labels)
    rows = [
        tf.ones_like(weights),
        loss,
        tf.cast(rank < 1, tf.float32),
        tf.cast(rank < 5, tf.float32),
    ]
    # A padded row counts nothing, whatever its loss.
    counted = tf.where(weights > 0, tf.stack(rows), 0.0)
    return tf.reduce_sum(tf.cast(counted, tf.float64), axis=1)
