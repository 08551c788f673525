"""Validation error of a net's parameters over a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from vggrepro.model import Network, forward
from vggrepro.step_core import true_class_rank
from vggrepro.workers import ALONE, Workers


class Evaluator:
    """Centre-crop errors; each example counts exactly once.

    Args:
      parameters: '<layer>/kernel' and '<layer>/bias' to variables or tensors;
        read anew at every call.
      sums: what another engine takes instead: (images, labels, weights) -> the four
        numbers of `batch_sums`, of each of its replicas.
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
        workers: Workers = ALONE,
    ) -> dict[str, float] | None:
        """Errors in percent over `EvaluationStream` batches; None if told to stop.

        Args:
          workers: each has its own rows of every batch, and all get the same errors.

        Returns:
          val_loss, val_top1_error, val_top5_error (percent), val_images.
        """
        found = []
        for batch in batches:
            if should_stop():
                break
            sums = self._sums(batch["images"], batch["labels"], batch["weights"])
            found.append(np.reshape(np.asarray(sums, np.float64), [-1, 4]))
        if workers.any(should_stop()):
            return None
        # [workers, batches, replicas, 4]; added batch by batch, whoever had which rows.
        shares = workers.gather(np.stack(found))
        total = np.zeros(4)
        for sums in shares.swapaxes(0, 1).reshape(-1, 4):
            total += sums
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
