"""Dropout whose mask follows from integers alone: the same units on every device and compiler."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

from vggrepro.rng import STREAM_DROPOUT, fold_in, fold_in_tensor

_FRACTION_BITS = 24  # of a float32 in [0, 1)


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout keyed by the rows of the global batch (paper section 3.1).

    Whether a unit is dropped is a hash of (seed, layer, row of the global batch, unit),
    so the number of replicas changes nothing. Not TensorFlow's stateless ops, whose
    numbers under XLA are others than without it (TensorFlow 2.21).

    Attributes:
      rate: probability of dropping a unit.
      seed: int64 scalar, a function of (run seed, step).
      first_row: int32 or int64 scalar or int, the first row of `values` in the global batch.
    """

    rate: float
    seed: tf.Tensor
    first_row: int | tf.Tensor = 0

    @classmethod
    def of_step(
        cls, rate: float, run_seed: int, step: tf.Tensor, first_row: int | tf.Tensor = 0
    ) -> Dropout:
        """The masks of a step.

        Args:
          step: integer scalar.
        """
        seed = fold_in_tensor(fold_in(run_seed, STREAM_DROPOUT), tf.cast(step, tf.int64))
        return cls(rate, seed, first_row)

    def apply(self, values: tf.Tensor, layer_index: int) -> tf.Tensor:
        """Drops units of `values` [n, units] and rescales the rest by 1/(1-rate)."""
        rows, units = values.shape
        first = tf.cast(self.first_row, tf.int64) * units
        places = first + tf.range(rows * units, dtype=tf.int64)
        key = fold_in_tensor(self.seed, tf.constant(layer_index, tf.int64))
        # A hash has 63 bits; an integer bound keeps the comparison exact.
        bound = int(self.rate * 2**_FRACTION_BITS) << (63 - _FRACTION_BITS)
        kept = tf.reshape(fold_in_tensor(key, places) >= bound, [rows, units])
        scale = tf.cast(1.0 / (1.0 - self.rate), values.dtype)
        return values * tf.cast(kept, values.dtype) * scale
