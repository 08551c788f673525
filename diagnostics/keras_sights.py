"""What a guarded Keras step shows of itself: one flag per check, one row of telemetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from diagnostics.keras_convolutions import Convolutions
from diagnostics.keras_readings import apart, extremes
from diagnostics.keras_taps import Tap
from diagnostics.keras_update import Group, Update, global_norm
from diagnostics.protocol import Check

INPUT, LABELS, SAMPLE_WEIGHTS = "input", "labels", "sample weights"
RUNAWAY_LOSS, RUNAWAY_GRADIENT = "loss beyond its limit", "gradient norm beyond its limit"

Updates = Sequence[tuple[Sequence[Group], Update]]


class Layout(NamedTuple):
    """Names of the flags and of the telemetry row that one trace returns.

    Attributes:
      hard: by check, whether it stops the run by itself. A NaN in the data that
        a model's own layer or loss deals with is told only if something else trips.
    """

    checks: tuple[Check, ...]
    hard: tuple[bool, ...]
    columns: tuple[str, ...]


class Sight(NamedTuple):
    """Flags of one kind, in order, with whether each stops the run by itself.

    Attributes:
      passed: bool [checks].
    """

    checks: list[Check]
    passed: tf.Tensor
    hard: bool = True


class TapsSight(NamedTuple):
    """Tensors that were looked at on their way.

    Attributes:
      extremes: float32 [taps, 2]: maximum and minimum of each.
    """

    taps: Sequence[Tap]
    sight: Sight
    extremes: tf.Tensor


def data_taps(data: Any) -> list[Tap]:
    """Inputs, labels and sample weights of a batch, as far as they are floating-point."""
    taps = []
    parts = keras.utils.unpack_x_y_sample_weight(data)
    for quantity, part in zip((INPUT, LABELS, SAMPLE_WEIGHTS), parts, strict=True):
        for tensor in keras.tree.flatten(part):
            dense = getattr(tensor, "flat_values", getattr(tensor, "values", tensor))
            if not tf.is_tensor(dense):
                continue
            # Integer inputs are shown in the telemetry; integer labels are no scale.
            if dense.dtype.is_floating or (dense.dtype.is_integer and quantity == INPUT):
                taps.append(Tap(Check("data", "", quantity), dense))
    return taps


def taps_sight(
    taps: Sequence[Tap], hard: bool = True, convolutions: Convolutions | None = None
) -> TapsSight:
    """Whether each tensor is finite; one that may be -Inf on its way may be that.

    Args:
      convolutions: reads them its own way, if given.
    """
    checks = [tap.check for tap in taps]
    if not taps:
        return TapsSight(taps, Sight([], _stacked([]), hard), tf.zeros([0, 2], tf.float32))
    read = extremes if convolutions is None else convolutions.extremes
    pairs = tf.stack([read(tap.tensor) for tap in taps])
    finite = tf.math.is_finite(pairs)
    lenient = tf.constant([tap.lenient for tap in taps])
    low = tf.logical_or(finite[:, 1], tf.logical_and(lenient, pairs[:, 1] == -np.inf))
    high = tf.logical_or(finite[:, 0], tf.logical_and(lenient, pairs[:, 0] == -np.inf))
    return TapsSight(taps, Sight(checks, tf.logical_and(low, high), hard), pairs)


def range_sight(valid: Sequence[tuple[Check, tf.Tensor]]) -> Sight:
    """Of class numbers and indices: whether those that were given exist."""
    return Sight([check for check, _ in valid], _stacked([flag for _, flag in valid]))


def loss_sight(loss: tf.Tensor | None, limit: tf.Tensor) -> Sight:
    """Whether the size of a loss (float32 scalar) is within its limit."""
    if loss is None:
        return Sight([], _stacked([]))
    size = tf.abs(loss)
    # NaN is the business of the other check of the loss. (Not `~(size > limit)`: the
    # graph optimizer makes `size <= limit` of that, which is false for NaN.)
    within = tf.logical_or(size <= limit, tf.math.is_nan(size))
    return Sight([Check("loss", "", RUNAWAY_LOSS)], tf.stack([within]))


def statistics_sight(
    saved: Mapping[str, tf.Tensor], variables: Mapping[str, Any], under_xla: bool
) -> Sight:
    """Of variables that are no weights, as moving means, after the forward pass.

    Args:
      saved: what they held before the step.
    """
    by_layer: dict[str, list[tf.Tensor]] = {}
    for name, before in saved.items():
        kind, _, rest = name.partition("/")
        if kind == "statistics" and before.dtype.is_floating:
            after = tf.identity(variables[name])
            after = apart(after) if under_xla else after
            # What was infinite by the user's own wish may stay so; nobody wishes for NaN.
            kept = tf.logical_or(tf.math.is_finite(after), tf.math.is_inf(before))
            by_layer.setdefault(rest.rpartition("/")[0], []).append(tf.reduce_all(kept))
    checks = [Check("forward", layer, "moving statistics") for layer in by_layer]
    flags = [tf.reduce_all(tf.stack(group)) for group in by_layer.values()]
    return Sight(checks, _stacked(flags))


def weight_sights(updates: Updates) -> list[Sight]:
    """The weights that the step began with."""
    return [
        Sight([Check("weights", group.layer, "weights") for group in groups], update.weights)
        for groups, update in updates
    ]


def update_sights(updates: Updates, limit: tf.Tensor) -> list[Sight]:
    """Gradients, their global norm against its limit, and what the updates wrote."""
    found = []
    for groups, update in updates:
        backward = [Check("backward", g.layer, "gradient") for g in reversed(groups)]
        written = [Check("update", g.layer, "new weights and slots") for g in groups]
        found.append(Sight(backward, tf.reverse(update.gradients, [0])))
        norm = global_norm(update.gradient_norms)
        within = ~tf.logical_and(norm > limit, tf.math.is_finite(norm))
        found.append(Sight([Check("backward", "", RUNAWAY_GRADIENT)], tf.stack([within])))
        found.append(Sight(written, update.state))
    return found


def telemetry_columns(
    data: TapsSight,
    forward: TapsSight,
    loss: tf.Tensor | None,
    rate: tf.Tensor | None,
    updates: Updates,
) -> dict[str, tf.Tensor]:
    """Scalars of the step, by the names of `protocol.Telemetry`."""
    columns: dict[str, tf.Tensor] = {}
    if loss is not None:
        columns["loss"] = loss
    inputs = [i for i, tap in enumerate(data.taps) if tap.check.quantity == INPUT]
    if inputs:
        pairs = tf.gather(data.extremes, inputs)
        columns["input_max"] = tf.reduce_max(pairs[:, 0])
        columns["input_min"] = tf.reduce_min(pairs[:, 1])
    if rate is not None:
        columns["lr"] = rate
        norms = tf.concat([update.gradient_norms for _, update in updates], 0)
        columns["grad_norm"] = global_norm(norms)
    columns.update(_activation_columns(forward))
    for groups, update in updates:
        for index, group in enumerate(groups):
            gradient, weight = update.gradient_norms[index], update.weight_norms[index]
            columns[f"{group.layer}/gradient_norm"] = gradient
            columns[f"{group.layer}/weight_norm"] = weight
    return columns


def _activation_columns(forward: TapsSight) -> dict[str, tf.Tensor]:
    rows: dict[str, list[int]] = {}
    for index, tap in enumerate(forward.taps):
        if tap.check.stage == "forward":
            rows.setdefault(tap.check.layer, []).append(index)
    columns = {}
    for layer, indices in rows.items():
        own = tf.gather(forward.extremes, indices)
        columns[f"{layer}/preactivation_max"] = tf.reduce_max(own[:, 0])
        columns[f"{layer}/preactivation_min"] = tf.reduce_min(own[:, 1])
    return columns


def _stacked(flags: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.stack(flags) if flags else tf.zeros([0], tf.bool)
