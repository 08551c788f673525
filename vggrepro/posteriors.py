"""Posteriors averaged over crops, flips, scales and nets, and the errors that they make."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from vggrepro.step_core import true_class_rank

_ROWS = 1024  # examples ranked at a time


class PosteriorMean:
    """Mean posterior of every example over equally weighted passes.

    Kept as logarithms, which lose nothing where a posterior underflows. A pass (one net
    at one scale) must bring every example exactly once.

    Args:
      examples, classes: size of the table; it takes 4 bytes an entry.
    """

    def __init__(self, examples: int, classes: int) -> None:
        self._sum = np.full([examples, classes], -np.inf, np.float32)
        self._seen = np.zeros(examples, np.int64)
        self._passes = 0

    def add(self, example_ids: np.ndarray, log_posteriors: np.ndarray) -> None:
        """Adds rows float32 [b, classes] of one pass."""
        with np.errstate(invalid="ignore"):  # NaN of a broken net stays NaN, and counts as wrong
            self._sum[example_ids] = np.logaddexp(self._sum[example_ids], log_posteriors)
        np.add.at(self._seen, example_ids, 1)

    def end_pass(self) -> None:
        """Closes a pass.

        Raises:
          ValueError: an example was missed or came twice.
        """
        self._passes += 1
        odd = np.flatnonzero(self._seen != self._passes)
        if odd.size:
            raise ValueError(
                f"{odd.size} examples did not come exactly once, as example {odd[0]}: "
                f"{self._seen[odd[0]]} times in {self._passes} passes"
            )

    def errors(self, labels: np.ndarray) -> dict[str, float]:
        """top1_error and top5_error (percent), and loss, the mean of -log posterior.

        Equal posteriors rank by class number; NaN is wrong.
        """
        right = np.zeros(2)
        for first in range(0, len(labels), _ROWS):
            rows = slice(first, first + _ROWS)
            rank = true_class_rank(tf.constant(self._sum[rows]), tf.constant(labels[rows])).numpy()
            right += [np.sum(rank < 1), np.sum(rank < 5)]
        own = self._sum[np.arange(len(labels)), labels].astype(np.float64) - math.log(self._passes)
        top1, top5 = 100.0 * (len(labels) - right) / len(labels)
        return {"top1_error": float(top1), "top5_error": float(top5), "loss": float(-own.mean())}
