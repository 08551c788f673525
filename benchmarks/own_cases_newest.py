"""Still more faults of our own choosing: each once passed for healthy, or had no fix.

Ideas and figures with their source; each has a clean twin that carries the usual fix.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from fault_case import Built, FaultCase, blobs, logits_loss, registering, seeded

L, opt = keras.layers, keras.optimizers
CASES: list[FaultCase] = []
_case = registering(CASES)


@_case(
    id="word_beyond_the_vocabulary",
    source="StackOverflow 'indices[3,2] = 50 is not in [0, 50)'",
    cause="data",
    accept_causes=("architecture",),
    stage="data",
    layer="words",
    samples=(40,),
)
def unknown_word(faulty: bool, seed: int = 0) -> Built:
    """One index of one row has no row in the embedding."""
    draw = seeded(seed)
    x = draw.integers(0, 50, (128, 6)).astype("int32")
    y = (x[:, 0] > 25).astype("int64")
    x[40, 3] = 50 if faulty else 49
    layers = [L.Embedding(50, 8, name="words"), L.GlobalAveragePooling1D(), L.Dense(2)]
    model = keras.Sequential([keras.Input((6,), dtype="int32"), *layers])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 16, 2)


@_case(
    id="weight_of_an_absent_example",
    source="keras#7917 and #545: weights of examples that divide by a count of 0",
    cause="data",
    stage="data",
    samples=(55,),
)
def absent_weight(faulty: bool, seed: int = 0) -> Built:
    """0/0 as one weight of a tf.data pipeline of (x, y, weight)."""
    draw = seeded(seed)
    x, y = blobs(draw, 128, 5, 3)
    weights = np.ones(128, "float32")
    weights[55] = np.nan if faulty else 0.0
    model = keras.Sequential([keras.Input((5,)), L.Dense(12, activation="relu"), L.Dense(3)])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(16)
    return Built(model, dataset, None, None, 2)


@_case(
    id="softmax_over_one_unit",
    source="StackOverflow 'Dense(1, activation=softmax) does not learn'",
    cause="architecture",
    accept_causes=("loss_formula",),
    stage="",
    layer="out",
)
def lonely_softmax(faulty: bool, seed: int = 0) -> Built:
    """Its output is 1 and its gradient 0, whatever the weights."""
    draw = seeded(seed)
    x, y = blobs(draw, 256, 8, 2)
    out = L.Dense(1, activation="softmax" if faulty else "sigmoid", name="out")
    model = keras.Sequential([keras.Input((8,)), L.Dense(16, activation="relu", name="h"), out])
    model.compile(opt.Adam(1e-2), "mse", jit_compile=False)
    return Built(model, x, y.astype("float32")[:, None], 32, 6)


@_case(
    id="relu_in_an_lstm",
    source="StackOverflow 'NaN loss with LSTM(activation=relu)'",
    cause="architecture",
    accept_causes=("init", "learning_rate"),
    stage="",
    layer="lstm",
)
def relu_lstm(faulty: bool, seed: int = 0) -> Built:
    """400 time steps; the second update already meets outputs of 1e28."""
    draw = seeded(seed)
    x = (draw.random((96, 400, 4)) * 5).astype("float32")
    memory = L.LSTM(48, activation="relu" if faulty else "tanh", name="lstm")
    model = keras.Sequential([keras.Input((400, 4)), memory, L.Dense(1, name="value")])
    model.compile(opt.SGD(1e-2), "mse", jit_compile=False)
    return Built(model, x, x.mean((1, 2))[:, None], 16, 3)


@_case(
    id="forbidden_transition_of_a_forward_algorithm",
    source="Hidden Markov and CRF layers: a log-sum-exp by hand over paths none of which exists",
    cause="loss_formula",
    accept_causes=("architecture",),
    stage="loss",
    op="Sub",
)
def forward_algorithm(faulty: bool, seed: int = 0) -> Built:
    """-Inf less its own maximum, -Inf."""
    draw = seeded(seed)
    x = draw.normal(size=(96, 7, 4)).astype("float32")
    chances = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], "float32")
    moves = tf.math.log(tf.constant(chances if faulty else np.maximum(chances, 1e-6)))

    def likelihood(t: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        scores = tf.nn.log_softmax(scores)
        alpha = scores[:, 0]
        for step in range(1, 7):
            paths = alpha[:, :, None] + moves
            most = tf.reduce_max(paths, 1, keepdims=True)
            alpha = tf.math.log(tf.reduce_sum(tf.exp(paths - most), 1)) + most[:, 0]
            alpha += scores[:, step]
        return -tf.reduce_max(alpha, -1)

    layers = [L.Dense(16, activation="tanh", name="h"), L.Dense(3, name="scores")]
    model = keras.Sequential([keras.Input((7, 4)), *layers])
    model.compile(opt.Adam(1e-3), likelihood, jit_compile=False)
    return Built(model, x, x, 16, 2)


@_case(
    id="normalisation_adapted_to_a_constant_column",
    source="keras.layers.Normalization: a variance of 0 becomes 1e-14, and the column varies later",
    cause="data",
    accept_causes=("architecture",),
    stage="",
    layer="norm",
)
def flat_column(faulty: bool, seed: int = 0) -> Built:
    """Adapted to the first 64 rows; one column only varies from row 160 on."""
    draw = seeded(seed)
    x = draw.normal(size=(320, 6)).astype("float32")
    x[:160, 4] = 3.0
    norm = L.Normalization(name="norm")
    norm.adapt(x[:64] if faulty else x)
    hidden = L.Dense(16, activation="relu", name="h")
    model = keras.Sequential([keras.Input((6,)), norm, hidden, L.Dense(1, name="value")])
    model.compile(opt.SGD(0.01), "mse", jit_compile=False)
    return Built(model, x, x.sum(1, keepdims=True), 32, 3)


@_case(
    id="classes_of_minus_one_and_one",
    source="StackOverflow 'binary_crossentropy loss is negative': labels of a hinge loss",
    cause="labels",
    accept_causes=("data",),
    stage="",
)
def signed_classes(faulty: bool, seed: int = 0) -> Built:
    """The loss has no lower bound then."""
    draw = seeded(seed)
    x, y = blobs(draw, 256, 8, 2)
    y = 2 * y - 1 if faulty else y
    layers = [L.Dense(16, activation="relu", name="h"), L.Dense(1, activation="sigmoid", name="p")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(opt.Adam(2e-2), "binary_crossentropy", jit_compile=False)
    return Built(model, x, y.astype("float32")[:, None], 16, 8)
