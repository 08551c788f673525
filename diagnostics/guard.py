"""The tripwire inside a compiled step: what is read, what trips, what is reported.

A guarded step reads, without leaving the graph, its input, every
pre-activation, the loss, every gradient, every weight and the state it is about
to write. If one element anywhere is NaN or infinite, nothing is written. The
guard returns data; it never raises from inside the graph, because XLA drops
such assertions without a word.

Two levels keep it cheap. The fast level takes sums of squares and extremes: a
non-finite element makes them non-finite. Only where one of them is not finite
(or a bound on the new state is not conclusive) the exact level looks at every
element, so that a norm that merely overflowed (|g| around 1e19 in float32) is
told from an element that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diagnostics.protocol import Check

# Norms below this neither overflow when squared and summed nor hide an overflow of the
# new state (largest float32: 3.4e38).
SAFE_BOUND = 1e18


@dataclass(frozen=True)
class GuardLayout:
    """Which checks and which telemetry columns a step returns, in order.

    Attributes:
      layers: the weight layers in forward order.
      extra: telemetry columns that only this kind of step has; they come last.
    """

    layers: tuple[str, ...]
    extra: tuple[str, ...] = ()

    def checks(self) -> tuple[Check, ...]:
        """All checks in order of execution."""
        forward = self.layers
        return (
            Check("data", "", "input"),
            Check("data", "", "labels"),
            *(Check("weights", layer, "weights") for layer in forward),
            *(Check("forward", layer, "pre-activation") for layer in forward),
            Check("loss", "", "loss"),
            *(Check("backward", layer, "gradient") for layer in reversed(forward)),
            *(Check("update", layer, "new weights and momentum") for layer in forward),
        )

    def columns(self) -> tuple[str, ...]:
        """Telemetry columns of one step, in order."""
        return (
            *SCALAR_COLUMNS,
            *(f"{layer}/{kind}" for kind in LAYER_COLUMNS for layer in self.layers),
            *self.extra,
        )


SCALAR_COLUMNS = (
    "loss",
    "top1_accuracy",
    "top5_accuracy",
    "lr",
    "grad_norm",
    "input_max",
    "input_min",
)
# Weight norm and update ratio are of the state that enters the step: the ratio
# is |update that led to these weights| / |weights|.
LAYER_COLUMNS = (
    "preactivation_max",
    "preactivation_min",
    "gradient_norm",
    "weight_norm",
    "update_ratio",
)


class StepResult(NamedTuple):
    """What the host reads after a step.

    Attributes:
      applied: whether the update was written.
      passed: bool [checks], in the order of `GuardLayout.checks`.
      telemetry: float32 [columns], in the order of `GuardLayout.columns`.
      healthy: of a step on several replicas, whether all of its own was finite on each;
        () where there is but one.
    """

    applied: bool
    passed: np.ndarray
    telemetry: np.ndarray
    healthy: Sequence[bool] = ()


class Forward(NamedTuple):
    """What the forward pass showed, in the graph.

    Attributes:
      input_extremes: float32 [2], maximum and minimum of the input.
      labels_valid: bool scalar.
      preactivation_extremes: float32 [layers, 2].
      loss: float32 scalar.
    """

    input_extremes: tf.Tensor
    labels_valid: tf.Tensor
    preactivation_extremes: tf.Tensor
    loss: tf.Tensor


def extremes(tensor: tf.Tensor) -> tf.Tensor:
    """float32 [2]: maximum and minimum; NaN or infinite if any element is.

    Two reductions, because a maximum alone does not see -inf; taken before the
    ReLU, because the CPU's fused ReLU turns NaN into 0.
    """
    pair = tf.stack([tf.reduce_max(tensor), tf.reduce_min(tensor)])
    return tf.cast(pair, tf.float32)


def checked_extremes(tensor: tf.Tensor) -> tf.Tensor:
    """`extremes` that also holds where a maximum drops NaN, as XLA's on the CPU does."""
    return with_nan(extremes(tensor), tf.reduce_all(tf.math.is_finite(tensor)))


def with_nan(pair: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
    """The pair, or NaN where it hides that something was not finite; infinities stay."""
    honest = tf.logical_or(finite, tf.logical_not(tf.reduce_all(tf.math.is_finite(pair), axis=-1)))
    return tf.where(honest[..., tf.newaxis], pair, np.nan)


def squares(groups: Sequence[Sequence[tf.Tensor]]) -> tf.Tensor:
    """float32 [groups]: sum of squares over the tensors of each group."""
    sums = tf.stack([tf.nn.l2_loss(tensor) for group in groups for tensor in group])
    return 2.0 * tf.reduce_sum(tf.reshape(sums, [len(groups), -1]), axis=1)


def exact_norm(group: Sequence[tf.Tensor]) -> tf.Tensor:
    """L2 norm scaled by the maximum: overflows only where the norm itself does."""
    largest = tf.reduce_max(tf.stack([tf.reduce_max(tf.abs(tensor)) for tensor in group]))
    scale = tf.where(largest > 0, largest, 1.0)
    total = tf.add_n([tf.reduce_sum(tf.square(tensor / scale)) for tensor in group])
    return scale * tf.sqrt(total)


def all_finite(groups: Sequence[Sequence[tf.Tensor]]) -> tf.Tensor:
    """bool [groups]: whether every element of every tensor of a group is finite."""
    return tf.stack(
        [
            tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in group]))
            for group in groups
        ]
    )


def passed_vector(
    forward: Forward, weights: tf.Tensor, gradients: tf.Tensor, update: tf.Tensor
) -> tf.Tensor:
    """Assembles bool [checks] in the order of `GuardLayout.checks`.

    Args:
      weights, gradients, update: bool [layers], in forward order.
    """
    finite = tf.math.is_finite
    return tf.concat(
        [
            [tf.reduce_all(finite(forward.input_extremes)), forward.labels_valid],
            weights,
            tf.reduce_all(finite(forward.preactivation_extremes), axis=-1),
            [finite(forward.loss)],
            tf.reverse(gradients, [0]),
            update,
        ],
        axis=0,
    )
