"""Randomness by name, never by a moving stream.

Every random number of a run follows from the run seed and what it is for:
`fold_in(run_seed, STREAM_AUGMENT, epoch, example)`. The hash is splitmix64's
finaliser, chained: integer arithmetic modulo 2^64 only, hence the same on every
platform, Python version and device. `fold_in` runs on the host, `fold_in_tensor`
is the same function inside a graph. Random ops take the result as their seed and
must be stateless ones with `alg="philox"`.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

STREAM_INIT = 1
STREAM_ORDER = 2
STREAM_AUGMENT = 3
STREAM_DROPOUT = 4
STREAM_DATA = 5

_MASK64 = 2**64 - 1
_MASK63 = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR1 = 0xBF58476D1CE4E5B9
_FACTOR2 = 0x94D049BB133111EB


def fold_in(seed: int, *data: int) -> int:
    """Hashes a seed and any number of integers into a new seed in [0, 2^63).

    The order of `data` matters; a different number of them gives another seed.

    Raises:
      ValueError: an argument does not fit in 64 signed bits.
    """
    for value in (seed, *data):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"fold_in: {value} does not fit in 64 bits")
    state = _mix(int(seed))
    for value in data:
        state = _mix(state ^ (int(value) & _MASK64))
    return state & _MASK63


def seed_pair(seed: int, *data: int) -> np.ndarray:
    """The seed of TensorFlow's stateless ops: int64 [2] from `fold_in(seed, *data)`."""
    return np.array([fold_in(seed, *data), 0], np.int64)


def fold_in_tensor(seed: tf.Tensor | int, *data: tf.Tensor) -> tf.Tensor:
    """`fold_in` inside a graph.

    Args:
      seed: int64, any shape.
      data: int64 tensors that broadcast with each other and with `seed`.
    Returns:
      int64 of the broadcast shape, in [0, 2^63); equal to `fold_in` element by element.
    """
    state = _mix_tensor(tf.bitcast(tf.convert_to_tensor(seed, tf.int64), tf.uint64))
    for value in data:
        state = _mix_tensor(state ^ tf.bitcast(tf.convert_to_tensor(value, tf.int64), tf.uint64))
    return tf.bitcast(state & tf.constant(_MASK63, tf.uint64), tf.int64)


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _FACTOR1) & _MASK64
    value = ((value ^ (value >> 27)) * _FACTOR2) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(value: tf.Tensor) -> tf.Tensor:
    value = value + tf.constant(_GOLDEN, tf.uint64)
    value = (value ^ _shift_right(value, 30)) * tf.constant(_FACTOR1, tf.uint64)
    value = (value ^ _shift_right(value, 27)) * tf.constant(_FACTOR2, tf.uint64)
    return value ^ _shift_right(value, 31)


def _shift_right(value: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.right_shift(value, tf.constant(bits, tf.uint64))
