"""What follows from a step's gradients: verdict, new state and telemetry, as pure functions.

`TrainStep` writes the new state into variables; other runtimes take `gated_update`,
which returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from diagnostics import guard
from diagnostics.guard import Forward, GuardLayout
from vggrepro import loss_scale
from vggrepro.optimizer import MomentumSGD, RateSettings, learning_rate

PARTS = ("kernel", "bias")
NOT_REFUSED = -1
Groups = Sequence[Sequence[tf.Tensor]]


class Norms(NamedTuple):
    """L2 norms: of each layer, float32 [layers], and of all gradients together, a scalar."""

    gradients: tf.Tensor
    weights: tf.Tensor
    velocities: tf.Tensor
    all_gradients: tf.Tensor


class Judged(NamedTuple):
    """The verdict on a step, and the state that it would write.

    Attributes:
      passed: bool [checks], in the order of `GuardLayout.checks`.
      norms: exact, none overflows where its elements do not.
      proposals: (new weight, new velocity) of every parameter, in order.
    """

    passed: tf.Tensor
    norms: Norms
    proposals: list[tuple[tf.Tensor, tf.Tensor]]


class Updated(NamedTuple):
    """A step's outcome where the state is a value and not a set of variables.

    Attributes:
      state: the new state; the old one, bit for bit, if anything was not finite.
      applied: whether the step was taken; true of a skip too.
      refused: int32, the first step that was refused; NOT_REFUSED before.
    """

    state: dict[str, tf.Tensor]
    refused: tf.Tensor
    applied: tf.Tensor
    passed: tf.Tensor
    telemetry: tf.Tensor


def by_layer(tensors: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
    """Groups kernels and biases, in the order of the parameters, by layer."""
    return [list(tensors[i : i + len(PARTS)]) for i in range(0, len(tensors), len(PARTS))]


def judge(
    optimizer: MomentumSGD,
    names: Sequence[str],
    seen: Forward,
    gradients: Sequence[tf.Tensor],
    weights: Sequence[tf.Tensor],
    velocities: Sequence[tf.Tensor],
    rate: tf.Tensor,
) -> Judged:
    """Looks at every element of gradients, old and new state.

    Args:
      names: of the parameters, in the order of the tensors.
    """
    groups = by_layer(gradients)
    norms = tf.stack([guard.exact_norm(group) for group in groups])
    largest = tf.reduce_max(norms)
    total = largest * tf.norm(tf.math.divide_no_nan(norms, largest))
    scale = optimizer.clip_scale(total)
    proposals = [
        optimizer.proposal(name, weight, velocity, gradient, rate, scale)
        for name, weight, velocity, gradient in zip(
            names, weights, velocities, gradients, strict=True
        )
    ]
    new_state = [sum(map(list, pair), []) for pair in by_layer(proposals)]
    passed = guard.passed_vector(
        seen,
        guard.all_finite(by_layer(weights)),
        guard.all_finite(groups),
        guard.all_finite(new_state),
    )
    weight_norms = tf.stack([guard.exact_norm(group) for group in by_layer(weights)])
    velocity_norms = tf.stack([guard.exact_norm(group) for group in by_layer(velocities)])
    return Judged(passed, Norms(norms, weight_norms, velocity_norms, total), proposals)


def telemetry_row(
    optimizer: MomentumSGD,
    seen: Forward,
    accuracies: Sequence[tf.Tensor],
    rate: tf.Tensor,
    norms: Norms,
    extra: Sequence[tf.Tensor] = (),
) -> tf.Tensor:
    """float32 [columns], in the order of `GuardLayout.columns`.

    Args:
      accuracies: top-1 and top-5, shares of the global batch.
      extra: float32 scalars, of `GuardLayout.extra`.
    """
    moved = norms.velocities if optimizer.form == "caffe" else norms.velocities * rate
    scalars = [seen.loss, *accuracies, rate, norms.all_gradients, *tf.unstack(seen.input_extremes)]
    return tf.concat(
        [
            tf.stack(scalars),
            seen.preactivation_extremes[:, 0],
            seen.preactivation_extremes[:, 1],
            norms.gradients,
            norms.weights,
            tf.math.divide_no_nan(moved, norms.weights),
            *([tf.stack(list(extra))] if extra else []),
        ],
        axis=0,
    )


def gated_update(
    optimizer: MomentumSGD,
    layout: GuardLayout,
    settings: RateSettings,
    state: Mapping[str, tf.Tensor],
    refused: tf.Tensor,
    seen: Forward,
    gradients: Sequence[tf.Tensor],
    accuracies: Sequence[tf.Tensor],
    overflow: tf.Tensor | None = None,
) -> Updated:
    """The new state if all is finite and no step was refused before, else the old one.

    Args:
      state: named tensors as `TrainStep.state`; counters may be int32.
      seen, gradients, accuracies: of the global batch.
      overflow: of a state with a loss scale, whether the gradients at that scale were not
        finite; `gradients` are then those at scale 1, and if all is finite with them, only
        the step counter and the loss scale change: a skip.
    """
    names = [f"{layer}/{part}" for layer in layout.layers for part in PARTS]
    weights = [state[f"params/{name}"] for name in names]
    velocities = [state[f"momentum/{name}"] for name in names]
    step = state["counters/step"]
    rate = learning_rate(settings, step, state["schedule/drops"])
    judged = judge(optimizer, names, seen, gradients, weights, velocities, rate)
    armed = tf.equal(refused, NOT_REFUSED)
    applied = tf.logical_and(armed, tf.reduce_all(judged.passed))
    written, new = applied, dict(state)
    extra: list[tf.Tensor] = []
    if overflow is not None:
        skipped = tf.logical_and(applied, overflow)
        written = tf.logical_and(applied, tf.logical_not(overflow))
        scaled = loss_scale.after_step(state, skipped)
        new |= {name: tf.where(applied, value, state[name]) for name, value in scaled.items()}
        extra = loss_scale.telemetry_of(state[loss_scale.SCALE], skipped)
    for name, (weight, velocity) in zip(names, judged.proposals, strict=True):
        new[f"params/{name}"] = tf.where(written, weight, state[f"params/{name}"])
        new[f"momentum/{name}"] = tf.where(written, velocity, state[f"momentum/{name}"])
    new["counters/step"] = step + tf.cast(applied, step.dtype)
    stopped = tf.logical_and(armed, tf.logical_not(applied))
    return Updated(
        new,
        tf.where(stopped, tf.cast(step, refused.dtype), refused),
        applied,
        judged.passed,
        telemetry_row(optimizer, seen, accuracies, rate, judged.norms, extra),
    )
