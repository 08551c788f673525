"""Every way to train a Keras model, with and without the guard: same bits, right place."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import BATCH, FEATURES, Fitted, L, compiled, data, mlp, poisoned

from diagnostics import NumericGuard
from diagnostics.incident import read_incident
from diagnostics.keras_replay import KerasRun
from diagnostics.replay import reproduce


class Scale(L.Layer):
    """A custom layer whose call can be made to divide by zero."""

    def build(self, shape: tuple) -> None:
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.factor


class Subclassed(keras.Model):
    """Layers made in `__init__`, built at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = L.Dense(8, activation="relu", name="hidden")
        self.scale = Scale(name="scale")
        self.drop = L.Dropout(0.2)
        self.head = L.Dense(3, name="head")

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.head(self.drop(self.scale(self.hidden(x)), training=training))


class OwnStep(Subclassed):
    """A custom train_step with a loss of its own and clipping."""

    def train_step(self, batch: Any) -> dict:
        x, y = batch
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), logits)
            )
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients, _ = tf.clip_by_global_norm(gradients, 1.0)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Adversarial(keras.Model):
    """Two optimizers, two updates a step; the second sees what the first wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = L.Dense(1, name="critic")
        self.maker = L.Dense(FEATURES, name="maker")
        self.second = keras.optimizers.SGD(0.05)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.critic(self.maker(x))

    def train_step(self, batch: Any) -> dict:
        x, _ = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.critic(x) - 1.0))
        own = self.critic.trainable_variables
        self.optimizer.apply(tape.gradient(loss, own), own)
        with tf.GradientTape() as tape:
            score = tf.reduce_mean(tf.square(self.critic(self.maker(x))))
        made = self.maker.trainable_variables
        self.second.apply(tape.gradient(score, made), made)
        return {"loss": loss + score}


class WithoutOptimizer(Subclassed):
    """Writes its weights by hand and keeps a running mean in a plain tf.Variable."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = tf.Variable(0.0, trainable=False)

    def train_step(self, batch: Any) -> dict:
        x, y = batch
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int32), logits)
            )
        for weight, gradient in zip(
            self.trainable_variables, tape.gradient(loss, self.trainable_variables), strict=True
        ):
            weight.assign_sub(0.1 * gradient)
        self.seen.assign(0.9 * self.seen + 0.1 * tf.reduce_mean(x))
        return {"loss": loss}


def functional() -> keras.Model:
    """Two inputs, two outputs, an operation between layers, shared layers."""
    left, right = keras.Input((FEATURES,), name="left"), keras.Input((FEATURES,), name="right")
    shared = L.Dense(8, activation="tanh", name="shared")
    joined = L.Concatenate()([shared(left), shared(right)])
    joined = keras.ops.multiply(joined, 0.5)
    classes = L.Dense(3, name="classes")(joined)
    value = L.Dense(1, name="value")(joined)
    model = keras.Model([left, right], {"classes": classes, "value": value})
    model.compile(
        keras.optimizers.RMSprop(1e-2),
        {"classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "value": "mse"},
        jit_compile=False,
    )
    return model


def recurrent() -> keras.Model:
    """Embedding, a masked LSTM and layer normalisation."""
    return compiled(
        keras.Sequential(
            [
                L.Embedding(20, 6, mask_zero=True, name="words"),
                L.LSTM(5, name="memory"),
                L.LayerNormalization(name="norm"),
                L.Dense(3, name="logits"),
            ]
        )
    )


def picture_net() -> keras.Model:
    """Convolution, batch norm, max pooling: where NaN hides on a CPU."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                L.MaxPooling2D(2, name="pool"),
                L.Conv2D(4, 2, activation="relu", name="conv"),
                L.BatchNormalization(name="norm"),
                L.GlobalMaxPooling2D(name="top"),
                L.Dense(3, name="logits"),
            ]
        ),
        optimizer=keras.optimizers.SGD(0.05),
    )


def mixed(policy: str) -> keras.Model:
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return compiled(mlp())
    finally:
        keras.config.set_dtype_policy(previous)


def two_inputs() -> tuple[dict, dict]:
    x, y = data()
    return {"left": x, "right": x[::-1].copy()}, {"classes": y, "value": x[:, :1]}


def words() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.integers(0, 20, (48, 5)), data()[1]


def pictures() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(3).normal(size=(48, 6, 6, 1)).astype("float32"), data()[1]


def generator() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    x, y = data()
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH], y[start : start + BATCH]


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(data()).batch(BATCH)


WAYS = {
    "subclassed": (lambda: compiled(Subclassed()), data),
    "own_step": (lambda: compiled(OwnStep(), loss=None), data),
    "adversarial": (lambda: compiled(Adversarial(), loss=None), data),
    "by_hand": (lambda: compiled(WithoutOptimizer(), loss=None), data),
    "functional": (functional, two_inputs),
    "recurrent": (recurrent, words),
    "pictures": (picture_net, pictures),
    "float16": (lambda: mixed("mixed_float16"), data),
    "bfloat16": (lambda: mixed("mixed_bfloat16"), data),
    "dataset": (lambda: compiled(mlp()), lambda: (dataset(), None)),
    "generator": (lambda: compiled(mlp()), lambda: (generator(), None)),
    "weights": (lambda: compiled(mlp(), weighted_metrics=["accuracy"]), data),
}


class Unguarded(NamedTuple):
    """What is left of a fit over good data without a guard."""

    bits: list[bytes]
    halfway: list[bytes]
    history: dict[str, list[float]]


@functools.cache
def unguarded(way: str) -> Unguarded:
    fitted = Fitted(WAYS[way][0], *WAYS[way][1](), **options_of(way))
    return Unguarded(fitted.bits(), fitted.halfway, fitted.history.history)


def options_of(way: str) -> dict[str, Any]:
    if way == "weights":
        return {"sample_weight": np.linspace(0, 2, 48).astype("float32")}
    return {"batch_size": BATCH} if way == "functional" else {}


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_with_and_without(tmp_path, way):
    build, fed = WAYS[way]
    guarded = Fitted(build, *fed(), tmp_path / "run", **options_of(way))
    plain = unguarded(way)
    assert guarded.guard.incident is None and guarded.guard.step == 6
    assert guarded.bits() == plain.bits
    assert guarded.history.history == plain.history


def rows(feed: str, stop: int, bad: bool) -> dict[str, Any]:
    """Arguments of `fit` for rows up to `stop`; with `bad`, step 3 holds one NaN."""
    x, y = poisoned(3) if bad else data()
    weights = np.ones(len(x), "float32")
    if feed == "sample_weight":
        x = data()[0]
        weights[3 * BATCH + 2] = np.nan if bad else 1.0
    x, y, weights = x[:stop], y[:stop], weights[:stop]
    if feed == "functional":
        inputs = {"left": data()[0][:stop], "right": x}
        return {"x": inputs, "y": {"classes": y, "value": x[:, :1] * 0}, "batch_size": BATCH}
    if feed == "dataset":
        return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)}
    if feed == "generator":
        batches = ((x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, stop, BATCH))
        return {"x": batches, "steps_per_epoch": stop // BATCH}
    return {"x": x, "y": y, "sample_weight": weights}


@pytest.mark.parametrize(
    "feed", ["functional", "dataset", "generator", "sample_weight", "bfloat16"]
)
def test_a_bad_number_stops_every_way_of_feeding(tmp_path, feed):
    def build() -> keras.Model:
        if feed == "functional":
            return functional()
        return mixed("mixed_bfloat16") if feed == "bfloat16" else compiled(mlp())

    stopped = Fitted(build, run_dir=tmp_path / "run", **rows(feed, 6 * BATCH, bad=True))
    assert stopped.guard.step == 3
    if feed in ("functional", "sample_weight"):
        reference = Fitted(build, **rows(feed, 3 * BATCH, bad=False)).bits()
    else:
        reference = unguarded(feed).halfway
    assert stopped.bits() == reference


def test_a_run_that_cannot_learn_is_told_at_the_end(tmp_path):
    layers = [
        keras.Input((FEATURES,)),
        L.Dense(8, activation="relu", kernel_initializer="zeros", name="dead"),
        L.Dense(3, kernel_initializer="zeros", name="logits"),
    ]
    model = compiled(keras.Sequential(layers), optimizer=keras.optimizers.SGD(0.01))
    guard = NumericGuard(tmp_path / "run", stop_on_divergence=True)
    model.fit(*data(), batch_size=BATCH, epochs=10, callbacks=[guard], verbose=0)
    assert guard.incident is None and "never fell" in guard.message and "dead" in guard.message
    # Also where there is no time for a fix to show that it learns.
    assert guard.diagnose(budget_seconds=0.1).cause.kind == "init"
    found = guard.diagnose(budget_seconds=8)
    assert found.verdict == "stalled" and found.cause.kind == "init"
    assert len(found.counterfactuals) > 1, "its batches were kept"


def stopped_halfway(build: Callable[[], keras.Model], bad: Any, place: Any, good: list) -> Fitted:
    """A fit stopped at step 3; its state is that of good data until then."""
    stopped = Fitted(build, *bad, place)
    assert stopped.guard.step == 3
    assert stopped.bits() == good
    return stopped


@pytest.mark.parametrize("way", "subclassed own_step adversarial by_hand float16".split())
def test_a_bad_step_writes_nothing(tmp_path, way):
    stopped_halfway(WAYS[way][0], poisoned(3), tmp_path / "run", unguarded(way).halfway)


def test_a_plain_variable_of_the_model_is_put_back(tmp_path):
    stopped = Fitted(
        lambda: compiled(WithoutOptimizer(), loss=None), *poisoned(3), tmp_path / "run"
    )
    assert np.isfinite(stopped.model.seen.numpy())
    incident = read_incident(stopped.guard.incident)
    assert any(name.startswith("other/") for name in incident.state)


def test_a_nan_that_max_pooling_would_drop_is_seen(tmp_path):
    x, y = pictures()
    x[3 * BATCH + 1, 0, 0, 0] = np.nan
    good = unguarded("pictures").halfway
    stopped = stopped_halfway(picture_net, (x, y), tmp_path / "run", good)
    failed = read_incident(stopped.guard.incident).record["failed_checks"]
    assert failed[0]["stage"] == "data" and failed[1]["layer"] == "pool"


def test_a_loss_scale_skip_is_no_incident(tmp_path):
    """float16 gradients overflow under the first loss scales, which Keras skips."""

    def build() -> keras.Model:
        model = mixed("mixed_float16")
        model.optimizer.initial_scale = 2.0**40
        return model

    plain = Fitted(build, *data())
    guarded = Fitted(build, *data(), tmp_path / "run")
    assert guarded.guard.incident is None
    assert float(guarded.model.optimizer.dynamic_scale) < 2.0**40
    assert guarded.bits() == plain.bits()


def test_labels_and_masks_that_the_model_deals_with_are_no_incident(tmp_path):
    """NaN as 'no label' under a masking loss; -inf in front of a softmax."""

    class Mask(L.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return tf.where(tf.range(3) < 2, x, -np.inf)

    def masked(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        known = tf.math.is_finite(y_true)
        difference = tf.where(known, y_true, 0.0) - tf.where(known, y_pred, 0.0)
        return tf.reduce_mean(tf.square(difference), axis=-1)

    def build() -> keras.Model:
        layers = [keras.Input((FEATURES,)), L.Dense(3), Mask(), L.Softmax()]
        return compiled(keras.Sequential(layers), loss=masked)

    x, _ = data()
    y = np.zeros((48, 3), "float32")
    y[5, 1] = np.nan
    guarded = Fitted(build, x, y, tmp_path / "run")
    assert guarded.guard.incident is None and guarded.guard.step == 6


def test_mirrored_strategy_in_a_process_with_two_cpus():
    """Virtual devices must be made before TensorFlow starts."""
    place = f"{__file__}::test_both_replicas_of_a_mirrored_strategy"
    environment = {**os.environ, "TWO_VIRTUAL_CPUS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", place]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif("TWO_VIRTUAL_CPUS" not in os.environ, reason="run by the test above")
def test_both_replicas_of_a_mirrored_strategy(tmp_path):
    cpu = tf.config.list_physical_devices("CPU")[0]
    virtual = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, virtual)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def build() -> keras.Model:
        layers = [L.Dense(8, name="first"), L.BatchNormalization(name="norm"), L.Dropout(0.2)]
        with strategy.scope():
            model = keras.Sequential([*layers, L.Dense(3, name="logits")])
            return compiled(model, optimizer=keras.optimizers.SGD(0.05, momentum=0.9))

    plain = Fitted(build, *data())
    guarded = Fitted(build, *data(), tmp_path / "a")
    assert guarded.bits() == plain.bits() and guarded.guard.incident is None
    for row in (2, 6):  # in one replica's part only
        x, y = data()
        x[3 * BATCH + row, 1] = np.nan
        stopped = stopped_halfway(build, (x, y), tmp_path / f"b{row}", plain.halfway)
        batch = read_incident(stopped.guard.incident).batch
        assert np.array_equal(batch["inputs"], x[24:32], equal_nan=True)
    run = KerasRun(stopped.guard.run_dir, stopped.model)
    found = reproduce(run, run.program(), run.state_before(3), run.batch(3), 3)
    assert found.verdict == "reproduced", found.differences


def test_data_of_unknown_length(tmp_path):
    """Keras finds its end by running one step too many; the second epoch sees that."""

    def endless_length() -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(data()).batch(BATCH).filter(lambda x, y: True)

    plain = Fitted(lambda: compiled(mlp()), endless_length(), epochs=2)
    guarded = Fitted(lambda: compiled(mlp()), endless_length(), None, tmp_path / "run", epochs=2)
    assert guarded.bits() == plain.bits() and guarded.guard.step == 12


@pytest.mark.usefixtures("without_op_determinism")
def test_xla(tmp_path):
    def build() -> keras.Model:
        layers = [L.Dense(4, activation="relu", name="first"), L.BatchNormalization(name="norm")]
        return compiled(
            keras.Sequential([*layers, L.Dense(3, name="logits")]),
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
            jit_compile=True,
        )

    plain = Fitted(build, *data())
    guarded = Fitted(build, *data(), tmp_path / "a")
    assert guarded.bits() == plain.bits()
    stopped_halfway(build, poisoned(3), tmp_path / "b", plain.halfway)


@pytest.mark.usefixtures("without_op_determinism")
@pytest.mark.parametrize(
    "policy",
    ["mixed_float16"]
    + [pytest.param(one, marks=pytest.mark.slow) for one in ("float32", "mixed_bfloat16")],
)
def test_xla_with_several_steps_an_execution(tmp_path, policy):
    def build() -> keras.Model:
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            return compiled(mlp(), jit_compile=True, steps_per_execution=2)
        finally:
            keras.config.set_dtype_policy(previous)

    x, y = data()
    # In two fits of a step pair and a step each; the guarded one takes three pairs.
    plain = Fitted(build, x[: 3 * BATCH], y[: 3 * BATCH])
    halfway = plain.bits()
    plain.model.fit(x[3 * BATCH :], y[3 * BATCH :], batch_size=BATCH, shuffle=False, verbose=0)
    guarded = Fitted(build, x, y, tmp_path / "a")
    assert guarded.bits() == plain.bits()
    stopped_halfway(build, poisoned(3), tmp_path / "b", halfway)


class LogCell(L.Layer):
    """A recurrent cell of the user's own; the logarithm of a negative state is NaN."""

    state_size = output_size = 4

    def build(self, shape: tuple) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(4, 4), name="recurrent_kernel")

    def call(self, x: tf.Tensor, states: list) -> tuple:
        new = tf.math.log(x @ self.kernel + states[0] @ self.recurrent_kernel)
        return new, [new]


def test_a_fault_inside_a_recurrent_loop_has_its_layer_op_and_line(tmp_path):
    x = np.random.default_rng(0).normal(size=(16, 4, 3)).astype("float32")
    layers = [keras.Input((4, 3)), L.RNN(LogCell(), name="memory"), L.Dense(3, name="logits")]
    stopped = Fitted(
        lambda: compiled(keras.Sequential(layers)), x, np.zeros(16, int), tmp_path / "run"
    )
    first = stopped.guard.diagnose(budget_seconds=0).first_nonfinite
    assert (first.stage, first.layer, first.op) == ("forward", "memory", "Log")
    assert "new = tf.math.log(x @ self.kernel" in first.source


@pytest.mark.parametrize(
    "kind", ["LSTM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("SimpleRNN", "GRU"))]
)
def test_recurrent_layers_clean_and_faulty(tmp_path, kind):
    def build() -> keras.Model:
        layers = [keras.Input((6, 1)), getattr(L, kind)(4, name="memory"), L.Dense(3)]
        return compiled(keras.Sequential(layers))

    good, bad = data(), poisoned(3)
    good, bad = (good[0][..., None], good[1]), (bad[0][..., None], bad[1])
    plain, guarded = Fitted(build, *good), Fitted(build, *good, tmp_path / "a")
    assert guarded.bits() == plain.bits()
    stopped_halfway(build, bad, tmp_path / "b", plain.halfway)


def test_other_callbacks_keep_their_place(tmp_path):
    """A checkpoint of the stopped epoch holds the finite weights, whoever comes first."""
    for order in (0, 1):
        file = tmp_path / f"{order}.weights.h5"
        saver = keras.callbacks.ModelCheckpoint(file, save_weights_only=True)
        rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01)
        callbacks = [rate, saver]

        def fit_order(model: keras.Model, guard: Any, first: int = order, extra=callbacks) -> None:
            ordered = [guard, *extra] if first else [*extra, guard]
            model.fit(*poisoned(3), batch_size=BATCH, callbacks=ordered, verbose=0, shuffle=False)

        model = compiled(mlp())
        guard = NumericGuard(tmp_path / f"run{order}")
        fit_order(model, guard)
        assert guard.incident is not None
        kept = model.get_weights()
        model.load_weights(file)
        assert all(np.isfinite(w).all() for w in model.get_weights())
        assert [w.tobytes() for w in kept] == [w.tobytes() for w in model.get_weights()]


def test_a_second_fit_goes_on_counting(tmp_path):
    fitted = Fitted(lambda: compiled(mlp()), *data(), tmp_path / "run")
    callbacks = [fitted.guard]
    fitted.model.fit(*poisoned(1), batch_size=BATCH, callbacks=callbacks, verbose=0, shuffle=False)
    assert fitted.guard.step == 7
    assert fitted.guard.incident.name == "step-00000007"
    assert fitted.guard.telemetry().steps.tolist() == list(range(8))


def test_a_fit_that_raises_leaves_the_model_usable(tmp_path):
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            raise RuntimeError("the disk is full")

    model, guard = compiled(mlp()), NumericGuard(tmp_path / "run")
    with pytest.raises(RuntimeError, match="the disk is full"):
        model.fit(*data(), batch_size=BATCH, callbacks=[guard, Breaks()], verbose=0)
    model.fit(*poisoned(0), batch_size=BATCH, verbose=0)
    assert guard.step == 1 and guard.incident is None
    assert not np.isfinite(model.get_weights()[0]).all()


@pytest.mark.parametrize("rate", [0.1, 1.5])
def test_stop_on_divergence(tmp_path, rate):
    """Above 2/curvature, gradient descent on a parabola doubles its distance every step."""
    x, _ = data()
    layers = [keras.Input((FEATURES,)), L.Dense(1, name="line")]
    model = compiled(keras.Sequential(layers), optimizer=keras.optimizers.SGD(rate), loss="mse")
    guard = NumericGuard(tmp_path / "run", stop_on_divergence=True)
    model.fit(x, x[:, :1], batch_size=BATCH, epochs=5, callbacks=[guard], verbose=0)
    if rate < 1:
        assert guard.incident is None and guard.step == 30
        return
    record = read_incident(guard.incident).record
    assert record["diverged"] and "runs away" in guard.message and guard.step < 30
    loss = guard.telemetry().column("loss")
    assert loss[-1] > 100 * loss[0] and np.isfinite(loss).all()
