"""Functions of tf.data graphs: taken as they are written, and run on every core."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

#: For every function given to a dataset: TensorFlow would first rewrite its source, and that of
#: all it calls, for the sake of `if` and `while` on tensors. We have none, and the rewriting took
#: a third of the time until the first step.
as_written = tf.autograph.experimental.do_not_convert


def threads() -> int:
    """How many elements of a pipeline are made at a time."""
    return os.cpu_count() or 1


def parallel(dataset: tf.data.Dataset, function: Callable[..., Any]) -> tf.data.Dataset:
    """`dataset.map(function)` on every core, in the order of the elements."""
    return dataset.map(function, num_parallel_calls=threads(), deterministic=True)
