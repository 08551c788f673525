"""More faults of our own choosing: each once led the diagnosis astray, or past it.

Ideas and figures with their source; each has a clean twin that carries the usual fix.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from fault_case import Built, FaultCase, blobs, logits_loss, registering, seeded

L, opt, init = keras.layers, keras.optimizers, keras.initializers
CASES: list[FaultCase] = []
_case = registering(CASES)


@_case(
    id="gradient_penalty_of_a_flat_critic",
    source="Gulrajani et al. 2017 (WGAN-GP), as asked on StackOverflow: the norm of a gradient of "
    "0 has no gradient",
    cause="loss_formula",
    stage="backward",
    op="SqrtGrad",
)
def gradient_penalty(faulty: bool, seed: int = 0) -> Built:
    """A critic's own train step with a tape inside a tape; for blank rows its gradient is 0."""
    draw = seeded(seed)
    x = draw.normal(size=(128, 6)).astype("float32")
    x[4:8] = 0.0

    class Critic(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = L.Dense(16, activation="relu", name="first")
            self.score = L.Dense(1, name="score")

        def call(self, v: tf.Tensor) -> tf.Tensor:
            return self.score(self.first(v))

        def train_step(self, data: Any) -> dict:
            points, _ = data
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(points)
                    score = self(points, training=True)
                slope = inner.gradient(score, points)
                norm = tf.sqrt(tf.reduce_sum(slope * slope, 1) + (0.0 if faulty else 1e-12))
                loss = tf.reduce_mean(score) + 10.0 * tf.reduce_mean((norm - 1.0) ** 2)
            own = self.trainable_variables
            self.optimizer.apply(outer.gradient(loss, own), own)
            return {"loss": loss}

    model = Critic()
    model.compile(opt.Adam(1e-3), jit_compile=False)
    return Built(model, x, x, 16, 2)


@_case(
    id="void_label_of_a_segmentation",
    source="Cityscapes and Pascal VOC mark void pixels with 255; a sparse cross-entropy over the "
    "real classes (many StackOverflow questions)",
    cause="labels",
    stage="data",
    samples=(20,),
)
def void_pixels(faulty: bool, seed: int = 0) -> Built:
    """Two classes of pixels, and four pixels of one picture marked 255."""
    draw = seeded(seed)
    x = draw.random((48, 8, 8, 3)).astype("float32")
    y = (x[..., 0] > 0.5).astype("int32")
    if faulty:
        y[20, :2, :2] = 255
    layers = [L.Conv2D(8, 3, padding="same", activation="relu", name="conv"), L.Conv2D(2, 1)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 8, 2)


@_case(
    id="second_head_lacks_a_class",
    source="Multi-task nets on StackOverflow: one of two heads has a unit too few",
    cause="labels",
    stage="data",
    samples=(90,),
)
def second_head(faulty: bool, seed: int = 0) -> Built:
    """Two classifiers over one trunk; the second one is shown a fifth class."""
    draw = seeded(seed)
    x, y = blobs(draw, 160, 5, 3)
    other = (7 * y) % 4
    if faulty:
        other[90] = 4
    inputs = keras.Input((5,))
    trunk = L.Dense(16, activation="relu", name="trunk")(inputs)
    heads = {"kind": L.Dense(3, name="kind")(trunk), "place": L.Dense(4, name="place")(trunk)}
    model = keras.Model(inputs, heads)
    losses = {"kind": logits_loss(), "place": logits_loss()}
    model.compile(opt.Adam(1e-3), losses, jit_compile=False)
    return Built(model, x, {"kind": y, "place": other}, 16, 2)


@_case(
    id="rate_that_moves_nothing",
    source="UMLAUT (Schoop et al. 2021) and DeepLocalize: a learning rate far too low",
    cause="learning_rate",
    stage="",
)
def idle_rate(faulty: bool, seed: int = 0) -> Built:
    """SGD at 1e-9; the loss begins a little below that of guessing and stays there."""
    draw = seeded(seed)
    x, y = blobs(draw, 320, 8, 4)
    hidden = [L.Dense(16, activation="relu", name=f"hidden_{i}") for i in range(2)]
    model = keras.Sequential([keras.Input((8,)), *hidden, L.Dense(4, name="scores")])
    model.compile(opt.SGD(1e-9 if faulty else 0.05), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 12)


@_case(
    id="kernels_of_ones",
    source="DeepFD (Cao et al. 2022), NeuraLint: constant initial weights",
    cause="init",
    stage="",
)
def kernels_of_ones(faulty: bool, seed: int = 0) -> Built:
    """The first update of five convolutions of ones kills every ReLU; the loss is ln 3 then."""
    draw = seeded(seed)
    y = draw.integers(0, 3, 128)
    x = (draw.random((128, 10, 10, 1)) + 0.3 * y[:, None, None, None]).astype("float32")
    kernel = "ones" if faulty else "he_normal"
    layers = [
        L.Conv2D(16, 3, padding="same", activation="relu", kernel_initializer=kernel, name=f"c{i}")
        for i in range(5)
    ]
    head = [L.GlobalAveragePooling2D(), L.Dense(3, name="scores")]
    model = keras.Sequential([keras.Input((10, 10, 1)), *layers, *head])
    model.compile(opt.SGD(0.01), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 10)


@_case(
    id="mask_of_minus_1e9_in_float16",
    source="Transformer tutorials' -1e9 under mixed_float16 (keras and huggingface trackers)",
    cause="precision",
    stage="forward",
    layer="pool",
    op="Cast",
)
def half_mask(faulty: bool, seed: int = 0) -> Built:
    """Attention pooling; -1e9 is -inf in float16, and 0 times that is NaN."""
    draw = seeded(seed)
    x = draw.normal(size=(64, 6, 8)).astype("float32")
    x[20] = 0.0
    y = draw.integers(0, 3, 64)

    class Pool(L.Layer):
        def build(self, shape: tuple) -> None:
            self.score = self.add_weight(shape=(shape[-1], 1), name="score")

        def call(self, v: tf.Tensor) -> tf.Tensor:
            blank = tf.cast(tf.reduce_all(v == 0, -1, keepdims=True), v.dtype)
            large = tf.cast(-1e9 if faulty else -1e4, v.dtype)
            weights = tf.nn.softmax(v @ tf.cast(self.score, v.dtype) + blank * large, axis=1)
            return tf.reduce_sum(weights * v, 1)

    layers = [Pool(name="pool", dtype="mixed_float16"), L.Dense(3, dtype="float32", name="scores")]
    model = keras.Sequential([keras.Input((6, 8)), *layers])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 16, 2)


@_case(
    id="layer_normalisation_without_epsilon",
    source="CRADLE and TFuzz style numerical bugs: 1/sqrt of the variance of a constant row",
    cause="architecture",
    accept_causes=("data",),
    stage="forward",
    layer="norm",
    op="Rsqrt",
)
def no_epsilon(faulty: bool, seed: int = 0) -> Built:
    """Row 60 is constant."""
    draw = seeded(seed)
    x, y = blobs(draw, 128, 8, 3)
    x[60] = 2.0
    norm = L.LayerNormalization(epsilon=0.0 if faulty else 1e-3, name="norm")
    layers = [norm, L.Dense(16, activation="relu", name="hidden"), L.Dense(3, name="scores")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(opt.Adam(1e-3), logits_loss(), jit_compile=False)
    return Built(model, x, y, 16, 2)


@_case(
    id="loss_with_the_wrong_sign",
    source="StackOverflow 'Keras loss is negative and keeps falling': a similarity minimised",
    cause="loss_formula",
    stage="",
)
def wrong_sign(faulty: bool, seed: int = 0) -> Built:
    """Minus the squared error, which has no lower bound."""
    draw = seeded(seed)
    x = draw.normal(size=(256, 5)).astype("float32")

    def similarity(t: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
        return (-1.0 if faulty else 1.0) * tf.square(t - p)

    hidden = [L.Dense(16, activation="relu", name=f"hidden_{i}") for i in range(2)]
    model = keras.Sequential([keras.Input((5,)), *hidden, L.Dense(1, name="value")])
    model.compile(opt.SGD(0.1 if faulty else 0.01), similarity, jit_compile=False)
    return Built(model, x, x[:, :1].copy(), 32, 4)


@_case(
    id="loss_weight_of_100000",
    source="Multi-output nets on StackOverflow: loss_weights meant to level losses of other units",
    cause="loss_formula",
    accept_causes=("learning_rate",),
    stage="",
)
def loss_weight(faulty: bool, seed: int = 0) -> Built:
    """Two regressions, one of them weighted with 1e5."""
    draw = seeded(seed)
    x = draw.normal(size=(256, 5)).astype("float32")
    inputs = keras.Input((5,))
    trunk = L.Dense(16, activation="relu", name="trunk")(inputs)
    model = keras.Model(inputs, [L.Dense(1, name="a")(trunk), L.Dense(1, name="b")(trunk)])
    weights = [1e5 if faulty else 1.0, 1.0]
    model.compile(opt.SGD(0.01), ["mse", "mae"], loss_weights=weights, jit_compile=False)
    return Built(model, x, [x[:, :1].copy(), x[:, 1:2].copy()], 32, 4)


@_case(
    id="l2_penalty_of_100",
    source="DeepLocalize, UMLAUT: a regulariser out of proportion",
    cause="loss_formula",
    accept_causes=("learning_rate", "optimizer"),
    stage="",
)
def penalty(faulty: bool, seed: int = 0) -> Built:
    """Its gradient alone is 20 times the weights a step."""
    draw = seeded(seed)
    x, y = blobs(draw, 256, 8, 3)
    l2 = keras.regularizers.L2(100.0 if faulty else 1e-4)
    hidden = [
        L.Dense(16, activation="relu", kernel_regularizer=l2, name=f"hidden_{i}") for i in range(2)
    ]
    model = keras.Sequential([keras.Input((8,)), *hidden, L.Dense(3, name="scores")])
    model.compile(opt.SGD(0.1 if faulty else 0.02), logits_loss(), jit_compile=False)
    return Built(model, x, y, 32, 4)


@_case(
    id="logarithm_in_a_recurrent_cell",
    source="A cell of one's own in keras.layers.RNN: the fault is inside the loop over time",
    cause="architecture",
    stage="forward",
    layer="memory",
    op="Log",
)
def log_cell(faulty: bool, seed: int = 0) -> Built:
    """The logarithm of a state that may be negative."""
    draw = seeded(seed)
    x = draw.normal(size=(64, 6, 3)).astype("float32")

    class LogCell(L.Layer):
        state_size = output_size = 4

        def build(self, shape: tuple) -> None:
            self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")
            self.recurrent_kernel = self.add_weight(shape=(4, 4), name="recurrent_kernel")

        def call(self, v: tf.Tensor, states: list) -> tuple:
            new = v @ self.kernel + states[0] @ self.recurrent_kernel
            new = tf.math.log(new if faulty else tf.abs(new) + 1.0)
            return new, [new]

    layers = [L.RNN(LogCell(), name="memory"), L.Dense(1, name="value")]
    model = keras.Sequential([keras.Input((6, 3)), *layers])
    model.compile(opt.Adam(1e-3), "mse", jit_compile=False)
    return Built(model, x, x.sum((1, 2))[:, None], 16, 2)
