"""Functions of tf.data graphs, taken as they are written."""

from __future__ import annotations

import tensorflow as tf

#: For every function given to a dataset: TensorFlow would first rewrite its source, and that of
#: all it calls, for the sake of `if` and `while` on tensors. We have none, and the rewriting took
#: a third of the time until the first step.
as_written = tf.autograph.experimental.do_not_convert
