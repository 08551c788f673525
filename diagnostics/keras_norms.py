"""Norms of weights and slots, read at some steps and bounded at those between.

They are most of what the optimizer keeps in memory, and reading them costs more than all
else that the guard does to a wide dense net. Between two readings the norms that an update
can lead to at most stand for them: no element is larger, and none can be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

READ_EVERY = 16  # steps
# Gradients that grow so much since the last reading ask for one: of a run that diverges, every
# step's weights are to be known.
ALARM = 2.0
_GROWTH = 1.0 + 1e-5  # a step's rounding, of norms and of their bounds


class Norms(NamedTuple):
    """By group, float32 [groups]; upper bounds of weights and slots where they were not read.

    Attributes:
      weights_read, gradients_read: the weights' own norms at the last reading, and what the
        gradients' were then.
    """

    gradients: tf.Tensor
    weights: tf.Tensor
    slots: tf.Tensor
    weights_read: tf.Tensor
    gradients_read: tf.Tensor


class CarriedNorms:
    """What the last step left of them, for the next one.

    What writes weights or slots outside of the step and of its update is seen at the next
    reading, or as soon as it shows anywhere else.
    """

    def __init__(self) -> None:
        # None can be made inside of a trace, which alone knows the sizes.
        self._norms = tf.Variable(tf.zeros([4, 0]), trainable=False, shape=[4, None])
        self._outputs = tf.Variable(tf.zeros([0, 2]), trainable=False, shape=[None, 2])
        self._age = tf.Variable(READ_EVERY, trainable=False)

    def trace(self, groups: int) -> None:
        """A trace begins that updates so many groups."""
        with tf.init_scope():
            self._norms.assign(tf.zeros([4, groups]))
            self.forget()

    def replace(self, weights: tf.Tensor, slots: tf.Tensor) -> None:
        """What was read outside of a step."""
        self._norms.assign(tf.stack([weights, slots, weights, tf.zeros_like(weights)]))

    def left(self, gradients: tf.Tensor) -> Norms:
        """Of the last step, and this one's gradients."""
        return Norms(gradients, *tf.unstack(self._norms))

    def forget(self) -> None:
        """The next step reads them."""
        self._age.assign(READ_EVERY)

    def settled(self) -> tf.Tensor:
        """bool scalar: whether the last step had no reason to read, and this one is not due to."""
        return tf.logical_and(self._age > 1, self._age < READ_EVERY)

    def outputs(self) -> tf.Tensor:
        """float32 [n, 2]: what `keep_outputs` was given by the last step."""
        return self._outputs.read_value()

    def keep_outputs(self, extremes: tf.Tensor) -> None:
        """Maximum and minimum of layers' outputs, of this step or of an earlier one."""
        with tf.init_scope():
            self._outputs.assign(tf.zeros(extremes.shape))
        self._outputs.assign(extremes)

    def now(
        self,
        gradients: tf.Tensor,
        read: Callable[[], tuple[tf.Tensor, tf.Tensor]],
        conclusive: Callable[[Norms], tf.Tensor],
    ) -> Norms:
        """Before an update.

        Args:
          read: the norms of weights and of slots, from their elements.
          conclusive: bool, whether norms prove that the update keeps all finite.
        """
        carried = self.left(gradients)
        calm = tf.reduce_all(gradients <= ALARM * carried.gradients_read)
        fresh = tf.reduce_all(tf.stack([self._age < READ_EVERY, calm, conclusive(carried)]))

        def look() -> tuple[tf.Tensor, ...]:
            weights, slots = read()
            self._age.assign(0)
            return weights, slots, weights, gradients

        return Norms(gradients, *tf.cond(fresh, lambda: tuple(carried[1:]), look))

    def leave(self, before: Norms, weights: tf.Tensor, slots: tf.Tensor, hold: tf.Tensor) -> None:
        """After an update, given the norms that it can have led to at most.

        Args:
          hold: bool scalar; if not so, the next step reads.
        """
        bounds = _GROWTH * weights, _GROWTH * slots
        self._norms.assign(tf.stack([*bounds, before.weights_read, before.gradients_read]))
        self._age.assign(tf.where(hold, self._age + 1, READ_EVERY))
