"""The toy's step as pure functions: configuration, batches, forward pass, loss, faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from diagnostics import guard
from diagnostics.protocol import Batch, Change, State

FEATURES, CLASSES, EXAMPLES = 6, 4, 64
WIDTHS = {
    "dense1": (FEATURES, 16),
    "dense2": (16, 14),
    "dense3": (14, 12),
    "dense4": (12, 10),
    "logits": (10, CLASSES),
}
LAYERS = tuple(WIDTHS)


@dataclass(frozen=True)
class Fault:
    """A non-finite value made by a plain TensorFlow op at a chosen place.

    Attributes:
      stage: 'forward' (pre-activation of `layer`), 'loss', 'backward' (gradient of
        that pre-activation) or 'update' (new momentum of `layer`).
      kind: 'nan' (0/0) or 'inf' (3e38 * 10).
      rows: rows of the batch it touches, where the place has rows; None for all.
    """

    stage: str
    layer: str = ""
    step: int = 0
    kind: str = "nan"
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ToyConfig:
    """What a toy run is asked to do.

    Attributes:
      sigma: standard deviation of the initial weights; None for He's.
      loss: 'xent'; 'log_of_zero' (log of a softmax that underflows under large
        logits); 'sqrt_backward' (square root of 0 at an all-zero example: fine
        forwards, NaN backwards); 'division_by_variance' (of an example's features,
        0 at a constant example); 'covariance' (products over the batch, which no
        single row owns).
      poisoned: example id -> 'nan', 'inf', 'huge' (1e25), 'zero', 'constant' or
        'label' (out of range).
      overwritten: (step, array name): its first element is NaN from that step on.
    """

    seed: int = 0
    sigma: float | None = None
    learning_rate: float = 0.05
    momentum: float = 0.9
    clip_norm: float = 0.0
    warmup_steps: int = 0
    precision: str = "float32"
    loss: str = "xent"
    input_scale: float = 1.0
    batch_size: int = 8
    poisoned: Mapping[int, str] = field(default_factory=dict)
    fault: Fault | None = None
    overwritten: tuple[int, str] | None = None


def toy_batch(config: ToyConfig, step: int) -> Batch:
    """The batch of a step: each example once an epoch, labels by a fixed linear teacher."""
    epoch, place = divmod(step * config.batch_size, EXAMPLES)
    order = np.random.default_rng([config.seed, 1, epoch]).permutation(EXAMPLES)
    ids = order[place : place + config.batch_size]
    draw = np.random.default_rng([config.seed, 2])
    features = draw.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    labels = np.argmax(features @ draw.normal(size=(FEATURES, CLASSES)), axis=1).astype(np.int32)
    features *= np.float32(config.input_scale)
    for example, kind in config.poisoned.items():
        if kind == "label":
            labels[example] = CLASSES
        elif kind in ("zero", "constant"):
            features[example] = 0.0 if kind == "zero" else 3.0
        else:
            values = {"nan": np.nan, "inf": np.inf, "huge": 1e25}
            features[example, 1:3] = values[kind]
    return {"inputs": features[ids], "labels": labels[ids], "example_ids": ids.astype(np.int64)}


def initial_state(config: ToyConfig) -> State:
    """Step 0's state out of the seed."""
    draw = np.random.default_rng([config.seed, 3])
    state: State = {}
    for layer, (fan_in, fan_out) in WIDTHS.items():
        sigma = math.sqrt(2.0 / fan_in) if config.sigma is None else config.sigma
        state[f"params/{layer}/kernel"] = (sigma * draw.normal(size=(fan_in, fan_out))).astype("f4")
        state[f"params/{layer}/bias"] = np.zeros(fan_out, np.float32)
    for name in list(state):
        state[name.replace("params", "momentum")] = np.zeros_like(state[name])
    state["counters/step"] = np.array(0, np.int64)
    return state


def forward(
    config: ToyConfig,
    weights: Mapping[str, tf.Tensor],
    inputs: tf.Tensor,
    step: tf.Tensor,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """(float32 logits, extremes of every pre-activation)."""
    seen = []
    values = tf.cast(inputs, config.precision)
    for layer in LAYERS:
        with tf.name_scope(layer):
            kernel = tf.cast(weights[f"{layer}/kernel"], config.precision)
            bias = tf.cast(weights[f"{layer}/bias"], config.precision)
            values = tf.nn.bias_add(tf.matmul(values, kernel), bias)
            values = faulty(config, "forward", layer, values, step)
            values = _faulty_backwards(config, layer, values, step)
            seen.append(guard.extremes(values))
            if layer != "logits":
                values = tf.nn.relu(values)
    return tf.cast(values, tf.float32), seen


def loss_of(
    config: ToyConfig, logits: tf.Tensor, inputs: tf.Tensor, labels: tf.Tensor, step: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """(scalar loss, NaN where a label is out of range; whether all labels are in range)."""
    valid = tf.reduce_all(tf.logical_and(labels >= 0, labels < CLASSES))
    labels = tf.clip_by_value(labels, 0, CLASSES - 1)
    per_example = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    penalty = 0.0
    if config.loss == "log_of_zero":
        probability = tf.gather(tf.nn.softmax(logits), labels, batch_dims=1)
        per_example = -tf.math.log(probability)
    elif config.loss == "sqrt_backward":
        size = tf.reduce_max(tf.abs(inputs), axis=1, keepdims=True)
        per_example += tf.sqrt(tf.reduce_sum(tf.square(logits * size), axis=1))
    elif config.loss == "division_by_variance":
        per_example /= tf.math.reduce_variance(inputs, axis=1)
    elif config.loss == "covariance":
        products = tf.matmul(logits, logits, transpose_a=True) / config.batch_size
        penalty = 1e-3 * tf.reduce_mean(tf.abs(products))
    loss = tf.where(valid, tf.reduce_mean(per_example) + penalty, np.nan)
    return faulty(config, "loss", "", loss, step), valid


def faulty(
    config: ToyConfig, stage: str, layer: str, values: tf.Tensor, step: tf.Tensor
) -> tf.Tensor:
    """`values`, or at the configured place and step times a non-finite factor."""
    fault = config.fault
    if fault is None or (fault.stage, fault.layer) != (stage, layer):
        return values
    hit = tf.equal(step, fault.step)
    if fault.rows is not None:
        rows = np.isin(np.arange(values.shape[0]), fault.rows)[:, np.newaxis]
        hit = tf.logical_and(hit, rows)
    if fault.kind == "nan":
        one = tf.where(hit, 0.0, 1.0)
        factor = one / one
    else:
        factor = tf.where(hit, 3e38, 1.0) * tf.where(hit, 10.0, 1.0)
    return values * tf.cast(factor, values.dtype)


def _faulty_backwards(
    config: ToyConfig, layer: str, values: tf.Tensor, step: tf.Tensor
) -> tf.Tensor:
    @tf.custom_gradient
    def identity(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.identity(x), lambda dy: faulty(config, "backward", layer, dy, step)

    fault = config.fault
    wanted = fault is not None and (fault.stage, fault.layer) == ("backward", layer)
    return identity(values) if wanted else values


def without_examples(batch: Batch, ids: Sequence[int]) -> Batch:
    """The batch with the rows of `ids` replaced by copies of the other rows."""
    suspect = np.isin(batch["example_ids"], list(ids))
    innocent = np.flatnonzero(~suspect)
    rows = np.arange(len(suspect))
    rows[suspect] = np.resize(innocent, int(suspect.sum()))
    return {name: values[rows] for name, values in batch.items()}


def changed(config: ToyConfig, change: Change | None) -> ToyConfig:
    """The configuration with one thing changed; data changes leave it as it is."""
    fields = {
        "init": "sigma",
        "learning_rate": "learning_rate",
        "warmup": "warmup_steps",
        "clip_norm": "clip_norm",
        "precision": "precision",
        "loss_formula": "loss",
    }
    if change is None or change.kind not in fields:
        return config
    return dataclasses.replace(config, **{fields[change.kind]: change.value})
