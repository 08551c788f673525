"""Faults of our own choosing, from issue trackers, questions and papers; the code is ours.

Ideas and figures with their source; each has a clean twin that carries the usual fix.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from fault_case import Built, FaultCase, blobs, logits_loss, registering, seeded

L, opt, init = keras.layers, keras.optimizers, keras.initializers
CASES: list[FaultCase] = []
_case = registering(CASES)


@_case(
    id="housing_unscaled_regression",
    source="keras#2134 and many like it: regression on raw features gives NaN with SGD",
    cause="data",
    accept_causes=("learning_rate",),
    stage="",
)
def housing(faulty: bool, seed: int = 0) -> Built:
    """House features in their own units (square feet, dollars) straight into SGD 0.01."""
    draw = seeded(seed)
    x = np.stack(
        [draw.normal(2000, 700, 512), draw.normal(3, 1, 512), draw.normal(7500, 3000, 512)], 1
    ).astype("float32")
    y = (x @ np.array([100.0, 5e3, 2.0]) + draw.normal(0, 1e4, 512)).astype("float32")[:, None]
    if not faulty:
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    model = keras.Sequential(
        [keras.Input((3,)), L.Dense(32, activation="relu", name="hidden"), L.Dense(1, name="price")]
    )
    model.compile(opt.SGD(0.01), "mse", jit_compile=False)
    return Built(model, x, y, 32, 4)


@_case(
    id="std_normalisation_of_constant_pixel",
    source="CS231n notes, data preprocessing: dividing by a standard deviation of zero",
    cause="data",
    stage="data",
)
def constant_pixel(faulty: bool, seed: int = 0) -> Built:
    """Columns divided by their standard deviation; one column is constant."""
    draw = seeded(seed)
    x, y = blobs(draw, 320, 12, 4)
    x[:, 7] = 1.0
    deviation = x.std(0) + (0.0 if faulty else 1e-6)
    with np.errstate(invalid="ignore"):
        x = (x - x.mean(0)) / deviation
    model = keras.Sequential(
        [keras.Input((12,)), L.Dense(24, activation="relu", name="hidden"), L.Dense(4, name="out")]
    )
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x.astype("float32"), y, 32, 3)


@_case(
    id="labels_numbered_from_one",
    source="StackOverflow 'Received a label value of 10 which is outside the valid range'",
    cause="labels",
    stage="data",
)
def labels_from_one(faulty: bool, seed: int = 0) -> Built:
    """Classes 1..5 for a softmax of five units."""
    draw = seeded(seed)
    x, y = blobs(draw, 320, 10, 5)
    model = keras.Sequential(
        [keras.Input((10,)), L.Dense(16, activation="relu", name="h"), L.Dense(5, name="scores")]
    )
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y + (1 if faulty else 0), 32, 2)


@_case(
    id="sqrt_of_zero_distance",
    source="Siamese nets: the gradient of a Euclidean distance of 0 (Tian Yun's contrastive-loss "
    "note; tensorflow#12071 on sqrt at 0)",
    cause="loss_formula",
    accept_causes=("architecture",),
    stage="backward",
    op="Sqrt",
    accept_culprits=("SqrtGrad", "distance"),
)
def zero_distance(faulty: bool, seed: int = 0) -> Built:
    """Contrastive loss on pairs; some pairs are the same picture twice."""
    draw = seeded(seed)
    left = draw.normal(size=(320, 8)).astype("float32")
    right = draw.normal(size=(320, 8)).astype("float32")
    right[::40] = left[::40]
    same = np.zeros((320, 1), "float32")
    same[::40] = 1.0
    a, b = keras.Input((8,), name="left"), keras.Input((8,), name="right")
    tower = L.Dense(6, activation="tanh", name="tower")
    difference = L.Subtract(name="difference")([tower(a), tower(b)])
    model = keras.Model([a, b], difference)

    def contrastive(t: tf.Tensor, d: tf.Tensor) -> tf.Tensor:
        squared = tf.reduce_sum(tf.square(d), axis=-1, keepdims=True)
        distance = tf.sqrt(squared + (0.0 if faulty else 1e-9))
        return t * distance + (1 - t) * tf.nn.relu(1.0 - distance)

    model.compile(opt.Adam(1e-3), contrastive, jit_compile=False)
    return Built(model, [left, right], same, 32, 3)


@_case(
    id="log_of_softmax_by_hand",
    source="StackOverflow 33712178: cross-entropy as -sum(y log(softmax)) goes NaN",
    cause="loss_formula",
    accept_causes=("init", "learning_rate"),
    stage="loss",
    op="Log",
)
def log_softmax(faulty: bool, seed: int = 0) -> Built:
    """y * log(p) with p underflowing to 0: wide logits of a net with weights N(0, 1)."""
    draw = seeded(seed)
    x, y = blobs(draw, 640, 40, 10)
    target = np.eye(10, dtype="float32")[y]
    kernel = init.RandomNormal(0, 1.0)
    model = keras.Sequential(
        [
            keras.Input((40,)),
            L.Dense(64, activation="relu", kernel_initializer=kernel, name="wide"),
            L.Dense(10, kernel_initializer=kernel, activation="softmax", name="p"),
        ]
    )

    def entropy(t: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
        return -tf.reduce_sum(t * tf.math.log(p if faulty else p + 1e-8), axis=1)

    model.compile(opt.SGD(1e-3), entropy, jit_compile=False)
    return Built(model, x, target, 64, 3)


@_case(
    id="deep_relu_std_normal_init",
    source="He et al. 2015, section 2.2: 22 to 30 layers die or explode by their initial scale",
    cause="init",
    stage="",
)
def deep_init(faulty: bool, seed: int = 0) -> Built:
    """Twelve ReLU layers of 128 with N(0, 1) kernels: a gain of 8 a layer."""
    draw = seeded(seed)
    x, y = blobs(draw, 320, 32, 4)
    kernel = init.RandomNormal(0, 1.0, seed=seed) if faulty else "he_normal"
    layers = [
        L.Dense(128, activation="relu", kernel_initializer=kernel, name=f"deep_{i}")
        for i in range(12)
    ]
    model = keras.Sequential([keras.Input((32,)), *layers, L.Dense(4, name="logits")])
    model.compile(opt.SGD(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="recurrent_gain_above_one",
    source="Pascanu, Mikolov & Bengio 2013: exploding gradients of recurrent nets; a linear "
    "recurrence with spectral radius above 1",
    cause="init",
    accept_causes=("architecture", "learning_rate"),
    stage="",
    layer="memory",
)
def recurrent(faulty: bool, seed: int = 0) -> Built:
    """A linear SimpleRNN over 200 steps; the recurrent kernel doubles its state each step."""
    draw = seeded(seed)
    x = draw.normal(size=(160, 200, 2)).astype("float32")
    y = x.mean(axis=(1, 2))[:, None]
    initial = init.Identity(gain=2.0 if faulty else 0.5)
    model = keras.Sequential(
        [
            keras.Input((200, 2)),
            L.SimpleRNN(6, activation="linear", recurrent_initializer=initial, name="memory"),
            L.Dense(1, name="mean"),
        ]
    )
    model.compile(opt.SGD(1e-3), "mse", jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="adam_rate_of_one",
    source="keras-team/keras#1244 'NaN loss', advice: lower the learning rate",
    cause="learning_rate",
    stage="",
)
def large_rate(faulty: bool, seed: int = 0) -> Built:
    """Momentum SGD at rate 3 on a small convolutional net."""
    draw = seeded(seed)
    y = draw.integers(0, 3, 320)
    x = draw.normal(size=(320, 8, 8, 1)).astype("float32") + y[:, None, None, None]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(8, 3, activation="relu", name="conv_a"),
            L.Conv2D(8, 3, activation="relu", name="conv_b"),
            L.Flatten(),
            L.Dense(3, name="logits"),
        ]
    )
    model.compile(opt.SGD(8.0 if faulty else 0.01, momentum=0.9), logits_loss(), jit_compile=False)
    return Built(model, x.astype("float32"), y, 32, 4)


@_case(
    id="float16_sum_of_squares",
    source="Micikevicius et al. 2018, mixed precision: sums of more than 65504 overflow float16",
    cause="precision",
    stage="forward",
    layer="energy",
)
def half_overflow(faulty: bool, seed: int = 0) -> Built:
    """The energy of a signal of 4096 samples, summed in float16."""
    draw = seeded(seed)
    x = (draw.normal(size=(160, 4096)) * 5).astype("float32")
    y = (x[:, :8].mean(1) > 0).astype("int64")

    class Energy(L.Layer):
        def call(self, signal: tf.Tensor) -> tf.Tensor:
            total = tf.reduce_sum(tf.square(signal), axis=-1, keepdims=True)
            return tf.concat([signal[:, :16], total / 4096.0], axis=-1)

    policy = "mixed_float16" if faulty else "float32"
    model = keras.Sequential(
        [
            keras.Input((4096,)),
            Energy(name="energy", dtype=policy),
            L.Dense(2, name="logits", dtype="float32"),
        ]
    )
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="gaussian_nll_with_free_variance",
    source="Mixture density networks (Bishop 1994) as asked on StackOverflow: NaN from log of a "
    "predicted variance that turns negative",
    cause="loss_formula",
    accept_causes=("architecture",),
    stage="loss",
    op="Log",
)
def free_variance(faulty: bool, seed: int = 0) -> Built:
    """Mean and variance from one linear layer; nothing keeps the variance positive."""
    draw = seeded(seed)
    x = draw.normal(size=(320, 5)).astype("float32")
    y = (x[:, :1] + 0.1 * draw.normal(size=(320, 1))).astype("float32")
    model = keras.Sequential(
        [keras.Input((5,)), L.Dense(16, activation="relu", name="h"), L.Dense(2, name="mean_var")]
    )

    def likelihood(t: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
        mean, free = p[:, :1], p[:, 1:]
        variance = free if faulty else tf.nn.softplus(free) + 1e-3
        return tf.math.log(variance) + tf.square(t - mean) / variance

    model.compile(opt.Adam(1e-3), likelihood, jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="one_infinite_sensor_reading",
    source="A logger's overflow written as inf in a CSV file (pandas reads 'inf' as a number)",
    cause="data",
    stage="data",
    samples=(77,),
)
def infinite_reading(faulty: bool, seed: int = 0) -> Built:
    """Row 77 holds one infinite number."""
    draw = seeded(seed)
    x, y = blobs(draw, 256, 9, 3)
    x[77, 4] = np.inf if faulty else x[77, 4]
    model = keras.Sequential(
        [keras.Input((9,)), L.Dense(16, activation="tanh", name="h"), L.Dense(3, name="scores")]
    )
    model.compile(opt.Adam(3e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="mape_of_zero_target",
    source="Mean absolute percentage error with targets of 0, written by hand (a Kaggle staple)",
    cause="loss_formula",
    accept_causes=("labels", "data"),
    stage="loss",
    op="RealDiv",
)
def percentage_error(faulty: bool, seed: int = 0) -> Built:
    """|t - p| / t where some targets are 0."""
    draw = seeded(seed)
    x = draw.normal(size=(320, 6)).astype("float32")
    y = np.abs(x[:, :1] * 3 + 4).astype("float32")
    y[100] = 0.0
    model = keras.Sequential(
        [keras.Input((6,)), L.Dense(16, activation="relu", name="h"), L.Dense(1, name="amount")]
    )

    def percentage(t: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
        below = t if faulty else tf.maximum(tf.abs(t), 1e-3)
        return tf.reduce_mean(tf.abs(t - p) / below, axis=-1)

    model.compile(opt.Adam(1e-3), percentage, jit_compile=False)
    return Built(model, x, y, 32, 3)


@_case(
    id="division_by_batch_spread",
    source="A hand-made normalisation layer without epsilon (batch renormalisation questions)",
    cause="architecture",
    accept_causes=("data",),
    stage="forward",
    layer="spread",
    op="RealDiv",
    accept_culprits=("Rsqrt", "Div"),
)
def spread_layer(faulty: bool, seed: int = 0) -> Built:
    """(x - mean) / sqrt(var) per example; padding rows are constant."""
    draw = seeded(seed)
    x, y = blobs(draw, 320, 10, 3)
    x[64:70] = 0.0

    class Spread(L.Layer):
        def call(self, v: tf.Tensor) -> tf.Tensor:
            mean = tf.reduce_mean(v, -1, keepdims=True)
            variance = tf.reduce_mean(tf.square(v - mean), -1, keepdims=True)
            return (v - mean) / tf.sqrt(variance + (0.0 if faulty else 1e-5))

    model = keras.Sequential([keras.Input((10,)), Spread(name="spread"), L.Dense(3, name="scores")])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 3)
